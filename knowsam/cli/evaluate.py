"""``knowsam evaluate``: score finished runs case by case, alone or as one ensemble, and compare them."""

import argparse
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import add_checkpoint_argument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from knowsam.config import Config
    from knowsam.data.source import Source
    from knowsam.engine.scores import Evaluation
    from knowsam.inference.predict import PredictFn
    from knowsam.runs import LoadedRun

EPILOG = """examples:
  python tools/evaluate.py runs/quickstart/knowsam_labelled_10pct_seed0
  python tools/evaluate.py runs/a runs/b --split val
  python tools/evaluate.py runs/kvasir --data experiments/base/polyp_external.yaml
  python tools/evaluate.py runs/a --by data/study/patients.csv:scanner
  python tools/evaluate.py runs/study/fold_* --ensemble -o runs/study/ensemble

Writes evaluation/<split>_cases.csv, _summary.csv and .json into each run folder; several runs are also compared.
Scores on other data are called by its experiment: evaluation/<name>_<split>.json; compare and report show them too.
docs/metrics.md explains every number.
exit codes: 0 done, 65 bad data, 66 no such run, 74 disk, 78 configuration, 80 checkpoint.
"""

OF_THE_RUN = object()
"""Stands for the post-processing that the run's own configuration asks for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder written by train")
    parser.add_argument("--split", choices=("val", "test"), default="test")
    add_checkpoint_argument(parser)
    parser.add_argument("--outputs", help="comma-separated, such as fusion,sam; all if not given")
    parser.add_argument(
        "--data",
        "--dataset",
        dest="data",
        metavar="YAML",
        help="score on the data of another experiment (same classes)",
    )
    parser.add_argument("--empty", choices=("exclude", "include"), default="exclude", help="cases empty on both sides")
    parser.add_argument(
        "--nsd-tolerance", type=_tolerance, metavar="MM", help="mm, or pixels without a spacing; the run's if not given"
    )
    parser.add_argument(
        "--postprocess",
        type=_postprocess,
        default=OF_THE_RUN,
        metavar="WHAT",
        help="none, auto (chosen on validation), largest, fill_holes, or a block such as "
        "'{name: remove_small, size: 50, unit: mm}'; as in evaluate.postprocess of the run if not given",
    )
    parser.add_argument(
        "--by", metavar="WHAT", help="scores by subgroup: folder, domain, FILE.csv:COLUMN, or a column of groups.csv"
    )
    parser.add_argument("--ensemble", action="store_true", help="score the mean of the runs' probabilities as one")
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", help="of the ensemble's scores; beside the first run if not given"
    )
    parser.add_argument("--device", default="auto")


def _tolerance(word: str) -> float:
    value = float(word)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not allowed; give a number of at least 0")
    return value


def _postprocess(word: str) -> Any:
    """``auto``, None, or the blocks of ``evaluate.postprocess``."""
    import yaml

    from knowsam.errors import ConfigError
    from knowsam.inference.postprocess import STEPS, check

    try:
        value = yaml.safe_load(word)
        if isinstance(value, str):
            value = None if value == "none" else {"name": value} if value in STEPS else value
        check(value)
    except (ConfigError, yaml.YAMLError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return value


def run(args: argparse.Namespace) -> int:
    """Evaluate each run, or all as one; compare when there are several."""
    from rich.console import Console

    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.score_tables import comparison_table
    from knowsam.errors import ConfigError

    for folder in args.runs:
        RunFolder(folder, create=False)  # a wrong name is told before the others are scored
    if args.ensemble and len(args.runs) < 2:
        raise ConfigError("--ensemble was given one run; an ensemble needs at least two")
    if args.out and not args.ensemble:
        raise ConfigError("-o goes with --ensemble; the scores of a run lie in its own folder")
    console = Console(width=None if Console().is_terminal else 140)
    if args.ensemble:
        evaluation = evaluate_ensemble(args.runs, args)
        show(evaluation, console)
        return 0
    results = {}
    for folder in args.runs:
        evaluation = evaluate_run(folder, args)
        results[folder] = evaluation
        show(evaluation, console)
    if len(results) > 1:
        console.print(comparison_table(results))
    return 0


def show(evaluation: "Evaluation", console: Any) -> None:
    """Print the tables of one evaluation."""
    from knowsam.engine.score_tables import error_table, score_table, subgroup_table

    console.print(score_table(evaluation))
    console.print(error_table(evaluation))
    if evaluation.groups:
        console.print(subgroup_table(evaluation))


def evaluate_run(folder: str, args: argparse.Namespace) -> "Evaluation":
    """Load a run's checkpoint, score it and write the files."""
    from knowsam.engine import distributed
    from knowsam.runs import load_run

    loaded = load_run(folder, args.checkpoint, sam=True, quiet=False)
    config, method = loaded.config, loaded.method
    device = distributed.setup(args.device).device
    method.to(device)
    data = _data(config, args)
    _prepare_as_trained(loaded, data.source)
    scorer = _Scorer(config, data, method.predict, _outputs(args, method.outputs()), device, args)
    _refuse_training_cases(loaded, data.config, data.source, args.split)
    asked = config.evaluate.postprocess if args.postprocess is OF_THE_RUN else args.postprocess
    applied = _chosen(loaded, scorer, asked)
    evaluation = scorer.evaluate(None if asked is None else {"asked": asked, "applied": applied})
    evaluation = replace(evaluation, checkpoint=loaded.origin())
    evaluation.write(loaded.run.evaluation, data.stem(args.split))
    return evaluation


def _prepare_as_trained(loaded: "LoadedRun", source: "Source") -> None:
    """Let a source prepare its images as the run did, and refuse data that say another rule."""
    from knowsam.data.source import CaseSource

    if isinstance(source, CaseSource):
        source.preparation.load_state(loaded.preparation.state())  # says what differs


def evaluate_ensemble(folders: "Sequence[str]", args: argparse.Namespace) -> "Evaluation":
    """Load all runs, score the mean of their probabilities, and write a folder that ``compare`` reads as a run's."""
    from pathlib import Path

    from knowsam.cli.scored import write_scored
    from knowsam.engine import distributed
    from knowsam.engine.log import say
    from knowsam.errors import ConfigError
    from knowsam.inference.ensemble import Ensemble
    from knowsam.inference.postprocess import AUTO, CHOICE_FILE, describe, has_choice, stored_choice

    members = [load_for_ensemble(folder, args) for folder in folders]
    first = members[0]
    config = first.config
    for member in members[1:]:
        for key in ("data.classes", "data.image_size"):
            section, name = key.split(".")
            ours, theirs = (getattr(getattr(one.config, section), name) for one in (first, member))
            if ours != theirs:
                raise ConfigError(
                    f"the runs are no ensemble: {key} is {ours} in {first.run} and {theirs} in {member.run}"
                )
    deployed = list(dict.fromkeys(member.method.outputs()[0] for member in members))
    if len(deployed) > 1 and not args.outputs:
        raise ConfigError(
            f"the runs deploy different outputs: {', '.join(deployed)}", hint="Name one that all have with --outputs."
        )
    shared = [name for name in first.method.outputs() if all(name in member.method.outputs() for member in members)]
    outputs = _outputs(args, shared)
    device = distributed.setup(args.device).device
    ensemble = Ensemble([member.method for member in members], outputs).to(device)
    data = _data(config, args)
    for member in members:
        if member.preparation.state() != first.preparation.state():
            raise ConfigError(
                f"the runs are no ensemble: {member.run} prepared images by {member.preparation.intensity.about()}, "
                f"{first.run} by {first.preparation.intensity.about()}, or fitted it on other images"
            )
    _prepare_as_trained(first, data.source)
    for member in members:
        _refuse_training_cases(member, data.config, data.source, args.split)
    asked = config.evaluate.postprocess if args.postprocess is OF_THE_RUN else args.postprocess
    applied = dict.fromkeys(outputs, asked)
    if asked == AUTO:
        # What validates one fold trained the others, so nothing can be chosen for the ensemble itself.
        records = [(member.run.read_json(member.run.path / CHOICE_FILE), member.origin()) for member in members]
        for output in outputs:
            known = all(has_choice(record, output, origin) for record, origin in records)
            specs = [stored_choice(record, output, origin) for record, origin in records] if known else []
            applied[output] = specs[0] if specs and all(spec == specs[0] for spec in specs) else None
            why = "what every run chose" if specs and applied[output] == specs[0] else "the runs did not choose alike"
            say(f"post-processing of {output}: {describe(applied[output])} ({why})")
    scorer = _Scorer(config, data, ensemble.predict, outputs, device, args)
    evaluation = scorer.evaluate(None if asked is None else {"asked": asked, "applied": applied})
    names = [str(member.run) for member in members]
    checkpoint = {
        "kind": "ensemble",
        "file": f"ensemble of {len(members)} runs",
        "step": None,
        "outputs": list(outputs),
    }
    checkpoint |= {"chosen_by": "each run's own", "split": None, "value": None, "runs": [Path(n).name for n in names]}
    evaluation = replace(evaluation, checkpoint=checkpoint)
    out = Path(args.out) if args.out else Path(folders[0]).resolve().parent / f"ensemble_of_{len(members)}"
    splits = first.run.read_json(first.run.splits)
    method = f"{str(config.method['name']).rpartition(':')[2]}, ensemble of {len(members)}"
    write_scored(out, config, method, splits, evaluation, data.stem(args.split))
    say(f"written: {out}; compare takes it as a run")
    return evaluation


def load_for_ensemble(folder: str, args: argparse.Namespace) -> "LoadedRun":
    """One member."""
    from knowsam.runs import load_run

    return load_run(folder, args.checkpoint, sam=True, quiet=False)


@dataclass
class _Data:
    """What is scored on: the run's own data, or another experiment's (``other``)."""

    config: "Config"
    source: "Source"
    other: bool

    def stem(self, split: str) -> str:
        """Of the files' names."""
        return f"{self.config.name}_{split}" if self.other else split


def _data(config: "Config", args: argparse.Namespace) -> _Data:
    from knowsam import build
    from knowsam.config import load_config
    from knowsam.errors import ConfigError

    data_config = load_config(args.data) if args.data else config
    if data_config.data.classes != config.data.classes:
        raise ConfigError(f"{args.data} has classes {data_config.data.classes}, the run has {config.data.classes}")
    return _Data(data_config, build.build_source(data_config), bool(args.data))


def _outputs(args: argparse.Namespace, known: "Sequence[str]") -> list[str]:
    from knowsam.errors import ConfigError

    outputs = args.outputs.split(",") if args.outputs else list(known)
    unknown = sorted(set(outputs) - set(known))
    if unknown:
        raise ConfigError(f"no output {', '.join(unknown)}; the method has {', '.join(known)}")
    return outputs


@dataclass
class _Scorer:
    """Predicts with what ``config`` trained and scores on ``data``."""

    config: "Config"
    data: _Data
    predict: "PredictFn"
    outputs: list[str]
    device: Any
    args: argparse.Namespace

    def evaluate(self, postprocess: "Mapping[str, Any] | None") -> "Evaluation":
        """The scores, with subgroups where they were asked for or the data have several domains."""
        from knowsam.engine.evaluate import evaluate
        from knowsam.engine.log import Counter
        from knowsam.engine.subgroups import near_duplicates

        config, args = self.config, self.args
        cases = self.data.source.eval_ids(args.split)
        groups, by = grouped(args.by, self.data.source, cases)
        tolerance = config.evaluate.nsd_tolerance if args.nsd_tolerance is None else args.nsd_tolerance
        with Counter(f"scoring {args.split}") as progress:
            evaluation = evaluate(
                self.predict,
                self.data.source,
                args.split,
                outputs=self.outputs,
                class_names=config.data.classes[1:],
                nsd_tolerance=tolerance,
                empty=args.empty,
                postprocess=None if postprocess is None else postprocess["applied"],
                progress=progress,
                **self._how(),
            )
        return replace(
            evaluation,
            postprocess=postprocess,
            dataset=self.data.config.name if self.data.other else None,
            groups=groups or None,
            grouped_by=by,
            near_duplicates=near_duplicates(self.data.source, cases) or None,
        )

    def choose(self, source: "Source", outputs: "Sequence[str]") -> dict[str, Any]:
        """What ``auto`` finds best on the validation split of the run's own data."""
        from knowsam.engine.evaluate import choose_postprocess
        from knowsam.engine.log import Counter

        with Counter("choosing post-processing on val") as progress:
            return choose_postprocess(self.predict, source, outputs=outputs, progress=progress, **self._how())

    def _how(self) -> dict[str, Any]:
        from knowsam.build import sight
        from knowsam.engine.precision import autocast_dtype

        return {
            **sight(self.config),
            "batch_size": self.config.evaluate.batch_size,
            "device": self.device,
            "autocast": autocast_dtype(self.config.train.precision),
        }


def grouped(by: str | None, source: "Source", cases: "Sequence[str]") -> tuple[dict[str, str], str]:
    """Subgroups that were asked for; else the domains, where there are several; else none."""
    from knowsam.engine.subgroups import DOMAIN, domains, subgroups

    if by:
        return subgroups(by, source, cases)
    found = domains(source, cases)
    return (found, DOMAIN) if len(set(found.values())) > 1 else ({}, "")


def _chosen(loaded: "LoadedRun", scorer: _Scorer, asked: Any) -> dict[str, Any]:
    """Output -> spec; what ``auto`` means is chosen on validation once for these weights, and kept in the run."""
    from knowsam import build
    from knowsam.engine.log import say
    from knowsam.inference.postprocess import AUTO, CHOICE_FILE, describe, has_choice, resolve, weights_of

    if asked != AUTO:
        return {output: resolve(asked, {}, output, None) for output in scorer.outputs}
    path, origin = loaded.run.path / CHOICE_FILE, loaded.origin()
    record = loaded.run.read_json(path)
    missing = [output for output in scorer.outputs if not has_choice(record, output, origin)]
    if missing:
        source = build.build_source(loaded.config)
        _prepare_as_trained(loaded, source)
        _refuse_training_cases(loaded, loaded.config, source, "val")
        before = record.get("outputs") or {} if record.get("checkpoint") == weights_of(origin) else {}
        found = {**before, **scorer.choose(source, missing)}
        record = {"checkpoint": weights_of(origin), "split": "val", "num_cases": len(source.eval_ids("val"))}
        record["outputs"] = found
        loaded.run.write_json(path, record)
    specs = {output: resolve(asked, record, output, origin) for output in scorer.outputs}
    for output, spec in specs.items():
        about = record["outputs"][output]
        none, best = (None if v is None else 100 * v for v in (about["tried"][0]["dice"], about["dice"]))
        gain = "" if none is None or best is None else f": Dice {none:.2f} without, {best:.2f} with it"
        say(f"post-processing of {output}: {describe(spec)} (chosen on {record['num_cases']} val cases{gain})")
    return specs


def _refuse_training_cases(loaded: "LoadedRun", data_config: "Config", source: "Source", split: str) -> None:
    """The lists may have been drawn anew since the run was trained: what it has seen tells nothing on any split."""
    from knowsam.data.splits import group_of
    from knowsam.engine.log import warn
    from knowsam.errors import DataError

    if data_config.data.source != loaded.config.data.source:
        return  # in other data an equal id is another case
    run, regex = loaded.run, data_config.data.group_regex
    record = run.read_json(run.splits)
    cases = source.eval_ids(split)

    def patient(case_id: str) -> str:
        return (regex and group_of(case_id, regex)) or case_id

    seen = {patient(case_id) for name in ("train", "labelled") for case_id in record.get(name) or ()}
    trained = [case_id for case_id in cases if patient(case_id) in seen]
    if trained:
        raise DataError(
            f"{len(trained)} of the {len(cases)} {split} cases, {trained[0]!r} for one, were training cases of {run}: "
            "the split lists have changed since",
            hint="Score it on the lists that it was trained with, or train anew with these.",
        )
    before, now = (record.get("sha256") or {}), getattr(getattr(source, "splits", None), "sha256", {})
    name = f"{split}.txt"
    if name in before and before[name] != now.get(name):
        warn(f"{name} has changed since {run} was trained; none of its cases was trained on")


def score_if_new(folder: str, device: str, nsd_tolerance: float, postprocess: Any = None) -> None:
    """Score the best checkpoint on test and show the table, unless just that was done already."""
    from rich.console import Console

    from knowsam.engine.log import say
    from knowsam.engine.runfolder import RunFolder

    run = RunFolder(folder, create=False)
    scores = run.evaluation / "test.json"
    newer = scores.exists() and run.best.exists() and scores.stat().st_mtime_ns >= run.best.stat().st_mtime_ns
    if newer and _is_whole(run.read_json(scores), nsd_tolerance, postprocess):
        say(f"{run} is scored already: {scores}")
        return
    defaults = argparse.ArgumentParser()
    add_arguments(defaults)
    args = defaults.parse_args([folder, "--device", device, "--nsd-tolerance", str(nsd_tolerance)])
    args.postprocess = postprocess
    show(evaluate_run(folder, args), Console(width=None if Console().is_terminal else 140))


def _is_whole(scores: dict[str, Any], nsd_tolerance: float, postprocess: Any) -> bool:
    """Whether these are the scores that ``evaluate`` gives with no other option than these two."""
    checkpoint = scores.get("checkpoint") or {}
    return (
        checkpoint.get("file") == "best.pt"
        and scores.get("outputs") == checkpoint.get("outputs")
        and scores.get("empty") == "exclude"
        and scores.get("nsd_tolerance") == nsd_tolerance
        and (scores.get("postprocess") or {}).get("asked") == postprocess
    )

"""How good the labels are that a method gives to unlabelled images: measured afterwards, never during training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from knowsam.data.source import Source
from knowsam.engine import distributed
from knowsam.engine.checkpoint import load_checkpoint
from knowsam.engine.evaluate import evaluate
from knowsam.engine.log import Counter
from knowsam.engine.runfolder import RunFolder
from knowsam.engine.scores import MEAN, Evaluation
from knowsam.errors import CheckpointError, DataError, KnowsamError, NotFoundError
from knowsam.inference.predict import PredictFn
from knowsam.report.page.history import Series
from knowsam.report.page.networks import Networks, OpenNetworks
from knowsam.report.page.plots import Line, curve_plot
from knowsam.report.page.record import Record, on_one_line
from knowsam.report.page.score_tables import class_label, summary_cells
from knowsam.report.table import Table

if TYPE_CHECKING:
    import torch

ALL_MASKS = "all"
"""In the place of a list: every training case has a mask."""


@dataclass(frozen=True)
class Moment:
    """The weights of one step, scored on unlabelled training cases.

    Attributes:
        file: the checkpoint, such as ``best.pt`` or ``snapshots/step_0000200.pt``.
        step: updates done.
        evaluation: Dice and IoU of every output that the file holds.
    """

    file: str
    step: int
    evaluation: Evaluation


@dataclass(frozen=True)
class PseudoLabels:
    """One run's predictions on its unlabelled training cases.

    Attributes:
        run: its name.
        masks: name of the list whose masks were opened, or ``ALL_MASKS``.
        of: number of unlabelled training cases with such a mask, of which ``moments`` score some.
        moments: by step.
        reason: why there are none; empty when there are.
    """

    run: str
    masks: str = ALL_MASKS
    of: int = 0
    moments: list[Moment] = field(default_factory=list)
    reason: str = ""


# ---------------------------------------------------------------- measured


def score_pseudo_labels(
    record: Record, open_networks: OpenNetworks, *, masks: str = ALL_MASKS, most: int = 100, device: str = "auto"
) -> PseudoLabels:
    """Score a run's checkpoints and snapshots on unlabelled training cases; the only place that opens their masks.

    Args:
        record: of the run.
        open_networks: how to come to its networks.
        masks: name of a list of cases that have masks, or ``ALL_MASKS``.
        most: cases that are scored, evenly spaced in the sorted list if there are more.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    Returns:
        The scores; a reason in their place if there can be none.
    """
    try:
        return _scored(record, open_networks, masks, most, device)
    except KnowsamError as error:
        reason = on_one_line(error).rstrip(".")
        if masks == ALL_MASKS and isinstance(error, DataError):
            reason += ". If only some unlabelled images have masks, name a list of those: --pseudo-masks labelled_max"
        return PseudoLabels(record.name, masks, reason=f"{reason}.")


@dataclass(frozen=True)
class _Sample:
    """Unlabelled training cases that have a mask: ``cases`` are scored, of ``total``."""

    source: Source
    cases: list[str]
    total: int


def _scored(record: Record, open_networks: OpenNetworks, masks: str, most: int, device: str) -> PseudoLabels:
    where = distributed.setup(device).device
    found: dict[int, Moment] = {}  # by step: the weights of one step are the same in every file
    networks: Networks | None = None
    sample: _Sample | None = None
    for name in ("best", "last"):
        try:
            networks = open_networks(record.folder, name)
        except NotFoundError:
            continue
        step = networks.step
        if step is None:
            raise CheckpointError(f"{networks.path} was converted: nothing is known of its training")
        sample = sample or _sample(networks, masks, most)
        method = networks.method.to(where)
        if step not in found:
            scores = _evaluated(networks.path.name, method.predict, method.outputs(), sample, networks, where)
            found[step] = Moment(networks.path.name, step, scores)
    if networks is None or sample is None:
        raise NotFoundError("the run has neither best.pt nor last.pt")
    method = networks.method
    for path in sorted(RunFolder(record.folder, create=False).snapshots.glob("step_*.pt")):
        state = load_checkpoint(path, fall_back=False)
        step = int(state["step"])
        if step in found:
            continue
        try:
            method.inference_model().load_state_dict(state["deployed"])
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit this version of the networks: {error}") from error
        file = f"snapshots/{path.name}"
        scores = _evaluated(file, method.predict_deployed, method.outputs()[:1], sample, networks, where)
        found[step] = Moment(file, step, scores)
    return PseudoLabels(record.name, masks, sample.total, [found[step] for step in sorted(found)])


def _sample(networks: Networks, masks: str, most: int) -> _Sample:
    """Of the cases in a longer list, those that the run had without masks."""
    known = set(networks.open_source(None).labelled_ids())
    source = networks.open_source(masks)
    cases = [case for case in source.labelled_ids() if case not in known]
    if not cases:
        raise DataError(f"the list {masks!r} holds no case that was unlabelled in this run")
    chosen = cases if len(cases) <= most else [cases[i * len(cases) // most] for i in range(most)]
    return _Sample(source, chosen, len(cases))


def _evaluated(
    file: str, predict: PredictFn, outputs: Sequence[str], sample: _Sample, networks: Networks, device: "torch.device"
) -> Evaluation:
    with Counter(f"scoring {file} on unlabelled cases") as progress:
        return evaluate(
            predict,
            sample.source,
            "unlabelled",
            cases=sample.cases,
            outputs=outputs,
            **networks.sight,
            batch_size=networks.batch_size,
            device=device,
            class_names=networks.class_names,
            distances=False,
            autocast=networks.autocast,
            progress=progress,
        )


# ---------------------------------------------------------------- shown


def pseudo_label_table(found: PseudoLabels) -> Table:
    """A row per file, output and class."""
    rows = []
    for moment in found.moments:
        names = moment.evaluation.class_names
        for output, classes in moment.evaluation.summary().items():
            for name in [*names, *([MEAN] if len(names) > 1 else [])]:
                row = classes[name]
                counted = f"{row['n']} of {row['cases']}"
                cells = summary_cells(row, ("dice", "iou"))
                rows.append([moment.file, output, class_label(name), str(moment.step), counted, *cells])
    head = ["weights", "output", "class", "step", "cases", "Dice % ↑", "IoU % ↑", "missed", "false", "empty"]
    return Table("pseudo", f"{found.run}: unlabelled training cases, mean ± sd over cases", head, rows, 3)


def pseudo_label_plot(found: PseudoLabels) -> str | None:
    """Dice over the steps as SVG, a line per output; None when there is one step only."""
    steps = {moment.step for moment in found.moments}
    if len(steps) < 2:
        return None
    lines = []
    for i, output in enumerate(_outputs(found.moments)):
        by_step: dict[int, float] = {}
        for moment in found.moments:
            row: Mapping[str, Any] = moment.evaluation.summary().get(output, {}).get(MEAN, {})
            if row and row["dice"]["mean"] is not None:
                by_step[moment.step] = row["dice"]["mean"]
        lines.append(Line(output, Series(sorted(by_step), [by_step[step] for step in sorted(by_step)]), i, 100.0))
    return curve_plot(f"pseudo {found.run}", lines, "Dice %")


def pseudo_label_note(found: PseudoLabels) -> str:
    """What the numbers are, in words."""
    scored = len(found.moments[0].evaluation.cases)
    which, how = ("All", "") if scored == found.of else (f"{scored} of", ", evenly spaced in the sorted list")
    return (
        f"{which} {found.of} unlabelled training cases of the list {found.masks!r}{how}, at native resolution. Their "
        "masks were opened for this page alone: training never reads them, and no checkpoint was chosen by them. "
        "Weights of one step are shown once; a snapshot holds the deployed output alone."
    )


def _outputs(moments: Sequence[Moment]) -> list[str]:
    return list(dict.fromkeys(output for moment in moments for output in moment.evaluation.outputs))

"""What the pages tell one to write is code that runs, settings that load, and names of tests that exist."""

import re
import shlex
import sys

import numpy as np
import pytest
from docs_blocks import DOCS, ROOT, RUN, blocks, files, pages

from knowsam.cli.main import run_command
from knowsam.config import load_config

SHORT = (
    "train.max_steps=2",
    "train.validate_every=2",
    "train.checkpoint_every=2",
    "train.log_every=1",
    "train.device=cpu",
    "train.tensorboard=false",
    "data.labelled_batch=1",
    "data.unlabelled_batch=1",
    "data.image_size=32",
)
FEW = ("data.source={name: builtin, train: 12, val: 2, test: 2, size: 64}", "data.labelled=labelled_50pct")


@pytest.mark.parametrize("page", RUN)
def test_the_blocks_of_a_page_run_in_turn(page, written):
    names: dict = {"__name__": "page"}
    for number, block in enumerate(b for b in blocks(DOCS / page) if b.language == "python" and not b.file):
        if not block.not_run:
            exec(compile(block.text, f"{page}, block {number}", "exec"), names)


def test_skd_reaches_the_student_and_sam_learns_from_labels_alone():
    """The loop of the page, taken apart: which parameters each of its terms moves."""
    import torch

    code = next(block for block in blocks(DOCS / "skd_in_your_method.md") if block.language == "python")
    names: dict = {}
    exec(compile(code.text, "skd_in_your_method.md", "exec"), names)
    student, guide = names["student"], names["guide"]
    trainable = [*student.parameters(), *(p for p in guide.parameters() if p.requires_grad)]
    images = torch.rand(2, 3, 64, 64)
    logits = student(images)
    sam_logits = guide(images, logits.detach())

    def reached(loss):
        gradients = torch.autograd.grad(loss, trainable, allow_unused=True, retain_graph=True)
        return [g is not None and bool(g.abs().sum() > 0) for g in gradients]

    own = len(list(student.parameters()))
    skd = reached(names["sam_distillation_loss"](logits, sam_logits, temperature=10.0))
    sam = reached(names["segmentation_loss"](sam_logits, torch.zeros(2, 64, 64, dtype=torch.long)))
    assert any(skd[:own]) and not any(skd[own:])
    assert any(sam[own:]) and not any(sam[:own])


def experiments() -> list[str]:
    """Every experiment of the pages but those of data and libraries that are not here."""
    names = [name.removeprefix("experiments/") for name in files() if name.startswith("experiments/")]
    return [name for name in names if name not in ("npz.yaml", "timm.yaml")]


@pytest.mark.parametrize("experiment", experiments())
def test_an_experiment_of_a_page_trains(written, tmp_path, experiment):
    file, run = str(written / "experiments" / experiment), tmp_path / "run"
    assert run_command("train", [file, f"run={run}", *SHORT, *FEW]) == 0
    assert (run / "best.pt").is_file()


def test_an_experiment_with_encoders_of_timm_is_right_as_far_as_its_text_goes(written):
    students = load_config(written / "experiments" / "timm.yaml").students
    assert [block["name"] for block in students.values()] == ["timm_unet", "timm_unet"]


def test_methods_of_the_pages_are_those_that_are_tried_from_outside():
    """One text: what tests/outside trains, resumes, replicates and exports."""
    outside = {path.name: path for path in (ROOT / "tests" / "outside" / "outside_lab").glob("[a-z]*.py")}
    shown = {name.removeprefix("my_lab/"): block for name, block in files().items()}
    for name, path in outside.items():
        code = shown[name].text.partition("\n")[2]
        assert code == path.read_text(encoding="utf-8"), f"my_lab/{name} of the pages is not {path}"


@pytest.mark.parametrize("method", ["cutmix:CutMixTeacher", "rounds:Rounds", "options:TwoViews"])
def test_other_methods_of_the_pages_keep_the_contract(written, method, capsys):
    assert run_command("check-method", [f"my_lab.{method}", "--skd", "--classes", "3", "--image-size", "32"]) == 0
    assert capsys.readouterr().out.count("keeps the contract") == 2


def test_the_loss_and_its_test(written):
    sys.path.insert(0, str(written / "tests"))
    try:
        import test_my_losses
    finally:
        sys.path.remove(str(written / "tests"))
    test_my_losses.test_gradient_and_zero()


def test_the_dataset_of_the_page(written, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    data, splits = tmp_path / "data" / "my_npz", tmp_path / "splits"
    data.mkdir(parents=True)
    splits.mkdir()
    ids = [f"case_{i}" for i in range(10)]
    for case in ids:
        mask = np.zeros((40, 48), np.uint8)
        mask[8:30, 8:30] = 1
        np.savez(data / f"{case}.npz", image=rng.integers(0, 256, (40, 48, 3), dtype=np.uint8), mask=mask)
    for stem, part in {"train": ids[:6], "labelled_half": ids[:3], "val": ids[6:8], "test": ids[8:]}.items():
        (splits / f"{stem}.txt").write_text("\n".join(part) + "\n")
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path / "data"))
    run = tmp_path / "run"
    words = [f"run={run}", *SHORT, f"data.splits={splits}", "method.name=mean_teacher"]
    assert run_command("train", [str(written / "experiments" / "npz.yaml"), *words]) == 0
    assert run_command("evaluate", [str(run), "--outputs", "teacher"]) == 0
    assert "test: 2 cases" in capsys.readouterr().out

    from knowsam.build import build_source
    from knowsam.data.source import Source
    from knowsam.errors import DataError

    source = build_source(load_config(written / "experiments" / "npz.yaml", [f"data.splits={splits}"]))
    assert isinstance(source, Source)
    with pytest.raises(DataError, match="unlabelled"):
        source.mask("case_5")
    before = source.fingerprint("case_0")
    np.savez(data / "case_0.npz", image=np.zeros((40, 48, 3), np.uint8), mask=mask)
    assert source.fingerprint("case_0") != before


def test_the_study_of_the_page_on_experiments_inherits_as_it_says(tmp_path):
    (text,) = [block.text for block in blocks(DOCS / "experiments.md") if "my_study.yaml" in block.text]
    path = tmp_path / "my_study.yaml"
    path.write_text(text.replace("base/small.yaml", f"{ROOT}/experiments/base/small.yaml"))
    config, base = load_config(path), load_config(ROOT / "experiments" / "base" / "small.yaml")
    assert config.method == {"name": "mean_teacher", "consistency_weight": 5.0}
    assert "entropy_weight" in base.method
    assert config.optim == base.optim and config.students == {"unet": {"name": "unet"}}  # Mean Teacher's own
    assert config.train.max_steps == 300 and config.train.precision == base.train.precision


def test_the_mistakes_of_the_page_are_told_as_it_shows(tmp_path, monkeypatch, capsys):
    page = blocks(DOCS / "experiments.md")
    (text,) = [block.text for block in page if block.file == "mistakes.yaml"]
    (shown,) = [block.text for block in page if block.text.startswith("error[config]")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistakes.yaml").write_text(text)
    assert run_command("train", ["mistakes.yaml", "--print-config"]) == 78
    assert capsys.readouterr().err == shown


def commands() -> list[tuple[str, str]]:
    """(page, line) of every training that a page tells one to run on a shipped experiment."""
    found = []
    for page in pages():
        text = "\n".join(block.text for block in blocks(page) if block.language in ("", "bash", "text"))
        for line in text.replace("\\\n", " ").splitlines():
            named = re.search(r"tools/train\.py (experiments/\w+\.yaml)", line)
            if named and (ROOT / named[1]).exists() and "$" not in line:
                found.append((page.name, line.strip()))
    return found


@pytest.mark.parametrize(("page", "line"), commands(), ids=lambda value: value)
def test_a_command_of_a_page_is_accepted(page, line):
    words = shlex.split(line.partition("  #")[0])
    experiment, *rest = words[words.index("tools/train.py") + 1 :]
    load_config(ROOT / experiment, [word for word in rest if not word.startswith("--")])
    help_text = _help("train")
    for option in (word for word in rest if word.startswith("--")):
        assert option in help_text


def _help(command: str) -> str:
    import argparse
    import importlib

    from knowsam.cli.main import COMMANDS

    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser.format_help()


def test_every_python_block_runs_or_says_why_not():
    for page in pages():
        if page.name in RUN:
            continue
        for block in blocks(page):
            assert block.language != "python" or block.not_run, (
                f"{page.name}: a python block that no test runs; add the page to RUN, or '<!-- not run: why -->' or "
                "'<!-- run by: tests/... -->' before the block"
            )
            kind, _, other = block.not_run.partition(": ")
            assert kind != "run by" or (ROOT / other).is_file(), f"{page.name} names {other}, which is no test"


def test_faults_names_tests_that_exist():
    """A promise stands beside the test that holds it; those called slow or not are so marked."""
    text = (DOCS / "faults.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 30
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for name in sorted(named):
        homes = [path for path, source in sources.items() if f"def {name}(" in source]
        assert homes, f"faults.md names {name}, which is no test"
        wholly_slow = any(re.search(rf"(?m)^@pytest\.mark\.slow\n(?:@.*\n)*def {name}\(", sources[p]) for p in homes)
        called_slow = f"slow: `{name}`" in text
        assert called_slow == wholly_slow, f"faults.md: {name} is {'' if wholly_slow else 'not '}slow"


def test_the_exit_codes_of_the_pages_are_those_of_the_errors():
    from knowsam import errors
    from knowsam.cli import main
    from knowsam.engine.train import Interrupted

    classes = [kind for kind in vars(errors).values() if hasattr(kind, "exit_code")]
    known = {kind.exit_code for kind in [*classes, Interrupted]} | {0, main.INTERRUPTED, main.INTERNAL_ERROR}
    cells = re.findall(r"\| (\d+) \| ", (DOCS / "faults.md").read_text(encoding="utf-8"))
    assert cells and {int(code) for code in cells} <= known


def test_the_output_of_the_first_result_has_the_form_of_today(tmp_path, capsys):
    """The page shows a captured run. Its numbers depend on the machine; its words must be those of the program."""
    page = "\n".join(block.text for block in blocks(DOCS / "first_result.md") if block.language == "text")
    words = ["train.max_steps=2", "train.validate_every=1", "train.checkpoint_every=1", "train.log_every=1"]
    run = tmp_path / "run"
    experiment = str(ROOT / "experiments" / "quickstart.yaml")
    small = ("data.source.val=2", "data.source.test=2", "train.device=cpu", "train.tensorboard=false")
    assert run_command("train", [experiment, f"run={run}", *words, *small]) == 0
    trained = capsys.readouterr().out.replace(str(run), "runs/first/knowsam")

    def form(text: str) -> list[str]:
        return [re.sub(r"\d[\d.:]*", "0", line).strip() for line in text.splitlines() if line.strip()]

    shown, said = form(page), form(trained)
    # Decoding is only told of where it takes long.
    missing = [line for line in dict.fromkeys(said) if line not in shown and not line.startswith("decoding images")]
    assert not missing
    files = {path.relative_to(run).parts[0] for path in run.rglob("*") if path.is_file()} - {".lock"}
    table = (DOCS / "first_result.md").read_text(encoding="utf-8").partition("## What the folder holds")[2]
    assert [name for name in files if f"`{name}" not in table] == []

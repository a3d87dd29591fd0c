"""What is refused before anything costly is done, and what a changed dataset does to a resumed run."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.engine.checkpoint import save_checkpoint


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("sam.encoder={name: vit_tinny}", "there is no encoder 'vit_tinny'; did you mean 'vit_tiny'?"),
        ("sam.tuning={name: adaptr}", "sam.tuning.name: there is no tuning 'adaptr'; did you mean 'adapter'?"),
        ("sam.tuning.ratoi=1", "tuning 'adapter' has no parameter 'ratoi'; did you mean 'ratio'?"),
        ("sam.prompt.tokens=two", "sam.prompt.tokens: must be int, got 'two'"),
        ("method.mix.pick=foo", "method.mix.pick: must be one of ['most_uncertain', 'least_uncertain'], got 'foo'"),
        ("optim.sam.schedule=cosin", "optim.sam.schedule: must be one of"),
        ("optim.sam.warmup=-1", "optim.sam: warmup must be >= 0, got -1"),
        ("method.skd.confidence_threshold=7", "confidence_threshold must be in 0..1, got 7"),
        ("method.skd.temperature=0", "temperature must be > 0, got 0"),
        ("data.classes=[background, mean]", "a class cannot be called 'mean'"),
        ("optim.subnet={name: adam}", "block for subnet; the method trains subnets, sam; did you mean 'subnets'?"),
        ("sam.tuning.1.ratio=1", "of a list of several, an entry is set by its number"),
        ("train.precision=fp16", "fp16"),
        ("students.unet.channels=[4, -8]", "students.unet"),
    ],
)
def test_mistakes_end_before_the_cache_is_built(lab, tmp_path, monkeypatch, capsys, word, says):
    monkeypatch.setattr("knowsam.build.build_streams", lambda *_, **__: pytest.fail("decoded images first"))
    assert lab.train(tmp_path / "run", word) == 78
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error


def test_a_group_that_is_not_trained_is_said(lab, tmp_path, capsys):
    assert lab.train(tmp_path / "run", "optim.extra={name: adam}", "train.max_steps=1") == 0
    assert "note: optim.extra has no effect: the method trains subnets, sam" in capsys.readouterr().out


def test_absent_sam_weights_say_where_they_were_looked_for(lab, tmp_path, capsys):
    assert lab.train(tmp_path / "run", "sam.weights=weights/sam_vit_b_01ec64.pth") == 66
    error = capsys.readouterr().err
    assert "data/weights/sam_vit_b_01ec64.pth" in error and "sam.weights=null" in error


def test_a_supervised_run_may_use_every_label(lab, tmp_path):
    words = ["method={name: supervised}", "data.labelled=all", "train.max_steps=1"]
    assert lab.train(tmp_path / "run", *words) == 0


@pytest.fixture
def folder(lab, tmp_path, monkeypatch):
    """Ten little images on disk, and the words that make the tiny experiment use them."""
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path / "data"))
    rng = np.random.default_rng(0)
    splits = tmp_path / "splits"
    splits.mkdir()
    for kind in ("images", "masks"):
        (tmp_path / "data" / "own" / kind).mkdir(parents=True)
    names = [f"case_{i}" for i in range(10)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(
            tmp_path / "data" / "own" / "images" / f"{name}.png"
        )
        mask = np.zeros((40, 48), np.uint8)
        mask[8:30, 8:30] = 255
        Image.fromarray(mask).save(tmp_path / "data" / "own" / "masks" / f"{name}.png")
    for stem, ids in {"train": names[:6], "labelled_half": names[:3], "val": names[6:8], "test": names[8:]}.items():
        (splits / f"{stem}.txt").write_text("\n".join(ids) + "\n")
    words = ["data.source={name: image_folder, root: own}", f"data.splits={splits}", "data.labelled=labelled_half"]
    return [*words, "data.labels={0: 0, 1: 255}", "method={name: supervised}"]


@pytest.mark.parametrize("change", ["image", "labelled mask", "list", "val list", "val mask"])
def test_changed_data_stop_a_resumed_run(lab, tmp_path, folder, capsys, change):
    own = tmp_path / "data" / "own"
    assert lab.train(tmp_path / "run", *folder, "--stop-at", "2") == 0
    if change == "image":
        Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(own / "images" / "case_0.png")
    elif change == "labelled mask":
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(own / "masks" / "case_1.png")
    elif change == "val mask":
        Image.fromarray(np.zeros((40, 48), np.uint8)).save(own / "masks" / "case_6.png")
    elif change == "val list":  # what was for test now chooses the checkpoint
        (tmp_path / "splits" / "val.txt").write_text("case_8\ncase_9\n")
        (tmp_path / "splits" / "test.txt").write_text("case_6\ncase_7\n")
    else:
        (tmp_path / "splits" / "labelled_half.txt").write_text("case_0\ncase_1\n")
    assert lab.train(tmp_path / "run", *folder) == 65
    assert "have changed since step 2" in capsys.readouterr().err


def test_a_checkpoint_from_before_the_validation_data_were_recorded(lab, tmp_path, folder):
    run = tmp_path / "run"
    assert lab.train(run, *folder, "--stop-at", "2") == 0
    state = lab.last(run)
    del state["data"]["validation"]
    save_checkpoint(run / "last.pt", state)
    assert lab.train(run, *folder) == 0
    assert lab.last(run)["data"]["validation"]


def test_unlabelled_masks_are_no_part_of_the_data(lab, tmp_path, folder):
    assert lab.train(tmp_path / "run", *folder, "--stop-at", "2") == 0
    (tmp_path / "data" / "own" / "masks" / "case_5.png").unlink()
    assert lab.train(tmp_path / "run", *folder) == 0


def test_no_validation_list_is_said_at_once(lab, tmp_path, folder, capsys):
    (tmp_path / "splits" / "val.txt").unlink()
    assert lab.train(tmp_path / "run", *folder) == 65
    assert "no validation case" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_wrong_label_list_is_no_reason_to_fetch_data(lab, tmp_path, folder, capsys):
    assert lab.train(tmp_path / "run", *folder, "data.labelled=labelled_7pct", "data.obtain=fetch it there") == 66
    error = capsys.readouterr().err
    assert "labelled_half" in error and "fetch it there" not in error


def test_training_cases_are_never_scored(lab, tmp_path, folder, capsys):
    """Whatever became of the lists since: drawn anew with another seed, for one."""
    run, splits = tmp_path / "run", tmp_path / "splits"
    assert lab.train(run, *folder, "train.max_steps=1") == 0
    for name, ids in {"train": "2356", "labelled_half": "23", "val": "04", "test": "1789"}.items():
        (splits / f"{name}.txt").write_text("".join(f"case_{i}\n" for i in ids))
    capsys.readouterr()
    for split, found in (("test", "1 of the 4 test cases, 'case_1'"), ("val", "2 of the 2 val cases, 'case_0'")):
        assert run_command("evaluate", [str(run), "--split", split]) == 65
        error = capsys.readouterr().err
        assert found in error and f"were training cases of {run}" in error and "Traceback" not in error
    assert not (run / "evaluation").exists()
    (splits / "test.txt").write_text("case_7\ncase_8\ncase_9\n")
    assert run_command("evaluate", [str(run), "--outputs", "fusion"]) == 0
    assert "test.txt has changed since" in capsys.readouterr().err


def test_slices_of_a_patient_that_was_trained_on_are_not_scored(lab, tmp_path, folder, capsys):
    run, splits = tmp_path / "run", tmp_path / "splits"
    words = (*folder, "data.group_regex=case_([0-9])", "train.max_steps=1")
    assert lab.train(run, *words) == 0
    own = tmp_path / "data" / "own"
    for kind in ("images", "masks"):
        (own / kind / "case_1_later.png").write_bytes((own / kind / "case_9.png").read_bytes())
    (splits / "test.txt").write_text("case_1_later\n")
    (splits / "train.txt").write_text("case_0\ncase_2\ncase_3\n")
    (splits / "labelled_half.txt").write_text("case_0\n")
    assert run_command("evaluate", [str(run)]) == 65
    assert "'case_1_later' for one, were training cases" in capsys.readouterr().err


def test_scores_by_other_options_do_not_pass_for_the_run_s(lab, tmp_path, capsys):
    run, words = tmp_path / "run", ("method.name=supervised", "train.max_steps=1", "--evaluate")
    assert lab.train(run, *words) == 0
    read = lambda: json.loads((run / "evaluation" / "test.json").read_text())  # noqa: E731
    whole = read()
    for options in (["--checkpoint", "last"], ["--outputs", "unet"], ["--empty", "include"], ["--nsd-tolerance", "3"]):
        assert run_command("evaluate", [str(run), *options]) == 0
        assert read() != whole
        assert lab.train(run, *words) == 0
        assert read() == whole, options
    capsys.readouterr()
    assert lab.train(run, *words) == 0
    assert "is scored already" in capsys.readouterr().out
    # A tolerance changes no weight, so a finished run takes another one.
    assert lab.train(run, *words, "evaluate.nsd_tolerance=4") == 0
    assert read()["nsd_tolerance"] == 4
    assert lab.train(run, *words, "evaluate.nsd_tolerance=-1") == 78
    assert run_command("evaluate", [str(run), "--nsd-tolerance", "-1"]) == 2


def test_a_converted_run_is_no_training_to_go_on_with(lab, tmp_path, capsys):
    run, words = tmp_path / "run", ("method.name=supervised", "train.max_steps=1")
    assert lab.train(run, *words) == 0
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "step": None}))
    (run / "last.pt").unlink()
    assert lab.train(run, *words) == 73
    assert "holds a converted checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["students.unet.channels=[2,2,2,2,2,2]", "students.unet.dropout=[0,0,0,0,0,0]", "data.image_size=80"],
            "data.image_size must be divisible by 32, got 80",
        ),
        (["students.unet.channels=[]", "students.unet.dropout=[]"], "at least one level"),
        (["students.unet.channels=[4,0]"], "each of at least 1"),
        (["students.vnet.filters=0"], "filters must be at least 1"),
    ],
)
def test_students_that_fit_nothing(lab, tmp_path, capsys, words, text):
    assert lab.train(tmp_path / "run", "method.name=supervised", *words) == 78
    assert text in capsys.readouterr().err


def test_a_class_that_no_labelled_image_shows_is_said(lab, tmp_path, folder, capsys):
    words = (*folder, "data.classes=[background, lesion, scar]", "data.labels={0: 0, 1: 255, 2: 7}")
    assert lab.train(tmp_path / "run", *words, "train.max_steps=1") == 0
    assert "no labelled image shows scar (labelled_half, 64 px)" in capsys.readouterr().err
    assert lab.train(tmp_path / "two", *folder, "train.max_steps=1") == 0
    assert "no labelled image shows" not in capsys.readouterr().err


def test_code_from_outside_is_kept_with_the_run(lab, tmp_path, monkeypatch):
    (tmp_path / "lab").mkdir()
    text = "from knowsam.methods.supervised import Supervised\n\n\nclass Mine(Supervised):\n"
    text += "    def __init__(self, students, max_steps: int):\n        super().__init__(students)\n"
    (tmp_path / "lab" / "mine_kept.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))
    assert lab.train(tmp_path / "run", "method={name: 'mine_kept:Mine'}", "train.max_steps=1") == 0
    assert (tmp_path / "run" / "code" / "mine_kept.py").read_text() == text
    assert lab.train(tmp_path / "own", "method.name=supervised", "train.max_steps=1") == 0
    assert not (tmp_path / "own" / "code").exists()


def test_code_is_kept_as_far_as_it_is_used(tmp_path, monkeypatch):
    """Not what was imported for other ends before; but what the run's modules reach, and what is imported late."""
    from knowsam.engine.owncode import OwnCode

    for name, text in {
        "code_used": "from code_reached import value\nimport code_pack.part\ndef late():\n    import code_late\n",
        "code_reached": "def value(): pass\n",
        "code_late": "x = 1\n",
        "code_other": "x = 2\n",
        "code_pack/__init__": "",
        "code_pack/part": "x = 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    used = importlib.import_module("code_used")
    importlib.import_module("code_other")
    code = OwnCode(["code_used"])
    reached = {"code_used", "code_reached", "code_pack", "code_pack.part"}
    assert set(code.texts()) == reached
    used.late()
    assert set(code.texts()) == reached | {"code_late"}


def test_names_that_are_nearly_right(lab, tmp_path, capsys, monkeypatch):
    assert lab.train(tmp_path / "runs" / "a", "method.name=supervised", "train.max_steps=1", "--evaluate") == 0
    assert "next: knowsam evaluate" not in capsys.readouterr().out
    assert run_command("evaluate", [str(tmp_path / "runs")]) == 66
    assert f"It holds runs: a. Try {tmp_path / 'runs'}/a" in capsys.readouterr().err
    scores = (tmp_path / "runs" / "a" / "evaluation" / "test.json").stat().st_mtime_ns
    assert run_command("evaluate", [str(tmp_path / "runs" / "a"), str(tmp_path / "nowhere")]) == 66
    assert (tmp_path / "runs" / "a" / "evaluation" / "test.json").stat().st_mtime_ns == scores
    assert run_command("sweep", [str(lab.experiment)]) == 78
    assert "is an experiment, not a sweep" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "study.yaml").write_text("name: x")
    assert run_command("train", ["study"]) == 66
    assert "did you mean experiments/study.yaml?" in capsys.readouterr().err


def test_evaluate_builds_what_the_checkpoint_holds(lab, tmp_path, folder):
    run = tmp_path / "run"
    assert lab.train(run, *folder, "train.max_steps=1") == 0
    config = load_config(run / "config.yaml")
    assert config.students["unet"]["channels"] == [4, 8]
    (run / "config.yaml").write_text("name: something else\n")
    assert run_command("evaluate", [str(run), "--split", "val", "--outputs", "fusion"]) == 0

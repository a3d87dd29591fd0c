"""What a person sees while it trains: warnings from tables of numbers, norms, and pictures that change no bit."""

import importlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from knowsam.data.batch import Batch
from knowsam.engine import pictures, watch
from knowsam.engine.log import MetricsLog, Progress, read_metrics
from knowsam.engine.options import TrainOptions
from knowsam.engine.watch import RULES, History, Watch, findings
from knowsam.methods.base import Mix, Prediction, StepOutput, Views


def logs(steps=range(20, 420, 20), **series):
    """Training records: each value a number, or a function of the record's place."""
    return [{"step": s, **{k: v(i) if callable(v) else v for k, v in series.items()}} for i, s in enumerate(steps)]


def validations(*dice, every=50, **others):
    return [
        {"step": every * (i + 1), "dice_fusion": value, **{f"dice_{k}": v[i] for k, v in others.items()}}
        for i, value in enumerate(dice)
    ]


HEALTHY = {
    "loss": lambda i: 4.0 / (1 + i),
    "skd_unet": lambda i: 3.0 * math.exp(-5 * (1 - min(i / 8, 1)) ** 2),  # a ramp: 150 times its start
    "lr_subnets": lambda i: 0.01 * (1 - i / 20),
    "grad_norm_subnets": 2.0,
    "top_class_fusion": 0.9,
    "top_class_truth": 0.9,
}

# name of the rule, what makes it speak, what it must say, and the nearest thing that must leave it silent
TABLE = {
    "one_class": (
        {"train": logs(**HEALTHY | {"top_class_fusion": 1.0})},
        "fusion gave every pixel",
        [
            {"train": logs(**HEALTHY | {"top_class_fusion": 1.0, "top_class_truth": 0.999})},  # so is the truth
            {"train": logs(**HEALTHY | {"top_class_fusion": lambda i: 1.0 if i % 5 else 0.99})},  # now and then
            {"train": logs(range(20, 120, 20), **HEALTHY | {"top_class_fusion": 1.0}), "max_steps": 4000},  # the start
            {"train": logs(range(200, 220), **HEALTHY | {"top_class_fusion": 1.0})},  # 20 steps only
        ],
    ),
    "teacher_behind": (
        {"val": validations(*[0.8] * 6, sam=[0.1, 0.2, 0.3, 0.6, 0.6, 0.6])},
        "on validation sam has Dice 60.0 % and fusion 80.0 %",
        [
            {"val": validations(*[0.8] * 6, sam=[0.1, 0.1, 0.1, 0.72, 0.72, 0.72])},  # a little behind
            {"val": validations(*[0.8] * 4, sam=[0.1] * 4)},  # still early
            {"val": validations(*[0.8] * 6, sam=[0.1, 0.2, 0.3, 0.6, 0.9, 0.6])},  # not lasting
            {"val": validations(*[0.8] * 6)},  # no SAM
        ],
    ),
    "deployed_behind": (
        {"val": validations(*[0.1] * 6, unet=[0.1, 0.2, 0.3, 0.3, 0.3, 0.35], vnet=[0.3] * 6)},
        "on validation fusion, which is deployed, has Dice 10.0 % and unet 35.0 %",
        [
            {"val": validations(*[0.1] * 6, unet=[0.1, 0.2, 0.3, 0.3, 0.13, 0.35])},  # not lasting
            {"val": validations(*[0.1] * 4, unet=[0.3] * 4)},  # still early
            {"val": validations(*[0.5] * 6, unet=[0.535] * 6)},  # hardly behind
            {"val": validations(*[0.5] * 6, sam=[0.9] * 6)},  # SAM is no part of what is deployed
            {"val": validations(*[0.5] * 6)},  # nothing else was validated
        ],
    ),
    "stalled": (
        {"val": validations(0.2, 0.5, 0.6, *[0.6] * 5, every=40)},
        "has not risen since step 120 (best 60.0 %)",
        [
            {"val": validations(0.2, 0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, every=40)},
            {"val": validations(0.2, 0.5, *[0.6] * 8, every=40)},  # at the very end it helps nobody
            {"val": validations(0.2, 0.5, 0.6, *[0.6] * 4, every=40)},
        ],
    ),
    "falling": (
        {"val": validations(0.3, 0.7, 0.5, 0.4, 0.4)},
        "fallen from 70.0 % at step 100 to 40.0 %",
        [{"val": validations(0.3, 0.7, 0.5, 0.65, 0.4)}, {"val": validations(0.3, 0.7, 0.5)}],
    ),
    "exploding": (
        {"train": logs(**HEALTHY | {"mix_seg": lambda i: 0.5 if i < 17 else 0.5 * 5.0 ** (i - 16)})},
        "loss term mix_seg is 62.5; it was never above 0.5",
        [
            {"train": logs(**HEALTHY | {"mix_seg": lambda i: 0.5 + 0.4 * (i % 2)})},
            {"train": logs(**HEALTHY | {"mix_seg": lambda i: None if i < 12 else 9.0})},  # a term that has just begun
            {"train": logs(**HEALTHY | {"mix_seg": lambda i: 0.001 if i < 16 else 0.9})},  # small all the same
        ],
    ),
    "no_gradient": (
        {"train": logs(**HEALTHY | {"grad_norm_sam": lambda i: 1.0 if i < 18 else 0.0})},
        "the gradient of sam is exactly 0",
        [
            {"train": logs(**HEALTHY | {"grad_norm_sam": lambda i: 1.0 if i < 19 else 0.0})},
            {"train": logs(**HEALTHY | {"grad_norm_sam": None})},  # not finite, for once
        ],
    ),
    "no_rate": (
        {"train": logs(**HEALTHY | {"lr_sam": -1e-5}), "max_steps": 500},
        "the learning rate of sam (-1e-05) is not above 0 with 100 steps to go",
        [{"train": logs(**HEALTHY | {"lr_sam": 0.0}), "max_steps": 400}],
    ),
}


def history(train=(), val=(), max_steps=400, teachers=("sam", "teacher")):
    return History(max_steps, train, val, ("skd_unet", "mix_seg"), teachers)


@pytest.mark.parametrize("name", TABLE)
def test_each_rule_speaks_and_says_what_to_try(name):
    wrong, says, _ = TABLE[name]
    (finding,) = [f for f in findings(history(**wrong)) if f.name == name]
    assert says in finding.text and "Try: " in finding.text


@pytest.mark.parametrize(("name", "case"), [(n, i) for n, (_, _, silent) in TABLE.items() for i in range(len(silent))])
def test_each_rule_is_silent_where_it_should_be(name, case):
    assert name not in {f.name for f in findings(history(**TABLE[name][2][case]))}


def test_every_rule_is_in_the_table_and_healthy_numbers_raise_none():
    assert {rule.__name__ for rule in RULES} == set(TABLE)
    dice = [1 - 0.9**i for i in range(1, 9)]
    for end in range(1, 21):
        train, val = logs(**HEALTHY)[:end], validations(*dice, sam=[0.9 * d for d in dice])[: end // 3]
        assert findings(history(train, val)) == []
    assert findings(history()) == []


def test_nothing_found_at_all_is_said_early():
    (finding,) = findings(history(val=validations(0.0, 0.0, 0.001)))
    assert finding.name == "stalled" and "nothing is found at all" in finding.text


def test_any_teacher_may_be_behind_and_a_deployed_one_is_compared():
    """An average of the students is a teacher too, and it is what is deployed."""
    val = [{"step": 50 * i, "dice_average": 0.2, "dice_unet": 0.6, "dice_sam": 0.9} for i in range(1, 7)]
    found = {f.name: f.text for f in findings(history(val=val, teachers=("average", "sam")))}
    assert "on validation average has Dice 20.0 % and unet 60.0 %" in found["teacher_behind"]
    assert "average, which is deployed, has Dice 20.0 % and unet 60.0 %" in found["deployed_behind"]
    # Not a teacher of this run, whatever its name: its students are compared with each other.
    assert "teacher_behind" not in {f.name for f in findings(history(val=val, teachers=("sam",)))}


def test_a_teacher_behind_on_labelled_images_where_validation_leaves_it_out():
    numbers = HEALTHY | {"error_sam": 0.2, "error_unet": 0.05, "error_teacher": 0.01}
    (finding,) = findings(history(logs(**numbers), validations(0.5, 0.6)))
    assert finding.name == "teacher_behind" and "sam errs in 20.0 % of the pixels and unet in 5.0 %" in finding.text
    assert findings(history(logs(**numbers | {"error_sam": 0.11}), validations(0.5, 0.6))) == []


def test_a_warning_is_said_once_also_after_a_resume(tmp_path, capsys):
    dead = logs(**HEALTHY | {"grad_norm_sam": 0.0})
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for half in (dead[:10], dead[10:]):
            watcher = Watch(log, Progress(400), max_steps=400, records=read_metrics(tmp_path / "metrics.jsonl"))
            for record in half:
                values = {k: v for k, v in record.items() if k != "step"}
                log.write("train", record["step"], values)
                watcher.heed("train", record["step"], values)
    records = read_metrics(tmp_path / "metrics.jsonl")
    (warning,) = [r for r in records if r["kind"] == "warning"]
    assert (warning["step"], warning["name"]) == (40, "no_gradient")
    assert capsys.readouterr().out == f"warning at step 40: {warning['text']}\n"


def test_the_watch_forgets_old_logs_and_takes_numbers_that_are_not_finite(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        watcher = Watch(log, Progress(10**6), max_steps=10**6)
        for step in range(watch.REMEMBERED + 50):
            watcher.heed("train", step, {"loss": math.nan, "lr_subnets": 0.1, "grad_norm_subnets": math.inf}, ("x",))
    assert len(watcher.history.train) == watch.REMEMBERED
    assert not (tmp_path / "metrics.jsonl").exists()


def test_warnings_and_pictures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.warning(20, "stalled", "nothing rises. Try: sleep")
        log.picture("pictures", 20, np.full((5, 7, 3), 9, np.uint8))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (item,) = events.Tensors("warnings/stalled/text_summary")
    assert item.tensor_proto.string_val[0] == b"nothing rises. Try: sleep"
    (image,) = events.Images("pictures")
    assert (image.step, image.height, image.width) == (20, 5, 7)


# ---------------------------------------------------------------- numbers of a step


def one_hot(label, classes):
    return 8.0 * torch.nn.functional.one_hot(torch.as_tensor(label), classes).movedim(-1, 1).float()


def prediction(label, mask, classes):
    """One that saw the labelled images if it has as many rows more than ``mask``."""
    return Prediction(torch.zeros(len(label), 3, *label.shape[1:]), one_hot(label, classes), mask)


def test_a_teacher_of_students_that_saw_labelled_images_only():
    mask = torch.zeros(2, 4, 4, dtype=torch.long)
    teacher = prediction(torch.ones(1, 4, 4, dtype=torch.long), mask[:0], 2)
    out = StepOutput({}, {"unet": prediction(mask, mask, 2)}, views=Views({"teacher": teacher}))
    found = {name: value.item() for name, value in watch.label_statistics(out).items()}
    assert found == {"error_unet": 0.0, "top_class_teacher": 1.0, "top_class_truth": 1.0}


def test_label_statistics_against_counting():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (5, 8, 8), generator=generator)  # 2 labelled, 3 unlabelled
    mask = torch.randint(2, (2, 8, 8), generator=generator)
    teacher = torch.full((3, 8, 8), 2)
    predictions = {"unet": prediction(label, mask, 3), "lone": prediction(mask, mask, 3)}
    teachers = {"teacher": prediction(teacher, mask[:0], 3), "sam": prediction(label, mask, 3)}
    out = StepOutput({}, predictions, views=Views(teachers))
    found = {name: value.item() for name, value in watch.label_statistics(out).items()}
    share = max(Counter(label[2:].flatten().tolist()).values()) / label[2:].numel()
    wrong = sum(a != b for a, b in zip(label[:2].flatten().tolist(), mask.flatten().tolist(), strict=True)) / 128
    expected = {
        "top_class_unet": share,
        "error_unet": wrong,
        "error_lone": 0.0,
        "top_class_teacher": 1.0,
        "top_class_sam": share,
        "error_sam": wrong,
        "top_class_truth": max(Counter(mask.flatten().tolist()).values()) / 128,
    }
    assert found == pytest.approx(expected)


def test_statistics_of_a_method_that_reports_no_predictions():
    assert watch.label_statistics(StepOutput({})) == {}


def test_statistics_of_mixed_images_are_of_their_own_masks_where_these_are_true():
    """A method that predicts on mixed images is judged by the mixed mask, and where a label counts."""
    label = torch.zeros(2, 4, 4, dtype=torch.long)
    mixed = label.clone()
    mixed[:, :2] = 1
    shown = prediction(label, mixed, 2)
    assert watch.label_statistics(StepOutput({}, {"unet": shown}))["error_unet"].item() == 0.5
    shown.valid = mixed == 0
    assert watch.label_statistics(StepOutput({}, {"unet": shown}))["error_unet"].item() == 0.0
    shown.valid, mixed[:, 2:] = None, 255  # an ignored label is no error either
    assert watch.label_statistics(StepOutput({}, {"unet": shown}))["error_unet"].item() == 1.0


@pytest.mark.parametrize("words", [(), ("method.name=mean_teacher", "skd={weight: 1.0}")])
def test_norms_of_every_group_are_logged(lab, tmp_path, words):
    run = tmp_path / "run"
    assert lab.train(run, *words, "train.max_steps=3", "train.log_every=2") == 0
    train = [record for record in lab.metrics(run) if record["kind"] == "train"]
    assert [record["step"] for record in train] == [2, 3]
    for record in train:
        for group in ("subnets", "sam"):
            assert record[f"grad_norm_{group}"] > 0 and record[f"param_norm_{group}"] > 0
    state = lab.last(run)["method"]
    trained = [
        x for name, x in state.items() if name.startswith(("students.", "method.students.")) and "num_" not in name
    ]
    everything = math.sqrt(sum(float(x.double().pow(2).sum()) for x in trained if x.is_floating_point()))
    assert 0 < train[-1]["param_norm_subnets"] < everything  # the buffers are no parameters


def test_the_logged_gradient_norm_is_that_of_clipping(lab, tmp_path):
    """A bound that is never reached changes nothing, so both ways of measuring must agree."""
    for name, clip in (("measured", 0), ("clipped", 1e6)):
        assert lab.train(tmp_path / name, "train.max_steps=2", f"train.clip_norm={clip}") == 0
    norms = [
        [r[f"grad_norm_{g}"] for r in lab.metrics(tmp_path / name) if r["kind"] == "train" for g in ("subnets", "sam")]
        for name in ("measured", "clipped")
    ]
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-6)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    "words",
    [
        ("method={name: knowsam, mix: {start: 0.2}}",),
        ("method.name=mean_teacher",),
        ("method.name=supervised",),
        ("method.name=supervised", "data.unlabelled_batch=0"),
        ("method.name=mean_teacher", "skd={weight: 1.0}"),
    ],
    ids=["knowsam", "mean_teacher", "supervised", "no_unlabelled", "skd"],
)
def test_pictures_change_no_bit_and_are_bounded_files(lab, tmp_path, words):
    assert lab.train(tmp_path / "without", *words) == 0
    assert lab.train(tmp_path / "with", *words, "train.pictures_every=1", "train.tensorboard=true") == 0
    assert not (tmp_path / "without" / "pictures").exists()
    names = sorted(path.name for path in (tmp_path / "with" / "pictures").iterdir())
    assert names == [f"step-00000{step}.png" for step in (1, 2, 3, 4)]
    assert lab.differences(lab.outcome(tmp_path / "without"), lab.outcome(tmp_path / "with")) == []
    image = np.asarray(Image.open(tmp_path / "with" / "pictures" / "step-000004.png"))
    assert image.shape[2] == 3 and min(image.shape[:2]) > 300 and image.std() > 20


def test_a_resumed_run_draws_the_same_pictures(lab, tmp_path):
    words = ("train.pictures_every=2", "train.checkpoint_every=2")
    assert lab.train(tmp_path / "straight", *words) == 0
    assert lab.train(tmp_path / "resumed", *words, "--stop-at", "2") == 0
    assert lab.train(tmp_path / "resumed", *words) == 0
    for step in (2, 4):
        first, second = ((tmp_path / run / "pictures" / f"step-00000{step}.png") for run in ("straight", "resumed"))
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("every", "max_steps", "drawn"), [(100, 600, 6), (1, 600, 60), (7, 10_000, 64), (0, 50, 0)])
def test_the_number_of_pictures_is_bounded(tmp_path, every, max_steps, drawn):
    plan = pictures.Pictures(tmp_path, None, TrainOptions(max_steps, pictures_every=every, class_names=("a", "b")))
    steps = [step for step in range(1, max_steps + 1) if plan.due(step)]
    assert len(steps) <= pictures.MOST + 1 and abs(len(steps) - drawn) <= 1
    assert not steps or (steps[-1] == max_steps and steps[0] % every == 0)


def test_pictures_follow_validation_unless_told_otherwise(lab, tmp_path):
    from knowsam.build import train_options
    from knowsam.config import load_config

    for words, every in ((["train.pictures_every=null"], 4), (["train.pictures_every=3"], 3), ([], 0)):
        assert train_options(load_config(lab.experiment, words)).pictures_every == every
    assert lab.train(tmp_path / "run", "train.pictures_every=-1") == 78


def test_a_picture_that_cannot_be_drawn_or_written_stops_nothing(lab, tmp_path, capsys):
    run = tmp_path / "run"
    assert lab.train(run, "train.max_steps=1") == 0
    (run / "pictures").write_text("a file where the folder should be")
    assert lab.train(run, "train.max_steps=1", f"run={run}") == 0
    capsys.readouterr()
    log = MetricsLog(run, tensorboard=False)
    plan = pictures.Pictures(run / "pictures", log, TrainOptions(9, pictures_every=1, class_names=("a", "b")))
    image = torch.zeros(1, 3, 8, 8)
    batch = Batch(image, torch.zeros(1, 8, 8, dtype=torch.long), image, (image,))
    plan.draw(1, batch, StepOutput({}))
    assert "warning: no more pictures of training: FileExistsError" in capsys.readouterr().err
    assert not plan.due(2)


@pytest.fixture
def step():
    """A step of 3 classes with everything in it, on images of one grey."""
    label = torch.zeros(3, 16, 16, dtype=torch.long)
    label[:, 4:12, 4:12] = torch.tensor([1, 2, 1])[:, None, None]
    images = torch.full((3, 3, 16, 16), 0.5)
    batch = Batch(images[:1], label[:1], images[1:], (images[1:],))
    cells = torch.zeros(3, 16, 16, dtype=torch.bool)
    cells[:, :8, :8] = True
    mix = Mix(images, label, cells, ~cells, one_hot(label, 3))
    teachers = {
        "sam": Prediction(images, one_hot(label, 3), batch.mask),
        "teacher": Prediction(images[1:], one_hot(label[1:], 3), batch.mask[:0]),
    }
    views = Views(teachers, torch.full((3, 16, 16), 0.5), mix)
    return batch, StepOutput({}, {"unet": Prediction(images, one_hot(label, 3), batch.mask)}, views=views)


def test_the_sheet_shows_each_class_in_its_colour(step):
    batch, out = step
    sheet = np.asarray(pictures.draw_step(batch, out, class_names=["background", "x", "y"], heading="h"))
    grey = 127.5
    for k, some in ((1, 1000), (2, 1000)):
        mixed = [round(grey + pictures.OPACITY * (c - grey)) for c in pictures.class_colour(k)]
        assert (np.abs(sheet.astype(int) - mixed).max(-1) <= 1).sum() > some
    heat = pictures.heat_colours(np.array([[0.5]]))[0, 0]
    assert (sheet == heat).all(-1).sum() >= 3 * pictures.SIDE**2  # one map an image


def test_pixels_whose_label_does_not_count_are_dark(step):
    batch, out = step
    out.views.mix.valid[:] = False
    label = pictures.Panel("", np.full((16, 16, 3), 200, np.uint8), np.full((16, 16), -1)).render()
    assert label.max() < 100
    pictures.draw_step(batch, out, class_names=["background", "x", "y"])


def test_a_prediction_of_other_images_is_drawn_on_these(step):
    """Mixed images of a method: a row of their own, with the label that counted there."""
    batch, out = step
    plain = pictures.draw_step(batch, out, class_names=["background", "x", "y"])
    images, mask = torch.full((2, 3, 16, 16), 0.9), torch.full((2, 16, 16), 2)
    out.predictions["mixed"] = Prediction(images, one_hot(mask, 3), mask, torch.ones(2, 16, 16, dtype=torch.bool))
    more = pictures.draw_step(batch, out, class_names=["background", "x", "y"])
    assert more.height > plain.height + pictures.SIDE


def test_volumes_are_drawn_at_their_middle(step):
    batch, out = step

    def thick(x):
        return x.unsqueeze(-3).expand(*x.shape[:-2], 5, *x.shape[-2:])

    volume = Batch(thick(batch.labelled), thick(batch.mask), thick(batch.weak), tuple(map(thick, batch.strong)))
    shown = {n: Prediction(thick(p.images), thick(p.logits), volume.mask) for n, p in out.predictions.items()}
    sheet = pictures.draw_step(volume, StepOutput({}, shown), class_names=["background", "x", "y"])
    flat = pictures.draw_step(batch, StepOutput({}, out.predictions), class_names=["background", "x", "y"])
    assert np.array_equal(np.asarray(sheet), np.asarray(flat))


def test_colours_of_neighbouring_classes_differ_for_colour_blind_readers():
    """Luminance alone, or blue against yellow, tells any two of the first four apart."""
    for a in range(1, 5):
        for b in range(1, a):
            one, two = np.array(pictures.class_colour(a), float), np.array(pictures.class_colour(b), float)
            luminance = abs((one - two) @ [0.299, 0.587, 0.114])
            blueness = abs((one[2] - one[:2].mean()) - (two[2] - two[:2].mean()))
            assert luminance > 20 or blueness > 60, (a, b)


def test_names_too_long_for_their_place_are_cut(step):
    batch, out = step
    out.predictions["a_student_with_a_name_that_never_ends"] = out.predictions["unet"]
    names = ["background", *(f"a rather long class name {k}" for k in range(12))]
    short = pictures.draw_step(batch, out, class_names=names, heading="long heading " * 40)
    assert short.width == pictures.draw_step(batch, out, class_names=["background", "x"]).width


def test_a_method_of_ones_own_gets_pictures_of_its_predictions(lab, tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text(
        "from knowsam.methods.supervised import Supervised as Base\n"
        "from knowsam.methods.base import StepOutput\n"
        "class Plain(Base):\n"
        "    def __init__(self, students):\n"
        "        super().__init__(students)\n"
        "    def forward(self, batch, step):\n"
        "        out = super().forward(batch, step)\n"
        "        return StepOutput(out.losses, out.predictions if step else {})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    words = ("method={name: 'own_method:Plain'}", "train.pictures_every=1", "train.max_steps=2")
    assert lab.train(tmp_path / "run", *words) == 0
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 2

"""The benchmark measures what it says: the same work in both, steps of the loop, paired ratios."""

import json
from types import SimpleNamespace

import pytest
import torch

from knowsam.benchmark import show
from knowsam.benchmark.measure import paired_ratio, spread
from knowsam.benchmark.plain import PlainDecoder, PlainEncoder, PlainGuide, build_plain
from knowsam.benchmark.suites import _attention_flops, parts
from knowsam.benchmark.use import prediction
from knowsam.benchmark.worker import Stopwatch, Subject, Trainee
from knowsam.cli.benchmark import MIX, STEP, mixes, workload, workload_of
from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.models.dropout import Dropout
from knowsam.models.sam import build_sam_guide

SMALL = (
    "sam.train=[tuning,prompt]",
    "sam.tuning=[{name: adapter}]",
    "method.mix={start: 0.0}",
    "data.labelled_batch=1",
    "data.unlabelled_batch=1",
)
QUICK = "experiments/quickstart.yaml"


@pytest.mark.parametrize("side", [64, 256])
def test_the_baseline_computes_the_same(side):
    torch.manual_seed(0)
    options = {"tuning": {"name": "adapter", "zero_init": False}, "image_size": side, "num_classes": 3}
    ours, _ = build_sam_guide("vit_tiny", **options)
    plain, _ = build_sam_guide({"name": "vit_tiny", "encoder_type": PlainEncoder}, PlainDecoder, **options)
    plain.load_state_dict(ours.state_dict())
    for name, parameter in ours.named_parameters():
        if "rel_pos" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    plain.load_state_dict(ours.state_dict())
    ours.eval(), plain.eval()
    images, coarse = torch.rand(2, 3, side, side), torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode(images).image, ours.encode(images).image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plain(images, coarse), ours(images, coarse), rtol=1e-4, atol=1e-4)


def small(*words):
    return workload(load_config(QUICK, [*SMALL, *words]))


@pytest.mark.parametrize("encoder", ["{name: vit_tiny}", "{name: vit_tiny, checkpointing: true}"])
def test_the_baseline_has_plain_parts(encoder):
    method, optimizers = build_plain(small(f"sam.encoder={encoder}"))
    guide = method.sam_teacher.guide
    assert isinstance(guide, PlainGuide) and isinstance(guide.image_encoder, PlainEncoder)
    assert isinstance(guide.sam.mask_decoder, PlainDecoder)
    kernels = [p for p in method.students.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous() for p in kernels)
    for name in method.students.names:
        assert method.students.student(name).memory_format is torch.contiguous_format
    assert not any(isinstance(module, Dropout) for module in method.modules())
    assert not any(module.inplace for module in method.students.modules() if isinstance(module, torch.nn.LeakyReLU))
    assert not any(made.optimizer.defaults.get("fused") for made in optimizers.values())
    trained = {id(p) for group in method.trainable_groups().values() for p in group}
    assert trained == {id(p) for made in optimizers.values() for p in made.parameters}


def test_the_baseline_begins_with_the_same_weights():
    ours, (plain, _) = small().make_method(), build_plain(small())
    theirs = plain.state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_method_without_sam_has_a_baseline_too():
    method, optimizers = build_plain(workload(load_config(QUICK, ["method.name=mean_teacher"])))
    assert list(optimizers) == ["subnets"] and not any(isinstance(m, PlainEncoder) for m in method.modules())


@pytest.mark.parametrize(
    ("words", "mixed"),
    [([], False), (["method.mix={}"], True), (["method.mix={grid: 8}"], True), (["method.name=supervised"], False)],
)
def test_what_mixes_does_so_from_the_start(words, mixed):
    assert mixes(load_config(QUICK, [*STEP, *words])) == mixed
    if mixed:
        assert load_config(QUICK, [*STEP, MIX, *words]).method["mix"]["start"] == 0.0


def test_steps_are_counted_one_by_one_in_a_process_of_their_own():
    with Trainee(Subject("ours", QUICK, SMALL), workload_of) as trainee:
        facts = trainee.facts()
        assert facts["images"] == 2 and facts["threads"] == 1
        done = trainee.steps(2)
        assert len(done) == 2
        for step in done:
            assert 0 < sum(step["parts"].values()) <= step["seconds"]
            assert {"SAM encoder", "SAM decoder", "students", "losses", "backward", "optimizers"} <= set(step["parts"])
        assert trainee.memory()["host"] > 100 << 20
        assert trainee.steps(1, flops=True)[0]["flops"] > 1e9


def test_a_process_that_fails_is_told():
    broken = Subject("broken", QUICK, ("data.image_size=40", *SMALL))
    with Trainee(broken, workload_of) as trainee, pytest.raises(RuntimeError, match=r"(?s)broken: .*data\.image_size"):
        trainee.steps(1)


def test_nested_spans_count_for_themselves(monkeypatch):
    times = iter([0, 1, 2, 5, 9])
    monkeypatch.setattr("knowsam.benchmark.worker.time.perf_counter", lambda: next(times))
    watch = Stopwatch(lambda: None)  # 0
    watch.begin("outer")  # 1
    watch.begin("inner")  # 2
    watch.end("inner")  # 5
    watch.end("outer")  # 9
    assert watch.seconds == {"inner": 3, "outer": 5}


def test_attention_of_a_padded_grid_counts_real_tokens_only():
    guide, _ = build_sam_guide("vit_tiny", image_size=256)  # grid 16, windows of 14 in two blocks, global in two
    sides = [14, 2]
    windowed = sum((a * b) ** 2 for a in sides for b in sides)
    assert _attention_flops(guide.image_encoder, 3) == 3 * 12 * 96 * (2 * windowed + 2 * 256**2)


def test_parts_alone():
    found = parts(small(), torch.device("cpu"), repeats=1)
    assert [part["name"] for part in found] == ["SAM encoder", "SAM prompts and decoder", "students"]
    assert all(part["seconds"] > 0 and part["flops"] > 1e6 for part in found)


def test_prediction_and_evaluation_beside_the_network():
    turns: list[str] = []
    found = prediction(small(), torch.device("cpu"), repeats=2, images=5, batch_size=4, progress=turns.append)
    names = ["network alone", "predict", "evaluate, overlap alone", "evaluate, all metrics"]
    assert [row["name"] for row in found] == names and len(turns) == 2
    assert all(row["images_per_second"] > 0 for row in found)
    assert all(row["of_network"][1] <= row["of_network"][0] <= row["of_network"][2] for row in found[1:])
    assert "| predict " in show.prediction(found, 5)


def test_ratios_and_spreads():
    assert paired_ratio([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == (2.0, 1.0, 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)
    assert spread([1.0]) == 0
    with pytest.raises(ValueError, match="as many"):
        paired_ratio([1.0], [])


def test_the_command_writes_tables_and_json(tmp_path, capsys):
    words = [
        "step",
        "data",
        "--experiment",
        QUICK,
        "--threads",
        "1",
        "--repeats",
        "1",
        "--first",
        "train.precision=fp32",
    ]
    words += ["--compare", "train.precision=bf16", "--json", str(tmp_path / "b.json"), "--device", "cpu"]
    assert run_command("benchmark", words) == 0
    said = capsys.readouterr().out
    assert (
        "ceilings: matrix product" in said and "| train.precision=bf16" in said and "milliseconds of each part" in said
    )
    results = json.loads((tmp_path / "b.json").read_text())
    first, second = results["step"]
    assert second["faster"][0] == pytest.approx(first["seconds"][0] / second["seconds"][0])
    assert results["data"]["read and augmented"] > 0


def test_what_it_cannot_measure_is_refused(capsys):
    assert run_command("benchmark", ["speed"]) == 78
    assert "no suite 'speed'; there are step, parts" in capsys.readouterr().err
    assert run_command("benchmark", ["step", "--experiment", QUICK, "--compare", "train.precison=bf16"]) == 78
    assert "did you mean" in capsys.readouterr().err


def test_tables_are_markdown():
    assert show.table(["a", "b"], [["1", "22"], ["333", "4"]]).splitlines() == [
        "| a   | b  |",
        "|-----|----|",
        "| 1   | 22 |",
        "| 333 | 4  |",
    ]


def test_a_step_of_an_experiment_is_timed_without_a_run(lab, tmp_path, monkeypatch):
    from knowsam.benchmark import step

    monkeypatch.chdir(tmp_path)
    clock = iter(range(100))
    monkeypatch.setattr(step, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timed = workload(load_config(lab.experiment, ["method={name: supervised}"]))
    assert step.step_seconds(timed) == 1.0  # the clock ticks once between the begin and the end of a step
    assert next(clock) == 2 * (2 + len(step.MOMENTS)) and not list(tmp_path.iterdir())

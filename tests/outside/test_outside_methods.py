"""Eight methods from outside the package, each with and without SKD: trained, resumed, replicated, exported."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
METHODS = {
    "cps": "CPS",
    "fixmatch": "FixMatch",
    "unimatch": "UniMatch",
    "urpc": "URPC",
    "dan": "DAN",
    "bcp": "BCP",
    "semisam": "SemiSAM",
    "cpcsam": "CPCSAM",
}
EXPERIMENT = """
name: outside
data:
  source: {name: builtin, train: 12, val: 2, test: 2, size: 32}
  labelled: labelled_50pct
  classes: [background, a]
  image_size: 32
  labelled_batch: 2
  unlabelled_batch: 2
sam: {encoder: {name: vit_tiny}, tuning: [{name: adapter, ratio: 0.1}]}
optim:
  subnets: {name: adamw, lr: 1e-3}
  sam: {name: adam, lr: 1e-3}
train:
  max_steps: 8
  device: cpu
  validate_every: 4
  checkpoint_every: 4
  log_every: 1
  tensorboard: false
  pictures_every: 4
"""
CASES = [(module, skd) for module in METHODS for skd in (False, True)]
every_case = pytest.mark.parametrize(("module", "skd"), CASES, ids=[m + ("+skd" if s else "") for m, s in CASES])


@pytest.fixture(scope="module", autouse=True)
def outside_lab():
    """The package of methods on the Python path, as PYTHONPATH would put it there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("outside") / "outside.yaml"
    path.write_text(EXPERIMENT, encoding="utf-8")
    return path


def words(experiment, run, module, skd, *more):
    name = f"outside_lab.{module}:{METHODS[module]}"
    options = ", confidence_threshold: 0.0" if module in ("fixmatch", "unimatch") else ""  # random networks are unsure
    method = f"method={{name: '{name}'{options}}}"
    return [str(experiment), f"run={run}", method, *(["skd={weight: 1.0, rampup: 0.0}"] if skd else []), *more]


def train(*arguments):
    from knowsam.cli.main import run_command

    return run_command("train", words(*arguments))


@pytest.fixture(scope="module")
def straight(experiment, tmp_path_factory, lab):
    """Run folder of the uninterrupted run of a case, trained once."""
    done = {}

    def run_of(module, skd):
        if (module, skd) not in done:
            run = tmp_path_factory.mktemp(module) / "run"
            assert train(experiment, run, module, skd) == 0
            done[module, skd] = run
        return done[module, skd]

    return run_of


@pytest.mark.parametrize(
    ("module", "skd"),
    [pytest.param(m, s, marks=[pytest.mark.slow] if s and m not in ("bcp", "cpcsam") else []) for m, s in CASES],
    ids=[m + ("+skd" if s else "") for m, s in CASES],
)
def test_trains_and_resumes_bit_for_bit(experiment, straight, tmp_path, lab, module, skd):
    whole, run = straight(module, skd), tmp_path / "run"
    for stop in ("2", "3"):  # BCP's second phase begins with step 2: at the border, and after it
        assert train(experiment, run, module, skd, "--stop-at", stop) == 0
        assert lab.last(run)["step"] == int(stop)
    assert train(experiment, run, module, skd) == 0
    assert lab.differences(lab.outcome(whole), lab.outcome(run)) == []
    records = [r for r in lab.metrics(whole) if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 9))
    assert any(name.startswith("skd_") for name in records[-1]) is skd
    groups = {name.removeprefix("lr_") for name in records[-1] if name.startswith("lr_")}
    assert groups == {
        *(() if module == "cpcsam" else ("subnets",)),
        *(("sam",) if skd or module in ("semisam", "cpcsam") else ()),
        *(("discriminator",) if module == "dan" else ()),
    }
    before, after = lab.last(whole)["method"], initial(experiment, module, skd)
    learned = {key.split(".")[0 if not skd else 1] for key, x in after.items() if not torch.equal(x, before[key])}
    assert learned - {"sam_teacher"}, "nothing of the method moved"
    assert (run / "pictures" / "step-000008.png").exists()


def initial(experiment, module, skd):
    from knowsam import build
    from knowsam.config import load_config

    arguments = words(experiment, "none", module, skd)
    return build.build_method(load_config(arguments[0], arguments[1:])).method.state_dict()


def test_a_phase_restarts_what_it_says(straight, lab):
    """BCP: rates run over each phase anew, the teacher begins as a copy, momenta are forgotten."""
    records = {r["step"]: r for r in lab.metrics(straight("bcp", False)) if r["kind"] == "train"}
    rates = [records[step]["lr_subnets"] for step in range(1, 9)]
    assert rates[:2] == pytest.approx([1e-3, 0.5e-3])
    assert rates[2:] == pytest.approx([1e-3 * (1 - t / 6) for t in range(6)])
    steps = {int(x["step"]) for x in lab.last(straight("bcp", False))["optimizers"]["subnets"]["state"].values()}
    assert steps == {6}


@every_case
def test_deployed_networks_are_exported(straight, tmp_path, module, skd):
    from knowsam.cli.main import run_command

    file = tmp_path / "network.pt"
    arguments = ["export", str(straight(module, skd)), "--format", "torchscript", "-o", str(file)]
    assert run_command(arguments[0], arguments[1:]) == 0
    with torch.no_grad():
        probabilities = torch.jit.load(file)(torch.rand(1, 3, 32, 32))
    assert probabilities.shape == (1, 2, 32, 32) and torch.allclose(probabilities.sum(1), torch.ones(1, 32, 32))


LAUNCHED = """
import json, os, sys

sys.path[:0] = [sys.argv[1], sys.argv[2]]
from knowsam.cli import main as cli
from knowsam.engine import distributed

cli.RANK_ZERO_HEAD_START = 0.0
teardown, distributed.teardown = distributed.teardown, lambda: None  # joined once, for every experiment
compare, compared = distributed.replicas_equal, []
distributed.replicas_equal = lambda module, **options: compared.append(compare(module, **options)) or compared[-1]
record = {}
for name, words in json.load(open(sys.argv[3])).items():
    compared.clear()
    record[name] = {"code": cli.run_command("train", words), "compared": list(compared)}
with open(f"{sys.argv[3]}.rank{os.environ['RANK']}", "w") as file:
    json.dump(record, file)
teardown()
"""


@pytest.fixture(scope="module")
def launched(experiment, tmp_path_factory, lab):
    """What each rank recorded of every case, all trained by one launch of two processes."""
    top = tmp_path_factory.mktemp("launched")
    (top / "launched.py").write_text(LAUNCHED)
    steps = ("train.max_steps=4", "train.checkpoint_every=2", "train.pictures_every=0")
    plans = {f"{m}+skd" if s else m: words(experiment, top / f"{m}_{s}", m, s, *steps) for m, s in CASES}
    (top / "plans.json").write_text(json.dumps(plans))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [str(top / "launched.py"), str(lab.root), str(HERE), str(top / "plans.json")]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((top / f"plans.json.rank{rank}").read_text()) for rank in (0, 1)]


@every_case
def test_two_processes_end_equal(launched, module, skd):
    for record in launched:
        assert record[f"{module}+skd" if skd else module] == {"code": 0, "compared": [[], []]}


@pytest.mark.parametrize("module", METHODS)
def test_keeps_the_contract_with_any_number_of_classes(module, capsys):
    from knowsam.cli.main import run_command

    code = run_command(
        "check-method",
        [f"outside_lab.{module}:{METHODS[module]}", "--classes", "2,4", "--skd", "--image-size", "32"],
    )
    assert code == 0
    assert capsys.readouterr().out.count("keeps the contract") == 4


def test_a_method_is_a_screenful():
    lengths = [
        sum(bool(line.strip()) for line in (HERE / "outside_lab" / f"{module}.py").read_text().splitlines())
        for module in METHODS
    ]
    assert statistics.median(lengths) <= 35, lengths

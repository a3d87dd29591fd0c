"""The doctor finds what is broken, says what to do, and survives what it examines."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knowsam import doctor
from knowsam.cli.doctor import wanted_by
from knowsam.cli.main import run_command
from knowsam.config import load_config
from knowsam.doctor import BROKEN, LOOK, OK

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """Imports that are not really done, and folders of the test's own."""
    monkeypatch.setattr(doctor, "import_all", lambda modules: [*({"module": m} for m in modules), CPU])
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


CPU = {"threads": 1, "cuda_build": ""}


def levels(findings, area=None):
    return [finding.level for finding in findings if area in (None, finding.area)]


def test_a_healthy_machine_is_zero_and_each_finding_that_is_not_ok_says_what_to_do(healthy, capsys):
    assert run_command("doctor", []) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok      python     Python 3.") for line in lines)
    assert lines[-1].startswith("nothing broken, ")
    for line, following in itertools.pairwise(lines):
        if line.startswith(("look", "broken")):
            assert following.strip().startswith("-> ")
    assert run_command("doctor", ["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == 0
    assert {"python", "knowsam", "packages", "device", "threads", "runs", "cache", "tmp", "data", "weights"} <= {
        finding["area"] for finding in report["findings"]
    }
    for finding in report["findings"]:
        assert set(finding) == {"area", "level", "text", "advice"}
        assert bool(finding["advice"]) == (finding["level"] != OK), finding


def test_the_requirements_are_those_of_the_package():
    found = doctor.requirements()
    assert found["torch"].startswith(">=") and found["segment-anything"] == "==1.0" and found["numpy"] == ""
    assert "timm" not in found and "pytest" not in found


def test_requirements_without_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "knowsam").mkdir()
    monkeypatch.setattr(doctor.knowsam, "__file__", str(tmp_path / "knowsam" / "__init__.py"))
    lines = ["torch>=2.8", "pyyaml", "timm ; extra == 'encoders'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    assert doctor.requirements() == {"torch": ">=2.8", "pyyaml": ""}


@pytest.mark.parametrize(
    ("versions", "errors", "area", "level", "says"),
    [
        ({"h5py": ""}, {}, "h5py", BROKEN, "pip install 'h5py'"),
        ({"torch": "2.7.1"}, {}, "torch", BROKEN, "2.7.1; needed is >=2.8"),
        ({}, {"monai": "ImportError: gone"}, "monai", BROKEN, "cannot be imported: ImportError: gone"),
        (
            {},
            {"torch.utils.tensorboard": "ModuleNotFoundError: No module named 'pkg_resources'"},
            "tensorboard",
            BROKEN,
            "tensorboard>=2.21",
        ),
        (
            {},
            {"h5py": "ImportError: A module that was compiled using NumPy 1.x cannot be run in NumPy 2"},
            "h5py",
            BROKEN,
            "built for another numpy",
        ),
        (
            {"torchvision": "0.28.0"},
            {"torchvision": "RuntimeError: operator torchvision::nms does not exist"},
            "torchvision",
            LOOK,
            "knowsam works without torchvision",
        ),
        (
            {"opencv-python": "4.13", "opencv-python-headless": "4.13"},
            {},
            "opencv",
            LOOK,
            "overwrite each other's files",
        ),
    ],
)
def test_packages_that_fight(monkeypatch, versions, errors, area, level, says):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions[name] if name in versions else real(name))
    probe = lambda modules: [*({"module": m, "error": errors.get(m, "")} for m in modules), CPU]  # noqa: E731
    findings = list(doctor.check_packages(probe))
    (found,) = [finding for finding in findings if finding.area == area]
    assert found.level == level and says in found.text + found.advice and found.advice
    assert levels(findings).count(BROKEN) == (level == BROKEN)


def test_imports_are_tried_in_a_process_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "fine_module.py").write_text("")
    (tmp_path / "raising_module.py").write_text("raise RuntimeError('built for another torch')")
    (tmp_path / "crashing_module.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.syspath_prepend(tmp_path)
    records = doctor.import_all(["fine_module", "raising_module", "crashing_module", "never_reached"])
    told = {record["module"]: record.get("error", "") for record in records if "module" in record}
    assert told == {
        "fine_module": "",
        "raising_module": "RuntimeError: built for another torch",
        "crashing_module": "Python ended with code -9",
    }


@pytest.mark.parametrize(
    ("records", "level", "says"),
    [
        ([CPU], OK, "CPU only"),
        ([{"threads": 1, "cuda_build": "13.0"}], LOOK, "built for CUDA 13.0 but sees no device"),
        (
            [
                {"threads": 1, "cuda_build": "13.0"},
                {"device": 0, "name": "Old", "memory": 8 * 2**30, "error": "RuntimeError: no kernel image"},
            ],
            BROKEN,
            "no kernel image",
        ),
        (
            [
                {"threads": 1, "cuda_build": "13.0"},
                {"device": 0, "name": "New", "memory": 8 * 2**30, "works": True, "bf16": True},
            ],
            OK,
            "cuda:0 New, 8 GiB",
        ),
    ],
)
def test_devices(records, level, says):
    (found,) = [finding for finding in doctor._devices(records) if finding.area == "device"]
    assert found.level == level and says in found.text


def test_too_many_threads():
    (found,) = [f for f in doctor._devices([{"threads": 4096, "cuda_build": ""}]) if f.area == "threads"]
    assert found.level == LOOK and "train.threads=" in found.advice


@pytest.mark.parametrize(
    ("flags", "level"), [("fpu avx2 avx512f", LOOK), ("fpu avx512_bf16", OK), ("fpu amx_bf16 avx2", OK)]
)
def test_bf16(tmp_path, flags, level):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert levels(doctor.check_processor(tmp_path / "cpuinfo")) == [level]
    assert levels(doctor.check_processor(tmp_path / "absent")) == []


def test_memory_and_shared_memory(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 8000000 kB\nMemAvailable: 1000000 kB\n")
    usage = shutil._ntuple_diskusage(total=64 * 10**6, used=0, free=64 * 10**6)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    findings = list(doctor.check_memory(tmp_path / "meminfo", tmp_path))
    assert levels(findings) == [LOOK, LOOK] and "--shm-size" in findings[1].advice
    assert list(doctor.check_memory(tmp_path / "absent", tmp_path / "absent")) == []


@pytest.mark.parametrize(("free", "level"), [(10**8, BROKEN), (10**9, LOOK), (10**11, OK)])
def test_disks(healthy, monkeypatch, free, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 0, free))
    assert levels(doctor.check_disks()) == [level] * 3


def test_a_folder_that_is_a_file(healthy, monkeypatch):
    (healthy / "file").write_text("")
    monkeypatch.setenv("KNOWSAM_CACHE", str(healthy / "file" / "cache"))
    assert levels(doctor.check_disks(), "cache") == [BROKEN]


def test_an_experiment_whose_data_and_weights_are_absent_is_broken(healthy, capsys):
    experiment = str(ROOT / "experiments" / "kvasir_10pct.yaml")
    assert run_command("doctor", [experiment]) == 1
    said = capsys.readouterr().out
    assert "broken  data       kvasir_seg: not here" in said
    assert "broken  weights    weights/sam_vit_b_01ec64.pth: not here" in said
    (healthy / "kvasir_seg").mkdir()
    (healthy / "weights").mkdir()
    wanted = wanted_by(load_config(experiment))
    with (healthy / "weights" / "sam_vit_b_01ec64.pth").open("wb") as file:
        file.truncate(375_042_383)  # of the right size, which is all that is looked at here
        assert levels(doctor.check_data(wanted)) == [OK, OK]
        file.truncate(1000)
    assert levels(doctor.check_data(wanted), "weights") == [BROKEN]


def test_the_quickstart_needs_nothing(healthy):
    assert list(doctor.check_data(wanted_by(load_config(ROOT / "experiments" / "quickstart.yaml")))) == []


def test_no_such_experiment(healthy, capsys):
    assert run_command("doctor", ["nowhere.yaml"]) == 66


def test_the_command_itself_on_this_machine():
    """The real imports, all of them: the environment of the tests must be healthy."""
    tool = str(ROOT / "tools" / "doctor.py")
    done = subprocess.run([sys.executable, tool, "--json"], capture_output=True, text=True, timeout=400)
    report = json.loads(done.stdout)
    assert not [
        finding
        for finding in report["findings"]
        if finding["area"] in ("packages", "device") and finding["level"] == BROKEN
    ]
    assert done.returncode == (1 if report["broken"] else 0)

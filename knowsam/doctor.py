"""What would stop or slow a training on this machine, and what to do about it."""

import configparser
import importlib.metadata as metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import knowsam

OK, LOOK, BROKEN = "ok", "look", "broken"

GIGABYTE = 10**9
ROOMY = 5 * GIGABYTE
"""Free disk below which a training may run out of it: checkpoints, decoded cache."""

# Distribution -> module, where they have different names; torch.utils.tensorboard is what writes events.
MODULES = {
    "segment-anything": "knowsam.models.sam",
    "pyyaml": "yaml",
    "pillow": "PIL.Image",
    "scikit-image": "skimage",
    "tensorboard": "torch.utils.tensorboard",
}
# Not needed, but each can break what is beside it.
OPTIONAL = {"torchvision": "torchvision", "timm": "timm", "opencv-python": "cv2", "opencv-python-headless": "cv2"}
ADVICE = {
    "torchvision": "knowsam works without torchvision. What else uses it needs the build made for this torch: install "
    "both from the same index, or pip uninstall torchvision.",
    "timm": "timm imports torchvision: install the build made for this torch. knowsam's own networks do not need it.",
    "tensorboard": "pip install 'tensorboard>=2.21' (older ones need pkg_resources, which new setuptools lack), or "
    "train with train.tensorboard=false.",
    "numpy": "It was built for another numpy and must be installed anew: pip install --force-reinstall --no-deps, and "
    "its name.",
}

# Runs in a process of its own: an import that crashes Python would otherwise take the doctor along.
_IMPORT_ALL = """
import importlib, json, sys, warnings
warnings.simplefilter("ignore")
def report(**record):
    print("@" + json.dumps(record), flush=True)
for name in sys.argv[1:]:
    report(begin=name)
    try:
        importlib.import_module(name)
        report(module=name)
    except BaseException as error:
        report(module=name, error=f"{type(error).__name__}: {error}"[:400])
try:
    import torch
    report(threads=torch.get_num_threads(), cuda_build=torch.version.cuda or "")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        record = {"device": i, "name": about.name, "memory": about.total_memory}
        try:
            x = torch.ones(64, 64, device=f"cuda:{i}")
            record["works"] = float((x @ x).sum()) == 64.0**3
            record["bf16"] = torch.cuda.is_bf16_supported()
        except BaseException as error:
            record["error"] = f"{type(error).__name__}: {error}"[:400]
        report(**record)
except BaseException:
    pass  # reported above
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        area: what it is about, in short.
        level: ``ok``, ``look`` or ``broken``.
        text: what was found.
        advice: what to do; empty if nothing.
    """

    area: str
    level: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Wanted:
    """What an experiment must find on this machine.

    Attributes:
        datasets: folder, absolute or below those of the datasets -> how to obtain it; empty if nobody says.
        weights: SAM's files, absolute, below the working folder or below the datasets.
    """

    datasets: Mapping[str, str]
    weights: Sequence[str] = ()


def examine(wanted: Wanted | None = None) -> Iterator[Finding]:
    """Everything that is looked at, one finding after the other.

    Args:
        wanted: of the experiment that is to run here; None: what is absent is no fault.
    """
    yield from check_versions()
    yield from check_packages()
    yield from check_processor()
    yield from check_memory()
    yield from check_disks()
    yield from check_data(wanted)


def check_versions() -> Iterator[Finding]:
    """Python, knowsam and its commit."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    old = sys.version_info < (3, 11)
    yield Finding("python", BROKEN if old else OK, text, "knowsam needs Python 3.11 or newer." if old else "")
    checkout = Path(knowsam.__file__).parents[1]
    commit = _command("git", "-C", str(checkout), "rev-parse", "--short", "HEAD") if _is_checkout(checkout) else ""
    changed = commit and _command("git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=no")
    state = f", commit {commit}{' with changes' if changed else ''}" if commit else ""
    yield Finding("knowsam", OK, f"{knowsam.__version__}{state}, {Path(knowsam.__file__).parent}")


def check_packages(probe: Callable[[list[str]], list[dict[str, Any]]] | None = None) -> Iterator[Finding]:
    """What knowsam requires: there, new enough, and it can be imported; and the devices that torch sees.

    Args:
        probe: module names -> records of the child process; for tests.
    """
    required = requirements()
    optional = {name: module for name, module in OPTIONAL.items() if _version(name)}
    modules = {name: MODULES.get(name, name.replace("-", "_")) for name in required} | optional
    present = [module for name, module in modules.items() if _version(name)]
    records = (probe or import_all)(list(dict.fromkeys(present)))
    errors = {record["module"]: record.get("error", "") for record in records if "module" in record}
    fine = []
    for name, specifier in required.items():
        version = _version(name)
        if not version:
            yield Finding(name, BROKEN, "is not installed", f"pip install '{name}{specifier}'")
        elif not _satisfies(version, specifier):
            yield Finding(name, BROKEN, f"{version}; needed is {specifier}", f"pip install '{name}{specifier}'")
        elif error := errors.get(modules[name], ""):
            yield Finding(name, BROKEN, f"{version} cannot be imported: {error}", _advice(name, error))
        else:
            fine.append(f"{name} {version}")
    if fine:
        yield Finding("packages", OK, ", ".join(fine))
    for name, module in optional.items():
        if error := errors.get(module, ""):
            yield Finding(name, LOOK, f"{_version(name)} cannot be imported: {error}", ADVICE.get(name, ""))
    if all(name in optional for name in ("opencv-python", "opencv-python-headless")):
        text = "opencv-python and opencv-python-headless are both installed; they overwrite each other's files"
        yield Finding("opencv", LOOK, text, "pip uninstall both, then install one.")
    yield from _devices(records)


def import_all(modules: list[str]) -> list[dict[str, Any]]:
    """Import modules in a process of their own; what became of each, and what torch says of this machine."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT_ALL, *modules],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(knowsam.__file__).parents[1]), *sys.path])},
            check=False,
        )
        lines, ended = done.stdout.splitlines(), f"Python ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        lines, ended = output.decode(errors="replace").splitlines(), "takes more than 5 minutes"
    records = [json.loads(line[1:]) for line in lines if line.startswith("@")]
    begun = [record["begin"] for record in records if "begin" in record]
    finished = {record["module"] for record in records if "module" in record}
    return records + [{"module": name, "error": ended} for name in begun if name not in finished]


def _devices(records: list[dict[str, Any]]) -> Iterator[Finding]:
    about = next((record for record in records if "threads" in record), None)
    if about is None:
        return
    devices = [record for record in records if "device" in record]
    for record in devices:
        text = f"cuda:{record['device']} {record['name']}, {record['memory'] / 2**30:.0f} GiB"
        if record.get("works"):
            bf16 = "" if record.get("bf16") else "; no bf16, use train.precision=fp16"
            yield Finding("device", OK, text + bf16)
        else:
            advice = "Is this torch built for this card and its driver? pytorch.org tells which build to install."
            yield Finding("device", BROKEN, f"{text}: {record.get('error', 'computes wrongly')}", advice)
    if not devices and about["cuda_build"]:
        text = f"torch is built for CUDA {about['cuda_build']} but sees no device"
        yield Finding("device", LOOK, text, "nvidia-smi tells whether there is a driver; in a container: --gpus all.")
    elif not devices:
        yield Finding("device", OK, "CPU only (this torch is built without CUDA)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"torch uses {about['threads']} threads on {cores} cores"
    too_many = about["threads"] > cores
    yield Finding("threads", LOOK if too_many else OK, text, f"Set train.threads={cores}." if too_many else "")


def check_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    """Whether bf16 is fast on this CPU."""
    try:
        flags = set(next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return  # not Linux, or not x86
    fast = sorted(flags & {"avx512_bf16", "amx_bf16"})
    if fast:
        yield Finding("bf16", OK, f"fast on this CPU ({', '.join(fast)})")
    else:
        advice = "On the CPU train with train.precision=fp32."
        yield Finding("bf16", LOOK, "this CPU has neither avx512_bf16 nor amx_bf16: bf16 is slower than fp32", advice)


def check_memory(meminfo: Path = Path("/proc/meminfo"), shm: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Main memory, and the shared memory that loader processes pass batches through.

    Args:
        meminfo: the system's own account.
        shm: where shared memory is mounted.
    """
    try:
        values = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        available = int(values["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        available = None
    if available is not None:
        low = available < 4 * GIGABYTE
        advice = "Lower data.labelled_batch, data.unlabelled_batch and data.workers." if low else ""
        yield Finding("memory", LOOK if low else OK, f"{available / GIGABYTE:.1f} GB available", advice)
    if shm.is_dir():
        usage = shutil.disk_usage(shm)
        low = usage.free < GIGABYTE
        advice = "Loader processes may die: data.workers=0, or start the container with --shm-size=2g." if low else ""
        text = f"{shm}: {usage.free / GIGABYTE:.1f} of {usage.total / GIGABYTE:.1f} GB free"
        yield Finding("shm", LOOK if low else OK, text, advice)


def check_disks() -> Iterator[Finding]:
    """Room and rights where runs, the decoded cache and temporary files go."""
    cache = Path(os.environ.get("KNOWSAM_CACHE") or Path.home() / ".cache" / "knowsam")
    for name, folder, move in (
        ("runs", Path("runs"), "Write elsewhere with run=FOLDER"),
        ("cache", cache, "Set KNOWSAM_CACHE to a folder on another disk"),
        ("tmp", Path(tempfile.gettempdir()), "Set TMPDIR to a folder on another disk"),
    ):
        folder = folder.absolute()
        there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Finding(name, BROKEN, f"{there} may not be written", f"{move}, or mend its rights.")
            continue
        free = shutil.disk_usage(there).free
        level = OK if free >= ROOMY else LOOK if free >= ROOMY / 10 else BROKEN
        advice = "" if level == OK else f"{move}, or free some space."
        yield Finding(name, level, f"{folder}: {free / GIGABYTE:.1f} GB free", advice)


def check_data(wanted: Wanted | None = None) -> Iterator[Finding]:
    """Datasets and SAM's weights: those of one experiment, or of all that are shipped.

    Args:
        wanted: of one experiment; None: datasets of the shipped ones and published weights, whose absence is no fault.
    """
    # Here, as what these import may be what is missing; the findings about packages have been given by now.
    from knowsam.config import REPOSITORY, data_places, load_config
    from knowsam.errors import KnowsamError
    from knowsam.pretrained import WEIGHTS, find, megabytes

    datasets = dict(wanted.datasets) if wanted is not None else {}
    if wanted is None:
        for path in sorted((REPOSITORY / "experiments").glob("*.yaml")):
            try:
                data = load_config(path).data
            except KnowsamError as error:
                yield Finding("experiment", BROKEN, f"{path}: {error}", error.hint)
                continue
            if root := data.source.get("root"):
                datasets[root] = data.obtain
    absent = LOOK if wanted is None else BROKEN
    for root, obtain in datasets.items():
        found = next((place for place in _places(root, data_places, here=False) if place.is_dir()), None)
        advice = "" if found else obtain or "Put it below data/, or set KNOWSAM_DATA to the folder that holds it."
        yield Finding("data", OK if found else absent, f"{root}: {found or 'not here'}", advice)
    for weights in () if wanted is None else wanted.weights:
        if not any(place.is_file() for place in _places(weights, data_places)):
            advice = "knowsam weights fetch, or sam.weights=null to train SAM from random weights."
            yield Finding("weights", absent, f"{weights}: not here", advice)
    here = [(entry, file) for entry in WEIGHTS.values() if (file := find(entry, data_places("weights")))]
    for entry, path in here:
        right = path.stat().st_size == entry.size
        text = f"{path}, {megabytes(path.stat().st_size)}" + ("" if right else f" instead of {megabytes(entry.size)}")
        advice = "" if right else f"Move it away, then: knowsam weights fetch {entry.name}"
        yield Finding("weights", OK if right else BROKEN, text, advice)
    if not here and wanted is None:
        yield Finding("weights", LOOK, "none of SAM's published files is here", "knowsam weights fetch vit_b")


def requirements() -> dict[str, str]:
    """Distribution -> version specifier of everything that knowsam requires, extras left out."""
    setup = Path(knowsam.__file__).parents[1] / "setup.cfg"
    if setup.is_file():
        parser = configparser.ConfigParser()
        parser.read(setup, encoding="utf-8")
        lines = parser.get("options", "install_requires", fallback="").split("\n")
    else:
        try:
            lines = [line for line in metadata.requires("knowsam") or [] if "extra ==" not in line]
        except metadata.PackageNotFoundError:
            lines = []
    found = {}
    for line in filter(None, (line.partition(";")[0].replace(" ", "") for line in lines)):
        cut = next((i for i, char in enumerate(line) if char in "<>=!~"), len(line))
        found[line[:cut].lower()] = line[cut:]
    return found


def _places(name: str, below: Callable[[str], list[Path]], *, here: bool = True) -> list[Path]:
    """Where build.py looks; weights also in the working folder itself."""
    if Path(name).is_absolute():
        return [Path(name)]
    return [*([Path(name)] if here else []), *below(name)]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _satisfies(version: str, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True  # cannot be judged, and an import that fails is reported anyway
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _advice(name: str, error: str) -> str:
    if "pkg_resources" in error:
        return ADVICE["tensorboard"]
    if "numpy" in error.lower() and name != "numpy":
        return ADVICE["numpy"]
    return ADVICE.get(name, f"pip install --force-reinstall {name}")


def _is_checkout(folder: Path) -> bool:
    return (folder / ".git").exists()  # installed: an enclosing repository would be somebody else's


def _command(*arguments: str) -> str:
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

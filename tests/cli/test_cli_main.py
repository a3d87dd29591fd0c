"""The command line: quick help, messages without tracebacks, exit codes."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

from knowsam.cli import main as cli
from knowsam.errors import CheckpointError, ConfigError, DataError, RunFolderError, StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(monkeypatch):
    """A command ``fake`` that raises what it is given."""

    def install(outcome=None):
        def run(args):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.ModuleType("fake_command")
        module.add_arguments = lambda parser: parser.add_argument("words", nargs="*")
        module.run = run
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", "for this test"))

    return install


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (0, 0),
        (None, 0),
        (75, 75),
        (ConfigError("x"), 78),
        (DataError("x"), 65),
        (CheckpointError("x"), 80),
        (StorageError("x"), 74),
        (RunFolderError("x"), 73),
        (KeyboardInterrupt(), 130),
        (RuntimeError("bug"), 70),
        (SystemExit(3), 3),
    ],
)
def test_exit_codes(command, capsys, outcome, code):
    command(outcome)
    assert cli.main(["fake", "a=1"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 70)


def test_message_and_hint(command, capsys):
    command(ConfigError("unknown key 'lrr'", hint="Did you mean 'lr'?"))
    assert cli.run_command("fake", []) == 78
    assert capsys.readouterr() == ("", "error[config]: unknown key 'lrr'\nhint: Did you mean 'lr'?\n")


def test_wrong_usage(command, capsys):
    command(0)
    assert cli.main(["fake", "--nonsense"]) == 2
    assert cli.main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert cli.main([]) == 0


def test_other_ranks_leave_the_telling_to_rank_zero(command, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli, "RANK_ZERO_HEAD_START", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    reported = DataError("split is empty")
    reported.reported_by_main = True
    command(reported)
    assert cli.main(["fake"]) == 65
    assert capsys.readouterr().err == ""
    command(DataError("only here"))
    assert cli.main(["fake"]) == 65
    assert capsys.readouterr().err == "error[data]: rank 1: only here\n"


@pytest.mark.parametrize("words", [["--help"], ["trian"], ["--version"]])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys; from knowsam.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'monai', 'omegaconf', 'kornia', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=ROOT)


def test_module_and_tools_work_without_installation(tmp_path):
    """From another folder, with site-packages out of reach."""
    module = [sys.executable, "-S", "-m", "knowsam", "--version"]
    done = subprocess.run(module, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.startswith("knowsam ")
    for name in ("train", "evaluate"):
        code = f"import runpy; runpy.run_path({str(ROOT / 'tools' / (name + '.py'))!r}); import knowsam.cli.main"
        subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=tmp_path)


def test_reader_that_leaves(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "knowsam", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert done.stderr == ""


def test_torchrun_tells_a_mistake_of_all_ranks_once(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(
        "import sys, types\n"
        "from knowsam.cli import main as cli\n"
        "from knowsam.errors import ConfigError\n"
        "def run(args):\n"
        "    raise ConfigError('a mistake')\n"
        "sys.modules['fake'] = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        "cli.COMMANDS['fake'] = ('fake', '')\n"
        "cli.RANK_ZERO_HEAD_START = 20.0\n"
        "sys.exit(cli.run_command('fake', []))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode != 0
    assert done.stderr.count("error[config]") == 1
    assert "error[config]: a mistake" in done.stderr

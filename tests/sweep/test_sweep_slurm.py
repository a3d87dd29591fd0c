"""SLURM jobs without SLURM: submitit's jobs as processes of this machine, and programs that stand in for sbatch."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sweep_stubs import TRAIN, Bench, children, until

from knowsam.errors import ConfigError, StorageError
from knowsam.sweep import slurm
from knowsam.sweep.store import Store
from knowsam.sweep.worker import child_environment

pytest.importorskip("submitit")

LOCAL = {"name": "slurm", "workers": 2, "threads": 1, "minutes": 30, "parameters": {"cluster": "local"}}
SCRIPTS = {
    "sbatch": 'cp "$1" "$FAKE/script.sh"; echo "Submitted batch job $(cat "$FAKE/number")"',
    "srun": "exit 1",
    "scontrol": "exit 1",
    # Each answer is given once.
    "squeue": 'echo "$@" >> "$FAKE/asked"; cat "$FAKE/queue"; : > "$FAKE/queue"; exit $(cat "$FAKE/code")',
}


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    bench.program(TRAIN)
    return bench


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder of programs named as SLURM's; what they were given, and what they answer, lies there as files."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, text in SCRIPTS.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    for name, text in {"number": "7", "queue": "", "code": "0"}.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(slurm, "ASK", 0.1)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


class Driver:
    """``knowsam sweep`` in a process of its own; what it says goes to a file, as its jobs would keep a pipe open."""

    def __init__(self, bench: Bench):
        self.output = bench.root / "said.txt"
        words = [sys.executable, "-m", "knowsam", "sweep", str(bench.file)]
        with open(self.output, "wb") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=output, env=child_environment(1))

    def end(self) -> tuple[int, str]:
        """Exit code and words."""
        try:
            code = self.process.wait(timeout=180)
        finally:
            self.process.kill()
        return code, self.output.read_text()


def jobs(bench: Bench) -> list[str]:
    return sorted(file.name.partition("_")[0] for file in (bench.folder / "slurm").glob("*_submitted.pkl"))


def below(pid: int) -> list[int]:
    """All processes that it started, directly or not."""
    return [p for child in children(pid) for p in (child, *below(child))]


def starts(bench: Bench) -> int:
    return sum(word.startswith("start") for _, word in bench.told())


# ---------------------------------------------------------------- jobs as processes


def test_jobs_run_each_trial_once(bench):
    bench.write(3, 0.01, grid={"train.max_steps": [1, 2, 3]}, launcher=LOCAL)
    code, said = Driver(bench).end()
    assert code == 0, said
    assert sorted(word for _, word in bench.told()) == ["finish"] * 3 + ["start 0"] * 3
    assert "(2 jobs)" in said and "[3/3] complete: max_steps=" in said
    assert len(jobs(bench)) == 2


@pytest.mark.parametrize("everyone", [False, True], ids=["only submitit is told", "all processes are told"])
def test_a_preempted_job_is_queued_again_and_its_trial_goes_on(bench, everyone):
    bench.write(60, 0.05, launcher={**LOCAL, "workers": 1})
    driver = Driver(bench)
    assert until(lambda: starts(bench) == 1)
    (job,) = jobs(bench)
    (task,) = children(int(job))
    time.sleep(0.5)
    # SLURM signals every process of a job; a trial that knows nothing of SIGUSR2 must not die of it.
    for pid in [task, *below(task)] if everyone else [task]:
        os.kill(pid, signal.SIGUSR2)
    code, said = driver.end()
    assert code == 0, said
    (_, begin), (_, stop), (_, again), (_, finish) = bench.told()
    assert begin == "start 0" and finish == "finish"
    assert stop == again.replace("start", "stop") != "stop 0"
    assert jobs(bench) == [job]
    assert [trial.state.name for trial in Store(bench.folder).study.get_trials()] == ["COMPLETE"]


def test_a_second_start_waits_for_the_jobs_of_the_first(bench):
    bench.write(120, 0.05, launcher={**LOCAL, "workers": 1})
    first = Driver(bench)
    assert until(lambda: starts(bench) == 1)
    first.process.send_signal(signal.SIGTERM)
    code, said = first.end()
    assert code == 75
    assert "The jobs go on without this command." in said and "0 complete, 1 left" in said
    submitted = jobs(bench)
    code, said = Driver(bench).end()
    assert code == 0, said
    assert f"in the queue already: {submitted[0]} (1 jobs)" in said and "submitted" not in said
    assert jobs(bench) == submitted
    assert [word for _, word in bench.told()] == ["start 0", "finish"]


def test_a_job_whose_worker_fails_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="exit code 66"):
        slurm.WorkerJob(str(tmp_path), 1, 1)()


def test_a_job_that_is_taken_away_does_not_count_as_done(bench, monkeypatch):
    """SIGTERM without SIGUSR2: SLURM requeues what it preempted; a result would end the job."""
    monkeypatch.setattr(slurm, "NOTICE", 0.0)
    Store.enrol(bench.load(1, 0.01))
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # sh -m knowsam sweep work ...: the file is beside us
    monkeypatch.chdir(bench.root)
    (bench.root / "knowsam").write_text("exit 75\n")
    with pytest.raises(RuntimeError, match="exit code 75"):
        slurm.WorkerJob(str(bench.folder), 1, 1)()


# ---------------------------------------------------------------- what SLURM is asked


def options(**keys) -> dict:
    return {"name": "slurm", "workers": 2, **keys}


def test_the_array_asks_for_what_the_file_says(bench, cluster, capsys):
    store = Store.enrol(bench.load(1, 0, grid={"train.max_steps": [1, 2, 3, 4, 5]}))
    parameters = {"partition": "gpu", "mem_gb": 32, "additional_parameters": {"reservation": "course"}}
    asked = {"threads": 8, "gpus_per_trial": 2, "minutes": 90, "trials_per_job": 2, "setup": ["module load cuda"]}
    slurm.launch(store, options(**asked, parameters=parameters))
    script = (cluster / "script.sh").read_text()
    found = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))
    expected = {
        "array": "0-2%2",
        "partition": "gpu",
        "mem": "32GB",
        "reservation": "course",
        "cpus-per-task": "8",
        "gpus-per-node": "2",
        "time": "90",
        "requeue": "",
        "open-mode": "append",
        "signal": "USR2@180",
        "job-name": "knowsam-bench",
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "\nmodule load cuda\n" in script
    assert "--cpus-per-task=8" in script.partition("srun")[2]
    said = capsys.readouterr().out
    assert "submitted: 7 (3 jobs)" in said
    assert "All jobs have ended and 5 trials are left" in said


def test_queued_jobs_are_not_submitted_again_and_new_trials_are(bench, cluster, capsys):
    grid = {"train.max_steps": [1, 2, 3]}
    slurm.launch(Store.enrol(bench.load(1, 0, grid=grid)), options())
    (cluster / "script.sh").unlink()
    (cluster / "queue").write_text("7_0\n7_1\n7_2\n99_0\n")  # the last is somebody's else
    slurm.launch(Store.enrol(bench.load(1, 0, grid=grid)), options())
    assert "in the queue already: 7 (3 jobs)" in capsys.readouterr().out
    assert not (cluster / "script.sh").exists()

    (cluster / "queue").write_text("7_0\n7_1\n7_2\n")
    (cluster / "number").write_text("8")
    slurm.launch(Store.enrol(bench.load(1, 0, grid={"train.max_steps": [1, 2, 3, 4, 5]})), options())
    assert "submitted: 8 (2 jobs)" in capsys.readouterr().out
    assert "--array=0-1%2" in (cluster / "script.sh").read_text()


def test_nothing_is_submitted_while_the_queue_gives_no_answer(bench, cluster):
    slurm.launch(Store.enrol(bench.load(1, 0)), options())
    (cluster / "script.sh").unlink()
    (cluster / "code").write_text("1")
    with pytest.raises(StorageError, match="squeue"):
        slurm.launch(Store(bench.folder), options())
    assert not (cluster / "script.sh").exists()


def test_a_refusal_of_sbatch_is_told(bench, cluster):
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'invalid partition specified: gpuu' >&2; exit 1\n")
    with pytest.raises(ConfigError, match="invalid partition specified: gpuu") as caught:
        slurm.launch(Store.enrol(bench.load(1, 0)), options(parameters={"partition": "gpuu"}))
    assert "launcher.parameters" in caught.value.hint


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parameters": {"partitoin": "gpu"}}, "launcher.parameters.partitoin: unknown key; did you mean 'partition'"),
        ({"parameters": {"timeout_min": 5}}, "launcher.parameters.timeout_min: say it as launcher.minutes"),
        ({"parameters": {"slurm_time": 5}}, "launcher.parameters.slurm_time: say it as launcher.minutes"),
        ({"parameters": {"cpus_per_task": 2}}, "say it as launcher.threads"),
        ({"parameters": {"nodes": "two"}}, "nodes"),
        ({"parameters": {"cluster": "pbs"}}, "must be slurm or local, got 'pbs'"),
    ],
)
def test_parameters_that_are_refused(bench, cluster, keys, message):
    with pytest.raises(ConfigError) as caught:
        slurm.launch(Store.enrol(bench.load(1, 0)), options(**keys))
    assert message in str(caught.value)


def test_without_slurm_the_message_tells_what_is_missing(bench, monkeypatch):
    monkeypatch.setenv("PATH", str(bench.root))
    with pytest.raises(ConfigError, match="needs sbatch, srun, squeue, scontrol") as caught:
        slurm.launch(Store.enrol(bench.load(1, 0)), options())
    assert "login node" in caught.value.hint


def test_without_submitit_the_message_tells_how_to_get_it(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="submitit") as caught:
        slurm.launch(Store.enrol(bench.load(1, 0)), options())
    assert caught.value.hint == "pip install 'knowsam[sweep]'"


def test_the_template_is_a_script_that_requeues():
    template = Path(__file__).resolve().parents[2] / "docs" / "slurm" / "sweep_worker.sbatch"
    assert subprocess.run(["bash", "-n", str(template)]).returncode == 0
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@180"} <= set(template.read_text().splitlines())

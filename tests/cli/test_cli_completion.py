"""Completion as bash itself computes it; and every command speaks of itself in one style."""

import argparse
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from knowsam.cli import completion
from knowsam.cli.main import BROKEN_PIPE, COMMANDS, INTERNAL_ERROR, INTERRUPTED, run_command
from knowsam.config import load_config
from knowsam.pretrained import WEIGHTS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
needs_bash = pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
every_command = pytest.mark.parametrize("name", COMMANDS)


@pytest.fixture(scope="module")
def script():
    return completion.bash(list(completion.commands()))


@pytest.fixture
def complete(script, tmp_path):
    """Words typed so far, the last one unfinished -> what bash offers, in a folder with some files."""
    for name in ("one.yaml", "two words.yml", "picture.png", "weights.pth"):
        (tmp_path / name).write_text("")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "script.bash").write_text(script)

    def run(*words):
        code = (
            f'source ./script.bash\nCOMP_WORDS=(knowsam "$@")\nCOMP_CWORD={len(words)}\n_knowsam\n'
            'for x in "${COMPREPLY[@]}"; do echo "$x"; done'
        )
        done = subprocess.run(
            ["bash", "--norc", "-c", code, "bash", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return set(done.stdout.splitlines())

    return run


FILES = {"one.yaml", "two words.yml", "runs"}


@needs_bash
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("",), {*COMMANDS, "--help", "--version"}),
        (("tr",), {"train"}),
        (("nonsense", ""), set()),
        (("train", ""), FILES),
        (("train", "o"), {"one.yaml"}),
        (("train", "--"), {"--help", "--print-config", "--dry-run", "--overfit-one-batch", "--evaluate", "--stop-at"}),
        (("train", "--dry-run", ""), FILES),
        (("train", "--stop-at", ""), set()),
        (("train", "--stop-at", "5", ""), FILES),
        (("train", "one.yaml", "train.se"), {"train.seed="}),
        (("train", "one.yaml", "train.seed", "=", "1", "train.max"), {"train.max_steps="}),
        (("evaluate", ""), {"runs"}),
        (("evaluate", "runs/"), {"runs/a"}),
        (("evaluate", "runs/a", "--split", ""), {"val", "test"}),
        (("evaluate", "runs/a", "--split", "v"), {"val"}),
        (("evaluate", "--dataset", ""), FILES),
        (("evaluate", "--data", ""), FILES),
        (("score", "runs", "--values", ""), {"data", "ids"}),
        (("sweep", ""), FILES | {"work", "status"}),
        (("sweep", "--launcher", "s"), {"slurm"}),
        (("weights", ""), {"list", "fetch", "verify"}),
        (("weights", "verify", "we"), {"weights.pth"}),
        (("convert", ""), {"published"}),
        (("convert", "published", "--subnets", "w"), {"weights.pth"}),
        (("completion", "z"), {"zsh"}),
        (("weights", "fetch", "vit_"), {"vit_b", "vit_l", "vit_h"}),
        (("doctor", "--j"), {"--json"}),
        (("check-method", "mean"), {"mean_teacher"}),
        (("init", "study", "--images", ""), {"runs"}),
        (("init", "study", "--labels", ""), set()),
        (("init", "study", "--groups", "p"), {"picture.png"}),
        (("predict", "runs/a", "p"), {"picture.png"}),
        (("report", "runs/a", "-o", "t"), {"two words.yml"}),
        (("benchmark", "pr"), {"prediction", "processes"}),
        (("benchmark", "--set", "train.se"), {"train.seed="}),
    ],
    ids=lambda words: " ".join(sorted(words) if isinstance(words, set) else words),
)
def test_what_bash_offers(complete, words, offered):
    found = complete(*words)
    assert found == offered if words != ("train", "--") else found >= offered


@needs_bash
@every_command
def test_every_option_of_every_command_is_offered(complete, name):
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    assert complete(name, "-") == set(parser._option_string_actions)


@every_command
def test_what_a_value_is_called_tells_what_is_offered_for_it(name):
    # A value with a new name is a file, a folder, or stands here.
    no_path = {"A,B", "LIST", "MAP", "MM", "N", "NAME", "PERCENT", "REGEX", "STEP", "STEPS", "SUITE", "TEXT", "WHAT"}
    no_path |= {"DAYS", "K,K,...", "S", "key=value", "KEY=VALUE", "'KEY=VALUE ...'", "splits|rules|budget|checkpoint"}
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    assert {str(action.metavar) for action in parser._actions if action.metavar} <= no_path | set(completion.KINDS)


def test_offered_suites_are_suites():
    from knowsam.cli.benchmark import SUITES

    assert completion.UNLISTED["benchmark"] == tuple(SUITES)


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tr", {"train"}),
        ("train --stop", {"--stop-at"}),
        ("train one.yaml train.se", {"train.seed="}),
        ("export runs/a --format ", {"onnx", "pt2", "torchscript"}),
        ("init study --images ", {"runs/"}),
        ("benchmark --set train.se", {"train.seed="}),
    ],
)
def test_what_fish_offers(tmp_path, line, offered):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "one.yaml").write_text("")
    (tmp_path / "script.fish").write_text(completion.fish(list(completion.commands())))
    code = f"source script.fish; complete -C 'knowsam {line}'"
    said = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert {one.split("\t")[0] for one in said.splitlines()} == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_a_script_that_the_shell_can_read(shell, tmp_path, capsys):
    assert run_command("completion", [shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS) and "max_steps" in text and "@" not in text.replace('"$@"', "")
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here: its script was made, but not read by it")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_no_such_shell(capsys):
    assert run_command("completion", ["tcsh"]) == 2


def test_offered_keys_are_keys(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x\n")
    keys = completion.override_keys()
    assert len(keys) > 30 and "train.pictures_every=" in keys and "method." in keys
    config = load_config(tmp_path / "x.yaml")
    for key in keys:
        value = config
        for word in key.rstrip("=.").split("."):
            if isinstance(value, dict | None.__class__):  # a block: its keys are its component's
                break
            value = getattr(value, word)
        assert key.endswith("=") or isinstance(value, dict | None.__class__)
    assert {"method.name=", "method.ema_decay=", "sam.weights=", "optim.subnets.lr=", "skd.weight="} <= set(keys)
    assert not {"method.students=", "sam.num_classes="} & set(keys), "those are given by the experiment"


# ---------------------------------------------------------------- one style, and what the document says


def help_of(name):
    parser = argparse.ArgumentParser(prog=f"knowsam {name}")
    importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
    return parser.format_help()


def codes_of(name):
    text = help_of(name).partition("exit codes: ")[2]
    return {int(code) for code in re.findall(r"(?:^|[,;] ?|\n)(\d+) ", text)}


@every_command
def test_help_has_examples_and_exit_codes_in_one_form(name):
    text = help_of(name)
    examples = text.partition("\nexamples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples and all(line.startswith("  ") for line in examples)
    tool = {"check": "check_data", "check-method": "check_method", "splits": "make_splits"}.get(name, name)
    assert f"tools/{tool}.py" in text or f"knowsam {name}" in examples[0]
    assert text.count("\nexit codes: 0 ") == 1
    assert text.rstrip().endswith("."), "the exit codes come last, as a sentence"
    assert (ROOT / "tools" / f"{tool}.py").is_file()


def test_the_document_has_every_exit_code_that_the_code_has():
    documented = {  # a code may have two meanings, and so two rows
        (int(code), row[1])
        for line in DOCUMENT.partition("## Exit codes")[2].partition("\n## ")[0].splitlines()
        if (row := [cell.strip() for cell in line.strip("|").split("|")]) and (code := row[0]).isdecimal()
    }
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "knowsam").rglob("*.py"))
    own = {int(code): kind for code, kind in re.findall(r'exit_code = (\d+)\n +kind = "(.+)"', source)}
    assert len(own) > 8 and set(own.items()) == {(code, kind) for code, kind in documented if kind}
    assert {0, 2, INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE} == {code for code, kind in documented if not kind}
    for name in COMMANDS:
        assert codes_of(name) <= {code for code, _ in documented}, name
        assert codes_of(name) >= {0}, name


def test_the_document_has_every_command_and_every_file():
    rows = dict(re.findall(r"(?m)^\| `([\w-]+)` \| ([^|]+?) \|$", DOCUMENT))
    assert {name: rows[name].partition(" ([")[0] for name in COMMANDS} == {n: text for n, (_, text) in COMMANDS.items()}
    for entry in WEIGHTS.values():
        row = f"| `{entry.name}` | `{entry.file}` | {entry.size:,} | {entry.licence} | "
        assert (row + ("yes" if entry.loadable else "not yet")) in DOCUMENT


def test_the_document_on_watching_names_every_warning():
    from knowsam.engine.watch import RULES

    text = (ROOT / "docs" / "watching.md").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^\| `(\w+)` \| (?!the sum|share|2-norm)", text.partition("## Warnings")[2]) == [
        rule.__name__ for rule in RULES
    ]

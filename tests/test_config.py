"""Experiment files: what is refused and how, inheritance, overrides, round trips, and components from outside."""

import random
import re
import textwrap

import pytest

from knowsam.config import Config, load_config, to_yaml
from knowsam.errors import ConfigError, KnowsamError, NotFoundError


@pytest.fixture
def write(tmp_path):
    """write(text, name) -> path."""

    def write(text, name="experiment.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())
        return path

    return write


def problems(path, *words):
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(words))
    return str(caught.value)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("trian: {seed: 1}", 1, "trian: unknown key; did you mean 'train'?"),
        ("name: x\n\ntrain:\n  sed: 1", 4, "train.sed: unknown key; did you mean 'seed'?"),
        ("data:\n  image_sise: 64", 2, "data.image_sise: unknown key; did you mean 'image_size'?"),
        (
            "method:\n  name: mean_teacher\n  ema_decy: .9",
            3,
            "method.ema_decy: method 'mean_teacher' has no parameter 'ema_decy'; did you mean 'ema_decay'?",
        ),
        ("method: {name: mean_techer}", 1, "there is no method 'mean_techer'; did you mean 'mean_teacher'?"),
        ("students:\n  a: {name: unet}\n  b: {name: wnet}", 3, "students.b.name: there is no students 'wnet'"),
        ("students:\n  a: {name: unet}\n  b: {name: vnet, nrm: batch}", 3, "did you mean 'norm'?"),
        ("sam:\n  encodr: {name: vit_b}", 2, "did you mean 'encoder'?"),
        ("sam:\n  encoder: {name: vit_bb}", 2, "sam.encoder.name: there is no encoder 'vit_bb'; did you mean 'vit_b'?"),
        ("sam:\n  tuning: [{name: adapter, ratoi: 1}]", 2, "did you mean 'ratio'?"),
        ("sam: {variant: tiny}", 1, "it is now sam.encoder: {name: vit_b}"),
        ("method: {name: knowsam, skd: {wieght: 1}}", 1, "did you mean 'weight'?"),
        ("method: {name: knowsam, mix_start: 0.5}", 1, "has no parameter 'mix_start'; it is now method.mix.start"),
        ("init: {from: runs/a, part: students, chekpoint: last}", 1, "did you mean 'checkpoint'?"),
        ("augment:\n  elastik: 0.1", 2, "did you mean 'elastic'?"),
        ("optim:\n  subnets: {name: sgd, learning_rate: 1}", 2, "'sgd' has no parameter 'learning_rate'"),
        ("optim: {subnets: {name: sdg}}", 1, "did you mean 'sgd'?"),
        ("fusion: {name: hum}", 1, "fusion.name: there is no fusion 'hum'"),
        ("method: {name: supervised}\nskd:\n  temprature: 3", 3, "did you mean 'temperature'?"),
        ("method: {name: knowsam, students: 3}", 1, "it is set by the experiment itself"),
        ("data:\n  source: {name: image_folder}\n  splits: x", 2, "'image_folder' needs root"),
        ("nonsense_without_neighbour: 1", 1, "nonsense_without_neighbour: unknown key"),
    ],
)
def test_unknown_names_say_file_line_and_neighbour(write, text, line, says):
    path = write(text)
    message = problems(path)
    assert f"{path}:{line} " in message
    assert says in message


def test_all_errors_at_once(write):
    path = write("""
        nam: x
        train: {max_steps: many, sed: 3, clip_norm: .nan}
        data: {image_size: 100, classes: [background]}
        method: {name: mean_teacher, ema_decay: high, gamma: 1}
    """)
    message = problems(path, "train.accumulate=0", "evaluate.bath_size=3", "oops")
    for part in (
        "nam: unknown key", "max_steps: must be int, got 'many'", "did you mean 'seed'", "clip_norm: must be finite",
        "divisible by 16, got 100", "at least one class", "ema_decay: must be float, got 'high'",
        "no parameter 'gamma'", "command line train.accumulate: must be at least 1, got 0",
        "command line evaluate.bath_size: unknown key; did you mean 'batch_size'?", "'oops' is not of the form",
    ):  # fmt: skip
        assert part in message
    assert message.startswith("11 problems in the configuration:")
    assert len(message.splitlines()) == 12


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.max_steps=3.0", "must be int, got 3.0"),
        ("train.max_steps=1e3", "must be int, got 1000.0"),
        ("train.max_steps=true", "must be int, got True"),
        ("train.seed=", "must be int, got None"),
        ("train.tensorboard=1", "must be bool, got 1"),
        ("train.tensorboard='yes'", "must be bool, got 'yes'"),
        ("train.clip_norm=true", "must be float, got True"),
        ("train.precision=fp8", "'bf16', 'fp16'], got 'fp8'"),
        ("train=3", "train: must hold keys and values, got 3"),
        ("data=null", "data: must hold keys and values, got None"),
        ("data.classes=[background,1]", "must be list[str], got ['background', 1]"),
        ("data.classes=[no,yes]", "must be list[str], got [False, True]"),
        ("data.splits=3", "must be str | None, got 3"),
        ("sam=null", "sam: must be dict[str, Any], got None"),
        ("method=knowsam", "method: must be dict[str, Any], got 'knowsam'"),
        ("method.name=3", "method: needs a block with a name"),
        ("method.mix=1", "method.mix: must hold keys and values, got 1"),
        ("method.skd=null", "method.skd: must hold keys and values, got None"),
        ("method.mix.cells=2.5", "method.mix.cells: must be int, got 2.5"),
        ("init=runs/a", "init: needs {from: RUN, part: students or sam}, got 'runs/a'"),
        ("students.unet=unet", "students.unet: needs a block with a name"),
        ("optim.subnets.lr=fast", "optim.subnets.lr: must be float, got 'fast'"),
        ("optim.subnets.lr=.inf", "must be finite, got inf"),
        ("sam.tuning=adapter", "sam.tuning: needs a block with a name, one of adapter; got 'adapter'"),
        ("sam.tuning=[adapter]", "sam.tuning: needs a block with a name, one of adapter; got 'adapter'"),
        ("augment.hole_size=[0.1,big]", "augment.hole_size"),
    ],
)
def test_wrong_types(write, word, says):
    message = problems(write("name: x"), word)
    assert says in message
    assert "command line " in message


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train.precision=fp16", "train.device=cpu"], "train.precision: fp16 needs a CUDA device"),
        (["skd={weight: 1.0}"], "skd: method 'knowsam' already distils from SAM"),
        (["fusion=null"], "fusion: method 'knowsam' needs a fusion head, such as fusion: {name: ham}"),
        (["students={a: {name: unet}}"], "students: method 'knowsam' trains 2 students and a fusion head, got 1"),
        (["method.name=supervised", "fusion={name: ham}"], "fusion: merges exactly 2 students, got 1"),
        (["method.name=supervised", "students={}"], "students: needs at least one student"),
        (["init={from: runs/a, part: teacher}"], "init.part: must be one of students, sam, got 'teacher'"),
        (
            ["method.name=supervised", "students={fusion: {name: unet}, b: {name: unet}}"],
            "students.fusion: a student cannot be called 'fusion'",
        ),
        (["data.unlabelled_batch=0"], "data.unlabelled_batch: method 'knowsam' learns from unlabelled"),
        (["method.name=mean_teacher", "data.unlabelled_batch=0"], "'mean_teacher' learns from unlabelled"),
        (["data.labelled_batch=0"], "data.labelled_batch: must be at least 1, got 0"),
        (["data.image_size=16"], "at least 32"),
        (["data.classes=[a,b,a]"], "names a class twice"),
        (["optim.subnets.lr=-1"], "optim.subnets.lr: must be > 0, got -1"),
        (["data.source={name: h5_slices, root: x}"], "data.splits: names the folder of split lists"),
        (["train.max_steps=0"], "train.max_steps: must be at least 1"),
        (["evaluate.batch_size=0"], "evaluate.batch_size: must be at least 1"),
    ],
)
def test_impossible_pairs(write, words, says):
    assert says in problems(write("name: x"), *words)


@pytest.mark.parametrize("words", [["novalue"], ["=3"], ["train..seed=1"], [".seed=1"], ["train.=1"]])
def test_words_that_are_no_override(write, words):
    assert f"{words[0]!r} is not of the form key.path=value" in problems(write("name: x"), *words)


@pytest.mark.parametrize("text", ["}", "[1,", "'", "\0", "${nothing}", "!!int", "!!bool maybe", "[" * 900 + "]" * 900])
def test_override_values_that_cannot_be_read(write, text):
    assert "command line: the value of 'name' can't be read" in problems(write("name: x"), f"name={text}")


# ---------------------------------------------------------------- YAML and its traps


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n", "{}"])
def test_nothing_said_is_the_default(write, text):
    assert load_config(write(text)) == Config()


def test_numbers_as_people_write_them(write):
    config = load_config(write("optim: {subnets: {lr: 1e-4}, sam: {lr: 5E-5}}\ntrain: {clip_norm: 1}"))
    assert config.optim["subnets"]["lr"] == 1e-4  # YAML 1.1 reads the text "1e-4"
    assert config.optim["sam"] == {"name": "adam", "lr": 5e-5}
    assert config.train.clip_norm == 1
    assert load_config(write(""), ["optim.subnets.lr=1e-4"]).optim["subnets"]["lr"] == 1e-4


def test_utf8_with_bom_and_crlf(write):
    assert load_config(write(b"\xef\xbb\xbfname: caf\xc3\xa9\r\ntrain:\r\n  seed: 3\r\n")).name == "café"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name: a\nname: b\n", "duplicate key"),
        (b"train:\n  seed: 1\n  seed: 2\n", "duplicate key"),
        (b"data:\n\timage_size: 64\n", "cannot start any token"),
        (b"name: caf\xe9\n", "not UTF-8"),
        ("name: x\n".encode("utf-16"), "not UTF-8"),
        (b"name: x\0y\n", "not a YAML file"),
        (b"- a\n- b\n", "must hold keys and values, got list"),
        (b"[1, 2]", "must hold keys and values, got list"),
        (b"3", "not a YAML file"),
        (b"true", "not a YAML file"),
        (b"just words", "unknown key"),
        (b"name: 'open", "not a YAML file"),
        (b"name: *nobody", "undefined alias"),
        (b"a: &a [*a]", "recursive"),
        (b"? [1, 2]\n: x", "unhashable"),
        (b"~: 1", "key type"),
        (b"name: !!python/object/apply:os.system [echo]", "not a YAML file"),
        (b"name: !!int", "not a YAML file"),
        (b"name: !!bool maybe", "not a YAML file"),
        (b"name: !!timestamp today", "not a YAML file"),
        (b"name: !!float", "not a YAML file"),
        (b"name: ${nothing}", "Interpolation key 'nothing' not found"),
        (b"name: " + b"[" * 900 + b"]" * 900, "not a YAML file"),
        (b"# " + b"x" * 1_000_000, "more than 1 MB"),
        (b"train: {clip_norm: .nan}", "must be finite, got nan"),
    ],
)
def test_files_that_cannot_be_read(write, text, says):
    assert says in problems(write(text))


def test_missing_file_and_folder(write, tmp_path):
    write("name: x", "kvasir.yaml")
    with pytest.raises(NotFoundError) as caught:
        load_config(tmp_path / "kvasr.yaml")
    assert f"did you mean {tmp_path / 'kvasir.yaml'}?" in caught.value.hint
    for path in (tmp_path, tmp_path / "no" / "such.yaml"):
        with pytest.raises(NotFoundError, match="there is no experiment file"):
            load_config(path)


# ---------------------------------------------------------------- inheritance


def test_inherits_chain_relative_to_each_file(write):
    write("name: root\ntrain: {max_steps: 5, seed: 1, clip_norm: 1}\ndata: {image_size: 64}", "base/root.yaml")
    write("inherits: root.yaml\ntrain: {seed: 2, log_every: 7}", "base/middle.yaml")
    config = load_config(write("inherits: base/middle.yaml\nname: leaf\ntrain: {seed: 3}"))
    train = config.train
    assert (config.name, train.max_steps, train.seed, train.clip_norm, train.log_every) == ("leaf", 5, 3, 1, 7)
    assert config.data.image_size == 64


def test_a_table_of_labels_is_replaced_whole(write):
    three = "data: {classes: [background, a, b], labels: {0: 0, 1: 100, 2: 200}}"
    write(three, "three.yaml")
    two = write("inherits: three.yaml\ndata: {classes: [background, a], labels: {0: [0, 200], 1: 100}}")
    assert load_config(two).data.labels == {0: [0, 200], 1: 100}
    assert load_config(write(three), ["data.labels={0: 0, 1: 5, 2: 7}"]).data.labels == {0: 0, 1: 5, 2: 7}


def test_several_parents_the_later_wins(write):
    write("name: a\ntrain: {seed: 1, max_steps: 11}", "a.yaml")
    write("name: b\ntrain: {seed: 2}", "b.yaml")
    config = load_config(write("inherits: [a.yaml, b.yaml]"))
    assert (config.name, config.train.seed, config.train.max_steps) == ("b", 2, 11)


def test_an_error_is_reported_where_it_was_written(write):
    parent = write("train:\n  sed: 1", "parent.yaml")
    child = write("inherits: parent.yaml\n\ndata: {image_size: 100}")
    message = problems(child)
    assert f"{parent}:2 train.sed" in message
    assert f"{child}:3 data.image_size" in message


@pytest.mark.parametrize("value", ["3", "true", "{a: b}", "[1]", "[[a.yaml]]"])
def test_inherits_must_name_files(write, value):
    assert "inherits: must be a file or a list of files" in problems(write(f"inherits: {value}"))


def test_inherits_itself(write):
    path = write("inherits: experiment.yaml")
    assert "inherits itself through" in problems(path)
    write("inherits: b.yaml", "a.yaml")
    write("inherits: c.yaml", "b.yaml")
    assert "inherits itself through" in problems(write("inherits: a.yaml", "c.yaml"))


def test_the_same_parent_twice_is_no_recursion(write):
    write("train: {seed: 4}", "root.yaml")
    write("inherits: root.yaml", "a.yaml")
    write("inherits: root.yaml", "b.yaml")
    assert load_config(write("inherits: [a.yaml, b.yaml]")).train.seed == 4


def test_missing_parent_says_who_wanted_it(write, tmp_path):
    path = write("inherits: nobody.yaml")
    with pytest.raises(NotFoundError, match=re.escape(f"{tmp_path / 'nobody.yaml'} (inherited by {path})")):
        load_config(path)


def test_a_component_is_replaced_when_its_name_changes(write):
    write(
        """
        name: parent
        method: {name: mean_teacher, ema_decay: 0.5}
        optim: {subnets: {name: adamw, lr: 0.5, betas: [0.5, 0.9]}}
        data: {source: {name: image_folder, root: kvasir}, splits: s, image_size: 64}
        students: {a: {name: unet}, b: {name: vnet, norm: batch}}
        """,
        "parent.yaml",
    )
    same = load_config(write("inherits: parent.yaml\nname: child\nmethod: {consistency: bce}"))
    assert same.method == {"name": "mean_teacher", "ema_decay": 0.5, "consistency": "bce"}
    assert (same.name, same.data.image_size) == ("child", 64)  # an experiment's own name replaces nothing
    changed = load_config(
        write(
            """
            inherits: parent.yaml
            method: {name: supervised}
            optim: {subnets: {name: adam}}
            data: {source: {name: builtin, train: 30}}
            students: {b: {name: unet}}
            """
        )
    )
    assert changed.method == {"name": "supervised"}
    assert changed.optim["subnets"] == {"name": "adam"}
    assert changed.data.source == {"name": "builtin", "train": 30}
    assert changed.students == {"b": {"name": "unet"}}  # a child that names students has no others
    assert changed.data.image_size == 64


# ---------------------------------------------------------------- overrides


def test_overrides_win_and_the_last_one_counts(write):
    path = write("train: {seed: 1}")
    config = load_config(path, ["train.seed=2", "--train.max_steps=7", "train.seed=3", "data.classes=[background,a,b]"])
    assert (config.train.seed, config.train.max_steps, config.num_classes) == (3, 7, 3)


@pytest.mark.parametrize("turn", [False, True])
def test_a_name_goes_before_the_settings_of_its_block(write, turn):
    words = ["method.consistency=bce", "method.name=mean_teacher"]
    path = write("method: {name: knowsam, skd: {weight: 2.0}}")
    assert load_config(path, words[::-1] if turn else words).method == {"name": "mean_teacher", "consistency": "bce"}


def test_values_may_hold_equals_signs(write):
    assert load_config(write(""), ["data.obtain=https://example.org/?a=b"]).data.obtain == "https://example.org/?a=b"


def test_naming_students_replaces_the_methods_own(write):
    config = load_config(write("method: {name: supervised}\nstudents: {one: {name: unet}}"))
    assert config.students == {"one": {"name": "unet"}}


def test_each_method_has_students_of_its_own(write):
    pair = {"unet": {"name": "unet"}, "vnet": {"name": "vnet"}}
    assert load_config(write("name: x")).students == pair and Config().fusion == {"name": "ham"}
    for name in ("mean_teacher", "supervised"):
        config = load_config(write(f"method: {{name: {name}}}"))
        assert (config.students, config.fusion) == ({"unet": {"name": "unet"}}, None)


def test_options_of_students_that_the_method_has_not_are_said(write):
    path, notes = write("students: {vnet: {norm: batch}}"), []
    assert load_config(path, notes=notes).students["vnet"] == {"name": "vnet", "norm": "batch"} and notes == []
    assert load_config(path, ["method.name=mean_teacher"], notes).students == {"unet": {"name": "unet"}}
    assert notes == ["students.vnet has no effect: mean_teacher trains unet"]


def test_options_of_a_fusion_head_reach_the_methods_own(write):
    path, notes = write("fusion: {width: 32}"), []
    assert load_config(path, notes=notes).fusion == {"name": "ham", "width": 32} and notes == []
    assert load_config(path, ["fusion.width=16"]).fusion == {"name": "ham", "width": 16}
    assert load_config(path, ["method.name=mean_teacher"], notes).fusion is None
    assert notes == ["fusion has no effect: mean_teacher has no fusion head of its own; name one to have it"]
    pair = ["method.name=supervised", "students={a: {name: unet}, b: {name: vnet}}", "fusion={name: ham}"]
    assert load_config(path, pair).fusion == {"name": "ham", "width": 32}
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        load_config(path, ["fusion.widht=16"])


def test_one_student_of_a_pair_is_replaced_by_one_setting(write):
    config = load_config(write("name: x"), ["students.vnet={name: unet, channels: [4, 8], dropout: [0, 0]}"])
    assert list(config.students) == ["unet", "vnet"] and config.students["vnet"]["name"] == "unet"
    assert config.students["unet"] == {"name": "unet"}


# ---------------------------------------------------------------- round trip

EXPERIMENT = """\
name: fuzzed
data:
  source: {name: builtin, train: 40, size: 64}
  classes: [background, lesion, other]
  labelled: labelled_10pct
  labels: {0: 0, 1: [1, 2], 2: 255}
  image_size: 64
students:
  unet: {name: unet, channels: [8, 16], dropout: [0.1, 0.2]}
  vnet: {name: vnet, norm: batch}
sam: {encoder: {name: vit_tiny}, tuning: [{name: adapter, ratio: 0.25}]}
method: {name: mean_teacher, consistency: bce}
skd: {weight: 1.0, temperature: 10.0}
optim:
  subnets: {name: adamw, lr: 1e-3, schedule: cosine, warmup: 20}
  sam: {name: adam, lr: 5e-4, betas: [0.9, 0.99]}
train:
  max_steps: 600
  precision: bf16
"""


def test_options_reach_the_entries_of_a_list(write):
    """The only one, or those that are numbered; several without a number are refused."""
    path = write(EXPERIMENT)
    assert load_config(path, ["sam.tuning.ratio=0.5"]).sam["tuning"] == [{"name": "adapter", "ratio": 0.5}]
    two = "sam.tuning=[{name: adapter, ratio: 0.1}, {name: adapter, ratio: 0.2}]"
    tuned = load_config(path, [two, "sam.tuning.1.ratio=0.5"]).sam["tuning"]
    assert [block["ratio"] for block in tuned] == [0.1, 0.5]
    for word in ("sam.tuning.ratio=0.5", "sam.tuning.2.ratio=0.5"):
        with pytest.raises(ConfigError, match="an entry is set by its number"):
            load_config(path, [two, word])


@pytest.mark.parametrize(
    "text", ["", EXPERIMENT, "fusion: null\nstudents: {x: {name: vnet}}\nmethod: {name: supervised}"]
)
def test_round_trip(write, text):
    config = load_config(write(text))
    assert load_config(write(to_yaml(config), "again.yaml")) == config


@pytest.mark.parametrize(
    "word", ["1e-4", "null", "no", "0x1F", "~", " a ", "é", "a: b # c", "1_000", "12:30", "[a", "'", "x\ny"]
)
def test_round_trip_of_strings_that_look_like_something_else(write, word):
    config = Config(name=word)
    config.data.classes = ["background", word]
    again = load_config(write(to_yaml(config), "again.yaml"))
    assert (again.name, again.data.classes) == (word, ["background", word])


def test_shipped_experiments_load_and_round_trip(write):
    from pathlib import Path

    files = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
    assert files
    for path in files:
        config = load_config(path)
        assert load_config(write(to_yaml(config), "again.yaml")) == config, path


# ---------------------------------------------------------------- fuzz

SPICE = [
    "{", "}", "[", "]", ":", ": ", ",", "\n", "\t", "  ", "- ", "#", "'", '"', "&a ", "*a", "!!int ", "|", ">", "? ",
    "null", "~", "true", ".nan", ".inf", "-1", "1e400", "0", "''", "[]", "{}", "${name}", "${", "<<: ", "é", "\x00",
    "\u2028", "---\n", "...\n", "name: ", "inherits: ", "a:b", "a:b:c", "sys:path", "os:getcwd", "data", "99999999999",
]  # fmt: skip


def mutate(rng, text):
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind, at = rng.randrange(5), rng.randrange(len(text))
        if kind == 0:
            text = text[:at] + rng.choice(SPICE) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 8) :]
        elif kind == 2:  # another scalar
            scalars = [m.span(1) for m in re.finditer(r": ([\w.-]+)", text)]
            start, end = rng.choice(scalars or [(at, at)])
            text = text[:start] + rng.choice(SPICE) + text[end:]
        elif kind == 3:  # swap two lines
            lines = text.split("\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
            text = "\n".join(lines)
        else:
            text = text[:at] + rng.choice('0123456789abc ,:[]{}"-.#%@\x07') + text[at + 1 :]
    return text


def test_only_knowsam_errors_come_out_of_mutated_files(write):
    rng = random.Random(0)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(200):
        text = mutate(rng, EXPERIMENT)
        path = write(text.encode("utf-8", "surrogatepass"))
        try:
            config = load_config(path)
        except KnowsamError as error:
            assert str(error)
            outcomes["refused"] += 1
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {error}\n{text}")
        else:
            assert isinstance(config, Config)
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 10  # else the mutations are too mild or too wild


# ---------------------------------------------------------------- components from outside

MY_METHOD = """
import torch
from knowsam.losses import segmentation_loss
from knowsam.methods.base import StudentMethod


class MyMethod(StudentMethod):
    def __init__(self, students, max_steps: int, *, sharpness: float = 1.0, mode: str = "a"):
        super().__init__(students)
        if mode not in "ab":
            raise ValueError(f"mode must be a or b, got {mode!r}")
        self.max_steps, self.sharpness = max_steps, sharpness

    def forward(self, batch, step):
        joined = batch.join(batch.weak)
        logits = self.students(joined.images)
        losses = {n: self.sharpness * segmentation_loss(joined.labelled(x), batch.mask) for n, x in logits.items()}
        return self.report(losses, joined, logits)
"""


MY_SAM = """
import torch
from torch import nn
from knowsam.models.sam import Prompts


class Fixed(nn.Module):
    dense = False

    def __init__(self, num_classes: int, embed_dim: int, *, tokens: int = 1):
        super().__init__()
        self.tokens = nn.Parameter(torch.zeros(num_classes, tokens, embed_dim))

    def forward(self, embedding):
        return Prompts(sparse=self.tokens.expand(len(embedding), -1, -1, -1))


def lowrank(encoder, mask_decoder, *, rank: int = 2):
    for block in encoder.blocks:
        block.attn.attach("qkv", nn.Linear(encoder.width, 3 * encoder.width, bias=False))
"""


@pytest.fixture
def my_lab(tmp_path, monkeypatch):
    folder = tmp_path / "my_lab"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "code.py").write_text(MY_METHOD)
    (folder / "parts.py").write_text(MY_SAM)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_lab.code:MyMethod"


@pytest.mark.parametrize("skd", [False, True])
def test_a_method_from_outside_builds_and_trains_one_step(write, my_lab, skd):
    import torch

    from knowsam import build

    path = write(f"""
        method: {{name: "{my_lab}", sharpness: 2.0}}
        students: {{one: {{name: unet, channels: [4, 8], dropout: [0, 0]}}}}
        skd: {"{weight: 0.5}" if skd else "null"}
        sam: {{encoder: {{name: vit_tiny}}, prompt: {{sparse: false}}}}
        data: {{image_size: 32, unlabelled_batch: 2, source: {{name: builtin, train: 10, size: 32}}}}
    """)
    config = load_config(path)
    assert config.uses_sam is skd
    method = build.build_method(config).method
    optimizers = build.build_optimizers(config, method)
    streams = build.build_streams(config, build.build_source(config))
    batch = build.build_augmenter(config)(streams[0], seed=3)
    before = [p.detach().clone() for p in method.trainable_groups()["subnets"]]
    out = method.train()(batch, 0)
    sum(out.losses.values()).backward()
    for optimizer in optimizers.values():
        optimizer.set_lr(0, 10)
        optimizer.optimizer.step()
    method.after_step(0)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.trainable_groups()["subnets"], strict=True))
    assert ("skd_one" in out.losses) is skd


def test_a_method_from_outside_is_checked_against_its_signature(write, my_lab):
    message = problems(write(f"method: {{name: '{my_lab}', sharpnes: 1, mode: 3}}"))
    assert "has no parameter 'sharpnes'; did you mean 'sharpness'?" in message
    assert "method.mode: must be str, got 3" in message


def test_parts_of_sam_from_outside(write, my_lab):
    from knowsam import build

    text = """
        sam:
          encoder: {name: vit_tiny}
          train: [tuning, prompt]
          prompt: {name: 'my_lab.parts:Fixed', tokens: 3}
          tuning: [{name: 'my_lab.parts:lowrank', rank: 1}]
        data: {image_size: 64}
    """
    guide = build.build_method(load_config(write(text))).method.sam_teacher.guide
    trained = [name for name, parameter in guide.named_parameters() if parameter.requires_grad]
    assert guide.prompt_generator.tokens.shape == (2, 3, guide.sam.embed_dim)
    assert len(trained) == 1 + len(guide.image_encoder.blocks)
    assert "has no parameter 'ranks'; did you mean 'rank'?" in problems(write(text.replace("rank:", "ranks:")))
    assert "there is no module 'my_lab.part'" in problems(write(text.replace("my_lab.parts:l", "my_lab.part:l")))


def test_a_value_that_the_constructor_refuses_names_the_block(write, my_lab):
    from knowsam import build

    config = load_config(write(f"method: {{name: '{my_lab}', mode: z}}"))
    with pytest.raises(ConfigError, match="method: mode must be a or b, got 'z'"):
        build.build_method(config)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_lab.code:Other", "has no class or function 'Other'"),
        ("my_lab.cod:MyMethod", "no module 'my_lab.cod'"),
        ("nobody.here:X", "there is no module 'nobody.here' on the Python path"),
        ("nobody:X", "there is no module 'nobody'"),
        ("a:b:c", "method.name"),
        (":X", "method.name"),
        (".x:X", "method.name"),
        ("x:", "method.name"),
        ("sys:path", "method.name"),
        ("__main__:X", "method.name"),
        ("torch._C:X", "method.name"),
        ("knowsam.methods.nothing:X", "there is no module 'knowsam.methods.nothing'"),
        ("knowsam/methods", "there is no method"),
    ],
)
def test_names_from_outside_that_lead_nowhere(write, my_lab, name, says):
    assert says in problems(write(f"method: {{name: '{name}'}}"))


@pytest.mark.parametrize("name", ["sam", "teacher", "a.b", "keys", "1st"])
def test_students_cannot_take_the_names_of_other_outputs(write, name):
    text = f"method: {{name: supervised}}\nfusion: null\nstudents: {{{name!r}: {{name: unet}}}}"
    assert f"a student cannot be called {name!r}" in problems(write(text))


def test_an_option_of_one_student_keeps_the_default_pair(write):
    config = load_config(write("name: x"), ["students.vnet.norm=batch"])
    assert config.students == {"unet": {"name": "unet"}, "vnet": {"name": "vnet", "norm": "batch"}}


def test_a_block_that_changes_its_name_goes_before_its_options(write):
    words = ["method.consistency=bce", "method={name: mean_teacher}"]
    assert load_config(write("method: {name: knowsam}"), words).method == {"name": "mean_teacher", "consistency": "bce"}

"""The experiment configuration: defaults <- YAML (with ``inherits:``) <- dotted words of the command line.

Everything wrong is reported at once, each with its file, line, key and the nearest right key. Blocks that name a
component are checked against that component's constructor: its signature is the schema.
"""

import ast
import copy
import difflib
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knowsam import components
from knowsam.compat.rows import problems, select
from knowsam.errors import ConfigError, NotFoundError
from knowsam.text import did_you_mean

REPOSITORY = Path(__file__).resolve().parents[1]


def _block(**values: Any) -> Any:
    return field(default_factory=lambda: dict(values))


@dataclass
class DataConfig:
    """Which images, and how many of them in a step."""

    source: dict[str, Any] = _block(name="builtin")  # component of components.SOURCES
    splits: str | None = None  # folder of the split lists, beside the experiment's checkout or absolute
    classes: list[str] = field(default_factory=lambda: ["background", "lesion"])  # K names, background first
    labelled: str = "labelled_10pct"  # list of labelled cases, or `all`
    labels: dict[Any, Any] | None = None  # {class id: raw mask value(s)}; null: masks hold class ids
    label_threshold: float | None = None  # binary masks with soft edges: raw values above it are class 1
    group_regex: str | None = None  # the part of a case id that names its patient; no patient may be in two splits
    obtain: str = ""  # where the data come from and where they belong, said when they are absent
    unlabelled_includes_labelled: bool = False  # show labelled images in the unlabelled stream too
    image_size: int = 256  # S, pixels; divisible by 16
    labelled_batch: int = 4  # L per process and micro-batch
    unlabelled_batch: int = 4  # U, likewise
    workers: int = 0  # loader processes
    cache: str | None = None  # folder of the decoded cache; $KNOWSAM_CACHE or the user's cache folder if null


@dataclass
class TrainConfig:
    """The loop."""

    max_steps: int = 1000  # optimizer updates
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: str = ""  # backend of torch.compile for the networks, such as inductor; empty: none
    accumulate: int = 1  # micro-batches per update
    clip_norm: float = 0.0  # largest gradient norm per optimizer; 0: no clipping
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"  # what gradients travel in between processes
    validate_every: int = 200  # steps
    validate_outputs: Literal["deployed", "all"] = "all"
    checkpoint_every: int = 200  # steps
    log_every: int = 20  # steps
    snapshot_every: int = 0  # steps between kept copies of the deployed networks, for the report; 0: none are kept
    tensorboard: bool = True
    pictures_every: int | None = None  # steps, at most 64 pictures a run; 0: none; null: with validation
    deterministic: bool = False  # torch's deterministic algorithms (slower on CUDA)
    threads: int = 0  # CPU threads of this process; 0: torch's choice


@dataclass
class EvaluateConfig:
    """Inference on whole cases."""

    batch_size: int = 8  # images or slices
    nsd_tolerance: float = 2.0  # mm when the spacing is known, else pixels


@dataclass
class Config:
    """One experiment."""

    name: str = "experiment"
    run: str | None = None  # run folder; runs/<name>/<method>_<labelled>_seed<seed> if null
    published_code: Any = False  # behave as the published code: true, or a list of rows of docs/fidelity.md
    data: DataConfig = field(default_factory=DataConfig)
    augment: dict[str, Any] = _block()  # knowsam.data.augment:Augmenter
    students: dict[str, Any] = field(default_factory=lambda: {"unet": {"name": "unet"}, "vnet": {"name": "vnet"}})
    fusion: dict[str, Any] | None = _block(name="ham")
    sam: dict[str, Any] = _block(variant="vit_b")  # knowsam.models.sam.variants:build_sam_guide
    method: dict[str, Any] = _block(name="knowsam")
    skd: dict[str, Any] | None = None  # wrap the method in WithSKD: {weight: 1.0, temperature: 10.0}
    optim: dict[str, Any] = field(
        default_factory=lambda: {
            "subnets": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
            "sam": {"name": "adam", "lr": 1e-4},
        }
    )
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def num_classes(self) -> int:
        """K, background included."""
        return len(self.data.classes)

    @property
    def uses_sam(self) -> bool:
        """Whether this experiment builds SAM at all."""
        return self.skd is not None or "sam_guide" in _method_arguments(self)

    @property
    def published_rows(self) -> tuple[str, ...]:
        """Rows of docs/fidelity.md that behave as the published code."""
        return select(self.published_code)

    @property
    def uses_unlabelled(self) -> bool:
        """Whether unlabelled images are shown at all: not to a method that only forwards them for a wrapper's sake."""
        return self.skd is not None or "forward_unlabelled" not in _method_arguments(self)


# Outputs of methods have names too, and must not be mistaken for students'.
RESERVED_STUDENTS = {"fusion", "sam", "teacher", "training"}

# What build.py hands to each constructor; YAML may not set it.
PROVIDED = {
    "students": {"num_classes"},
    "fusion": {"num_classes"},
    "method": {"students", "sam_guide", "max_steps", "forward_unlabelled", "formulas"},
    "skd": {"method", "sam_guide", "max_steps"},
    "optim": {"parameters"},
    "source": {"splits", "num_classes", "labelled", "label_table"},
    "sam": {"image_size", "num_classes", "encoder_type", "decoder_type", "omit"},
    "tuning": {"encoder", "mask_decoder"},
    "prompt": {"num_classes", "embed_dim"},
}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read an experiment.

    Args:
        path: YAML file.
        overrides: dotted words such as ``train.seed=1``.
    Raises:
        NotFoundError: the file, or one that it inherits, is not there.
        ConfigError: everything that is wrong with it, in one message.
    """
    values, where = read_with_parents(Path(path))
    return _finish(values, where, overrides or [])


def parse_config(text: str, where: str | Path) -> Config:
    """A resolved configuration that a run or a checkpoint stores, from its YAML text.

    Args:
        text: what :func:`to_yaml` gave.
        where: name of the file that holds it, for messages.
    Raises:
        ConfigError: everything that this version does not accept.
    """
    return _finish(*_parse_yaml(text, Path(where)), [])


def _finish(values: dict[str, Any], where: dict[str, str], overrides: list[str]) -> Config:
    errors: list[str] = []
    for key, value in _parse_overrides(overrides, errors):
        values = _merge(values, _nest(key, value))
        for dotted in _walk(_nest(key, value)):
            where[dotted] = "command line"
    config = _validate(values, where, errors)
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  {line}" for line in errors))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def beside(path: str) -> Path:
    """A path as it is if it is absolute or exists, else below the checkout."""
    here = Path(path)
    return here if here.is_absolute() or here.exists() else REPOSITORY / here


def data_places(path: str) -> list[Path]:
    """Where data and weights that are named without a whole path may lie, in the order in which one looks.

    Below ``$KNOWSAM_DATA``, then below ``data/`` of the working folder, then of the checkout.
    """
    above = os.environ.get("KNOWSAM_DATA")
    places = [Path(above) / path] if above else []
    return list(dict.fromkeys([*places, Path("data") / path, REPOSITORY / "data" / path]))


# ---------------------------------------------------------------- reading

# What parsing a text that is no YAML, or whose tags don't fit (`!!int ''`, `!!bool x`), may raise.
UNREADABLE = (
    yaml.YAMLError,
    OmegaConfBaseException,
    RecursionError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
)


def read_with_parents(path: Path, children: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """The file merged over what it inherits, and ``file:line`` of every dotted key."""
    if not path.is_file():
        hint = _nearest_file(path)
        by = f" (inherited by {children[-1]})" if children else ""
        raise NotFoundError(f"there is no experiment file {path}{by}", hint=hint)
    if path.resolve() in [child.resolve() for child in children]:
        raise ConfigError(f"{path} inherits itself through {' -> '.join(map(str, children))}")
    values, where = _read_yaml(path)
    parents = values.pop("inherits", None) or []
    where.pop("inherits", None)
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path} inherits: must be a file or a list of files, got {parents!r}")
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for parent in parents:
        above, above_where = read_with_parents(path.parent / parent, (*children, path))
        merged = _merge(merged, above)
        origin |= above_where
    return _merge(merged, values), origin | where


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values of one file, and ``file:line`` of every dotted key."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} holds more than 1 MB: not an experiment file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return _parse_yaml(text, path)


def _parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values, and ``file:line`` of every dotted key."""
    return copy.deepcopy(_parse_once(text, path))


@functools.lru_cache(maxsize=64)
def _parse_once(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    # Kept, because a sweep reads the same experiment for each of its trials.
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True) if text.strip() else {}
        lines = dict(_lines(yaml.compose(text, Loader=yaml.SafeLoader))) if values else {}
    except UNREADABLE as error:
        raise ConfigError(
            f"{path} is not a YAML file that can be read: {str(error) or type(error).__name__}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values, {key: f"{path}:{line}" for key, line in lines.items()}


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            dotted = f"{prefix}{key.value}"
            yield dotted, key.start_mark.line + 1
            yield from _lines(value, f"{dotted}.")


def _parse_overrides(words: list[str], errors: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            errors.append(f"command line: {word!r} is not of the form key.path=value")
            continue
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)["value"]
        except UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            errors.append(f"command line: the value of {key!r} can't be read: {reason}")
            continue
        pairs.append((key, value))
    # A changed `name` replaces its block, so it goes before the settings of the new block, wherever it was written.
    return sorted(pairs, key=lambda pair: not (pair[0].endswith(".name") or "name" in _keys(pair[1])))


def _keys(value: Any) -> Iterable[str]:
    return value if isinstance(value, Mapping) else ()


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, _, rest = key.partition(".")
    return {head: _nest(rest, value) if rest else value}


def _walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}.")


def _merge(parent: Any, child: Any, *, whole: bool = True) -> Any:
    """Child over parent, key by key; but a block whose ``name`` changes is replaced whole.

    ``whole``: these are experiments, not blocks of one; an experiment has a name too, and is no component.
    """
    if not (isinstance(parent, Mapping) and isinstance(child, Mapping)):
        return child
    if not whole and "name" in child and parent.get("name", child["name"]) != child["name"]:
        return dict(child)
    return {**parent, **{key: _merge(parent.get(key), value, whole=False) for key, value in child.items()}}


# ---------------------------------------------------------------- checking


def _validate(values: dict[str, Any], where: dict[str, str], errors: list[str]) -> Config:
    def complain(key: str, text: str) -> None:
        parts = key.split(".")
        place = next((where[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in where), "defaults")
        errors.append(f"{place} {key}: {text}")

    config = Config()
    # Blocks are merged over the defaults by the same rule as files, then checked against their constructors.
    defaults = asdict(config)
    students = values.get("students")
    if isinstance(students, Mapping) and (not students or any("name" in _keys(b) for b in students.values())):
        defaults["students"] = {}  # naming students replaces the default pair; a mere option of one does not
    merged = _merge(defaults, values)
    _fill(config, merged, "", complain)
    _check_blocks(config, complain)
    _check_pairs(config, complain)
    _check_published(config, complain)
    return config


def _fill(target: Any, values: Mapping[str, Any], prefix: str, complain) -> None:
    """Set the fields of ``target``; what is wrong is reported and left at its default, so that checking goes on."""
    known = {f.name: f for f in fields(target)}
    for key, value in values.items():
        if key not in known:
            complain(f"{prefix}{key}", f"unknown key{did_you_mean(str(key), known)}")
            continue
        kind = known[key].type
        if is_dataclass(kind):
            if isinstance(value, Mapping):
                _fill(getattr(target, key), value, f"{prefix}{key}.", complain)
            else:
                complain(f"{prefix}{key}", f"must hold keys and values, got {value!r}")
            continue
        text = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
        problem = components.type_error(value, text.replace("typing.", "").replace("NoneType", "None"))
        if problem:
            complain(f"{prefix}{key}", problem)
        elif isinstance(value, float) and not math.isfinite(value):
            complain(f"{prefix}{key}", f"must be finite, got {value}")
        else:
            setattr(target, key, value)


def _method_arguments(config: Config) -> set[str]:
    """Arguments of the method's constructor; empty when there is no such method, which is reported elsewhere."""
    name = str(config.method.get("name"))
    target = components.METHODS.get(name, name)
    try:
        return set(components.signature(target)) if ":" in target else set()
    except (LookupError, OSError, SyntaxError, ValueError):
        return set()


def default_settings(config: Config) -> dict[str, Any]:
    """Dotted key -> value that a setting has where the experiment does not give it, for all that this one may set.

    Args:
        config: says which components there are, and so which options.
    """
    options: dict[str, Any] = {}
    base = dict(_flatten(asdict(Config())))
    blocks = [
        (key, block, table.get(block["name"], block["name"]), PROVIDED[kind])
        for key, block, table, kind in _named_blocks(config)
    ]
    blocks += [("augment", config.augment, components.AUGMENTER, set())]
    if config.uses_sam:
        blocks += [("sam", config.sam, components.SAM_GUIDE, {*PROVIDED["sam"], "tuning", "prompt"})]
        nested = (("tuning", components.TUNINGS), ("prompt", components.PROMPT_GENERATORS))
        for kind, table in nested:
            block = config.sam.get(kind) or {}
            name = block.get("name", "learned" if kind == "prompt" else None)
            if name is not None:
                blocks.append((f"sam.{kind}", block, table.get(name, name), PROVIDED[kind]))
    if config.skd is not None:
        blocks += [("skd", config.skd, components.SKD, PROVIDED["skd"])]
    for key, block, target, provided in blocks:
        if base.get(f"{key}.name") != block.get("name"):  # another component: the default one's options are not its
            base = {k: v for k, v in base.items() if not k.startswith(f"{key}.") or k == f"{key}.name"}
        for name, parameter in components.signature(target).items():
            if name not in provided and not parameter.required:
                options[f"{key}.{name}"] = _literal(parameter.default)
    written = dict(_flatten(asdict(config)))
    return {**options, **{key: value for key, value in base.items() if key in written}}


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a named constant
        return text
    return list(value) if isinstance(value, tuple) else value


def _named_blocks(config: Config) -> Iterator[tuple[str, Any, Mapping[str, str], str]]:
    """(key, block, table that its name stands in, kind) of the blocks that are one component each."""
    yield "data.source", config.data.source, components.SOURCES, "source"
    yield "method", config.method, components.METHODS, "method"
    yield from ((f"students.{n}", b, components.STUDENTS, "students") for n, b in config.students.items())
    yield from ((f"optim.{n}", b, components.OPTIMIZERS, "optim") for n, b in config.optim.items())
    if config.fusion is not None:
        yield "fusion", config.fusion, components.FUSION_HEADS, "fusion"


def _check_blocks(config: Config, complain) -> None:
    for key, block, table, kind in _named_blocks(config):
        _check_named(key, block, table, kind, complain)
    _check_block("augment", "augment", config.augment, components.AUGMENTER, set(), complain)
    _check_block("sam", "sam", config.sam, components.SAM_GUIDE, PROVIDED["sam"], complain)
    variant = str(config.sam.get("variant", components.SAM_VARIANTS[0]))
    if variant not in components.SAM_VARIANTS:
        near = did_you_mean(variant, components.SAM_VARIANTS)
        complain("sam.variant", f"there is no variant {variant!r}{near}; known: {', '.join(components.SAM_VARIANTS)}")
    nested = (("tuning", components.TUNINGS, None), ("prompt", components.PROMPT_GENERATORS, "learned"))
    for kind, table, default in nested:
        block = config.sam.get(kind)
        if isinstance(block, Mapping):
            _check_named(f"sam.{kind}", {"name": default, **block}, table, kind, complain)
    if config.skd is not None:
        _check_block("skd", "skd", config.skd, components.SKD, PROVIDED["skd"], complain)


def _check_named(key: str, block: Any, table: Mapping[str, str], kind: str, complain) -> None:
    """A block that names a component of ``table``, or one from outside as ``module:name``."""
    if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
        complain(key, f"needs a block with a name, one of {', '.join(table)}; got {block!r}")
        return
    name = block["name"]
    target = table.get(name, name)
    if ":" not in target:
        near = did_you_mean(name, table)
        complain(f"{key}.name", f"there is no {kind} {name!r}{near}; known: {', '.join(table)}")
        return
    _check_block(key, f"{kind} {name!r}", block, target, PROVIDED[kind], complain)


def _check_block(key: str, title: str, block: Mapping[str, Any], target: str, provided: set[str], complain) -> None:
    try:
        parameters = components.signature(target)
    except (LookupError, OSError, SyntaxError, ValueError) as error:
        complain(f"{key}.name", str(error))
        return
    allowed = {name: p for name, p in parameters.items() if name not in provided}
    for name, value in block.items():
        if name == "name":
            continue
        if name not in allowed:
            taken = " (it is set by the experiment itself)" if name in parameters else ""
            complain(f"{key}.{name}", f"{title} has no parameter {name!r}{taken}{did_you_mean(str(name), allowed)}")
        elif problem := components.type_error(value, allowed[name].annotation):
            complain(f"{key}.{name}", problem)
        elif isinstance(value, float) and not math.isfinite(value):
            complain(f"{key}.{name}", f"must be finite, got {value}")
    missing = [name for name, p in allowed.items() if p.required and name not in block]
    if missing:
        complain(key, f"{title} needs {', '.join(missing)}")


def _check_pairs(config: Config, complain) -> None:
    """Impossible values and pairs of settings; each names the field to change."""
    data, train = config.data, config.train
    method, arguments = str(config.method.get("name")), _method_arguments(config)
    if len(data.classes) < 2:
        complain("data.classes", f"needs background and at least one class, got {data.classes}")
    if "mean" in data.classes:
        complain("data.classes", "a class cannot be called 'mean': result tables call the mean over classes so")
    if data.label_threshold is not None and data.labels is not None:
        complain("data.label_threshold", "excludes data.labels; set one of them to null")
    if len(set(data.classes)) != len(data.classes):
        complain("data.classes", f"names a class twice: {data.classes}")
    if data.image_size < 32 or data.image_size % 16:
        complain("data.image_size", f"must be at least 32 and divisible by 16, got {data.image_size}")
    for key, value, least in (
        ("data.labelled_batch", data.labelled_batch, 1),
        ("data.unlabelled_batch", data.unlabelled_batch, 0),
        ("data.workers", data.workers, 0),
        ("train.max_steps", train.max_steps, 1),
        ("train.accumulate", train.accumulate, 1),
        ("train.clip_norm", train.clip_norm, 0),
        ("train.validate_every", train.validate_every, 1),
        ("train.checkpoint_every", train.checkpoint_every, 1),
        ("train.log_every", train.log_every, 1),
        ("train.snapshot_every", train.snapshot_every, 0),
        ("train.pictures_every", train.pictures_every or 0, 0),
        ("train.threads", train.threads, 0),
        ("evaluate.batch_size", config.evaluate.batch_size, 1),
    ):
        if value < least:
            complain(key, f"must be at least {least}, got {value}")
    if train.precision == "fp16" and train.device == "cpu":
        complain("train.precision", "fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    if "sam_guide" in arguments and config.skd is not None:
        complain("skd", f"method {method!r} already distils from SAM; set skd: null or another method")
    if method == "knowsam" and (len(config.students) != 2 or config.fusion is None):
        complain("students", f"method 'knowsam' co-trains 2 students with a fusion head, got {len(config.students)}")
    if config.fusion is not None and len(config.students) != 2:
        complain("fusion", f"merges exactly 2 students, got {len(config.students)}; set fusion: null")
    if not config.students:
        complain("students", "needs at least one student")
    for student in config.students:
        if not str(student).isidentifier() or student in RESERVED_STUDENTS or hasattr(dict, str(student)):
            allowed = f"a plain word other than {', '.join(sorted(RESERVED_STUDENTS))}"
            complain(f"students.{student}", f"a student cannot be called {student!r}; allowed is {allowed}")
    if method in ("knowsam", "mean_teacher") and data.unlabelled_batch == 0:
        complain("data.unlabelled_batch", f"method {method!r} learns from unlabelled images, got 0")
    if "subnets" not in config.optim or (config.uses_sam and "sam" not in config.optim):
        complain("optim", f"needs a block for each of subnets{' and sam' if config.uses_sam else ''}")
    for group, block in config.optim.items():
        rate = block.get("lr", 1.0) if isinstance(block, Mapping) else 1.0
        if isinstance(rate, int | float) and not rate > 0:
            complain(f"optim.{group}.lr", f"must be > 0, got {rate}")
    if data.source.get("name") in ("image_folder", "h5_slices") and not data.splits:
        complain("data.splits", "names the folder of split lists (train.txt, val.txt, ...), which files on disk need")


def _check_published(config: Config, complain) -> None:
    """The rows exist, there is what each of them changes, and no option says otherwise."""
    try:
        rows = config.published_rows
    except ConfigError as error:
        complain("published_code", f"{error} ({error.hint})")
        config.published_code = False
        return
    fusion = (config.fusion or {}).get("name")
    tuning = config.sam.get("tuning")
    absent = {
        "method": "" if "formulas" in _method_arguments(config) else "method.name: knowsam",
        "fusion": "" if fusion == "ham" else "fusion: {name: ham}",
        "sam": "" if config.uses_sam else "a method that uses SAM",
        "adapters": ""
        if isinstance(tuning, Mapping) and tuning.get("name") == "adapter"
        else "sam.tuning: {name: adapter}",
    }
    for key, text in problems(rows, absent, dict(_flatten({"method": config.method, "sam": config.sam}))):
        complain(key, text)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("experiments")
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else ""

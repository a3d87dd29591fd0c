"""What is wrong with an experiment, all of it at once: types, names, arguments of components, impossible pairs."""

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from knowsam import components
from knowsam.compat.rows import problems
from knowsam.config.reading import has_name, merge
from knowsam.config.schema import Config, method_arguments
from knowsam.errors import ConfigError
from knowsam.text import did_you_mean

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


def check(values: dict[str, Any], where: dict[str, str], errors: list[str]) -> Config:
    """The experiment that the values make.

    Args:
        values: what files and overrides say, over no defaults yet.
        where: place of every dotted key in ``values``, for messages.
        errors: gets a line for everything that is wrong; the result is of use only if none was added.
    """

    def complain(key: str, text: str) -> None:
        parts = key.split(".")
        place = next((where[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in where), "defaults")
        errors.append(f"{place} {key}: {text}")

    config = Config()
    # Blocks are merged over the defaults by the same rule as files, then checked against their constructors.
    defaults = asdict(config)
    students = values.get("students")
    if isinstance(students, Mapping) and (not students or any(has_name(b) for b in students.values())):
        defaults["students"] = {}  # naming students replaces the default pair; a mere option of one does not
    merged = merge(defaults, values)
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
    method, arguments = str(config.method.get("name")), method_arguments(config)
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
    if config.evaluate.nsd_tolerance < 0:
        complain("evaluate.nsd_tolerance", f"must be at least 0, got {config.evaluate.nsd_tolerance}")
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
        "method": "" if "formulas" in method_arguments(config) else "method.name: knowsam",
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

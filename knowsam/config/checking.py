"""What is wrong with an experiment, all of it at once: types, names, arguments of components, impossible pairs."""

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from knowsam import components
from knowsam.compat.rows import problems
from knowsam.config.reading import has_name, merge, names_students, nest
from knowsam.config.schema import Config, component
from knowsam.errors import ConfigError
from knowsam.text import did_you_mean

Complain = Callable[[str, str], None]
"""Dotted key, what is wrong with it."""

# Outputs of methods have names too, and must not be mistaken for students'.
RESERVED_STUDENTS = {"fusion", "sam", "teacher", "training"}

# Settings of knowsam 0.1 that are called otherwise now.
MOVED = {
    "sam.variant": "sam.encoder: {name: vit_b}, or vit_l, vit_h, vit_small, vit_tiny",
    "sam.checkpointing": "sam.encoder.checkpointing",
    "method.skd_weight": "method.skd.weight",
    "method.skd_temperature": "method.skd.temperature",
    "method.skd_rampup": "method.skd.rampup",
    "method.skd_confidence_threshold": "method.skd.confidence_threshold",
    "method.sam_teacher_mode": "method.skd.teacher_mode",
    "data.source.intensity": "data.intensity.name, with as_is for dtype",
    "method.sam_view": "method.skd.view",
    "method.sam_gradient": "method.skd.gradient",
    "method.consistency_weight": "method.consistency.weight",
    "method.consistency_rampup": "method.consistency.rampup",
    "method.mixing": "method.mix: null for none",
    "method.mix_start": "method.mix.start",
    "method.mix_weight": "method.mix.weight",
    "method.mix_rampup": "method.mix.rampup",
    "method.mix_grid": "method.mix.grid",
    "method.mix_cells": "method.mix.cells",
    "method.mix_pick": "method.mix.pick",
    "method.mix_confidence_threshold": "method.mix.confidence_threshold",
    "skd.sam_teacher_mode": "skd.teacher_mode",
    "skd.sam_gradient": "skd.gradient",
}

INIT_PARTS = ("students", "sam")
INIT_KEYS = {"from", "part", "checkpoint"}


def check(
    values: dict[str, Any], late: list[tuple[str, Any]], where: dict[str, str], errors: list[str], notes: list[str]
) -> Config:
    """The experiment that the values make.

    Args:
        values: what files and overrides say, over no defaults yet.
        late: dotted settings of single students, over those that the method has.
        where: place of every dotted key in ``values``, for messages.
        errors: gets a line for everything that is wrong; the result is of use only if none was added.
        notes: gets a line for every setting without effect.
    """

    def complain(key: str, text: str) -> None:
        parts = key.split(".")
        place = next((where[k] for n in range(len(parts), 0, -1) if (k := ".".join(parts[:n])) in where), "defaults")
        errors.append(f"{place} {key}: {text}")

    config = Config()
    # Blocks are merged over the defaults by the same rule as files, then checked against their constructors.
    defaults = asdict(config)
    merged = merge(defaults, {key: value for key, value in values.items() if key != "students"})
    _fill_from_method(merged, values, late, notes)
    _fill(config, merged, "", complain)
    _check_blocks(config, complain)
    _check_pairs(config, complain)
    _check_init(config, complain)
    _check_published(config, complain)
    return config


def _fill_from_method(
    merged: dict[str, Any], values: Mapping[str, Any], late: list[tuple[str, Any]], notes: list[str]
) -> None:
    """Students, fusion head and optimizers of its own groups as the method declares them, if nobody says otherwise."""
    block = merged.get("method")
    target = component(components.METHODS, block) if isinstance(block, Mapping) else ""

    def declared(name: str) -> Any:
        try:
            return components.literal(target, name)
        except (LookupError, OSError, SyntaxError, ValueError):
            return None  # such a method is complained of where blocks are checked

    given, own = values.get("students"), declared("default_students")
    students: dict[str, Any] = {"unet": {"name": "unet"}} if own is None else dict(own)
    if given is not None and not isinstance(given, Mapping):
        merged["students"] = given  # complained of by its type
    else:
        if given is not None and names_students(given):
            students = dict(given)
        for name in given or {}:
            if name not in students:
                notes.append(f"students.{name} has no effect: {block_name(block)} trains {', '.join(students)}")
        students = merge(students, {name: options for name, options in (given or {}).items() if name in students})
        for key, value in late:
            students = merge({"students": students}, nest(key, value), whole=False)["students"]
        merged["students"] = students
    head, fusion = declared("default_fusion"), values.get("fusion")
    if "fusion" not in values:
        merged["fusion"] = head
    elif isinstance(fusion, Mapping) and not has_name(fusion):  # options of a head, where the method has one
        merged["fusion"] = None if head is None else {**head, **fusion}
        if head is None:
            notes.append(
                f"fusion has no effect: {block_name(block)} has no fusion head of its own; name one to have it"
            )
    merged["optim"] = merge(dict(declared("default_optim") or {}), merged.get("optim"))


def block_name(block: Any) -> str:
    """The name that a block gives, for messages."""
    return str(block.get("name")) if isinstance(block, Mapping) else str(block)


def _fill(target: Any, values: Mapping[str, Any], prefix: str, complain: Complain) -> None:
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

    Nothing of SAM where the experiment has none, and nothing of options that are off (null).

    Args:
        config: says which components there are, and so which options.
    """
    options: dict[str, Any] = {}
    base = dict(_flatten(asdict(Config())))
    blocks = [
        (key, block, component(table, block), kind)
        for key, block, table, kind in _named_blocks(config)
        if config.uses_sam or kind not in components.SAM_PARTS
    ]
    if config.uses_sam:
        blocks.append(("sam", config.sam, components.SAM_GUIDE, "sam"))
        options |= {f"sam.{part}.name": name for part, (_, name) in components.SAM_PARTS.items() if name is not None}
    if config.skd is not None:
        blocks.append(("skd", config.skd, components.SKD, "skd"))
    for key, block, target, kind in blocks:
        if base.get(f"{key}.name") != block.get("name"):  # another component: the default one's options are not its
            base = {k: v for k, v in base.items() if not k.startswith(f"{key}.") or k == f"{key}.name"}
        nested = set(components.SAM_PARTS) if kind == "sam" else set()
        options |= _defaults(key, target, components.OFFERED[kind] | nested)
    written = dict(_flatten(asdict(config)))
    off = tuple(f"{key}." for key, value in written.items() if value is None)
    options = {key: value for key, value in options.items() if not key.startswith(off)}
    return {**options, **{key: value for key, value in base.items() if key in written}}


def _defaults(key: str, target: str, provided: frozenset[str] | set[str]) -> dict[str, Any]:
    """Defaults of a constructor's arguments by dotted key, those of its options one by one."""
    found: dict[str, Any] = {}
    for name, parameter in components.signature(target).items():
        if name in provided or parameter.required:
            continue
        if parameter.options and parameter.default != "None":
            found |= _defaults(f"{key}.{name}", parameter.options, frozenset())
        else:
            found[f"{key}.{name}"] = _literal(parameter.default)
    return found


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a named constant
        return text
    return list(value) if isinstance(value, tuple) else value


def _named_blocks(config: Config) -> Iterator[tuple[str, Any, Mapping[str, str], str]]:
    """(key, block, table that its name stands in, kind) of the blocks that are one component each."""
    if config.data.sources is None:
        yield "data.source", config.data.source, components.SOURCES, "source"
    for name, block in (config.data.sources or {}).items():
        if isinstance(block, Mapping) and "source" in block:
            yield f"data.sources.{name}.source", block["source"], components.SOURCES, "source"
    yield "data.intensity", config.data.intensity, components.INTENSITIES, "intensity"
    yield "method", config.method, components.METHODS, "method"
    yield "augment", {"name": "standard", **config.augment}, components.AUGMENTERS, "augment"
    yield from ((f"students.{n}", b, components.STUDENTS, "students") for n, b in config.students.items())
    yield from ((f"optim.{n}", b, components.OPTIMIZERS, "optim") for n, b in config.optim.items())
    if config.fusion is not None:
        yield "fusion", config.fusion, components.FUSION_HEADS, "fusion"
    for kind, (table, default) in components.SAM_PARTS.items():
        block = config.sam.get(kind)
        if isinstance(block, list):
            yield from ((f"sam.{kind}", entry, table, kind) for entry in block)
        elif block is not None or default is not None:
            named = {"name": default, **block} if isinstance(block, Mapping) else block or {"name": default}
            yield f"sam.{kind}", named, table, kind


def _check_blocks(config: Config, complain: Complain) -> None:
    for key, block, table, kind in _named_blocks(config):
        _check_named(key, block, table, kind, complain)
    _check_block("sam", "sam", config.sam, components.SAM_GUIDE, components.OFFERED["sam"], complain)
    if config.skd is not None:
        _check_block("skd", "skd", config.skd, components.SKD, components.OFFERED["skd"], complain)


def _shown(block: Any) -> str:
    if not isinstance(block, Mapping):
        return repr(block)
    given = {key: value for key, value in block.items() if value is not None}
    return f"{given!r} (of a list of several, an entry is set by its number: 0, 1, ...)" if given else "nothing"


def _check_named(key: str, block: Any, table: Mapping[str, str], kind: str, complain: Complain) -> None:
    """A block that names a component of ``table``, or one from outside as ``module:name``."""
    if not isinstance(block, Mapping) or not isinstance(block.get("name"), str):
        complain(key, f"needs a block with a name, one of {', '.join(table)}; got {_shown(block)}")
        return
    name = block["name"]
    target = table.get(name, name)
    if ":" not in target:
        near = did_you_mean(name, table)
        complain(f"{key}.name", f"there is no {kind} {name!r}{near}; known: {', '.join(table)}")
        return
    _check_block(key, f"{kind} {name!r}", block, target, components.OFFERED[kind], complain)


def _check_block(
    key: str, title: str, block: Mapping[str, Any], target: str, provided: frozenset[str], complain: Complain
) -> None:
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
            if not parameters.open or name in parameters:
                advice = " (it is set by the experiment itself)" if name in parameters else ""
                moved = MOVED.get(f"{key}.{name}")
                advice += f"; it is now {moved}" if moved else did_you_mean(str(name), allowed)
                complain(f"{key}.{name}", f"{title} has no parameter {name!r}{advice}")
        elif allowed[name].options and isinstance(value, Mapping):
            _check_block(f"{key}.{name}", f"{title}: {name}", value, allowed[name].options, frozenset(), complain)
        elif allowed[name].options and not (value is None and "None" in allowed[name].annotation):
            complain(f"{key}.{name}", f"must hold keys and values, got {value!r}")
        elif problem := components.type_error(value, allowed[name].annotation):
            complain(f"{key}.{name}", problem)
        elif isinstance(value, float) and not math.isfinite(value):
            complain(f"{key}.{name}", f"must be finite, got {value}")
    missing = [name for name, p in allowed.items() if p.required and name not in block]
    if missing:
        complain(key, f"{title} needs {', '.join(missing)}")


def _check_pairs(config: Config, complain: Complain) -> None:
    """Impossible values and pairs of settings; each names the field to change."""
    data, train = config.data, config.train
    if len(data.classes) < 2:
        complain("data.classes", f"needs background and at least one class, got {data.classes}")
    if "mean" in data.classes:
        complain("data.classes", "a class cannot be called 'mean': result tables call the mean over classes so")
    if data.label_threshold is not None and data.labels is not None:
        complain("data.label_threshold", "excludes data.labels; set one of them to null")
    if len(set(data.classes)) != len(data.classes):
        complain("data.classes", f"names a class twice: {data.classes}")
    sides = data.patch_size
    if sides is not None and (len(sides) not in (2, 3) or any(side < 4 for side in sides)):
        complain("data.patch_size", f"is {sides}; allowed are [H, W] or [D, H, W], each at least 4, or null")
    if data.channels < 1:
        complain("data.channels", f"must be at least 1, got {data.channels}")
    for key, share in (("data.foreground", data.foreground), ("evaluate.overlap", config.evaluate.overlap)):
        if not 0 <= share <= 1 or (share == 1 and key == "evaluate.overlap"):
            complain(key, f"must lie in 0..1, got {share}")
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
    if config.evaluate.postprocess is not None:
        from knowsam.inference import postprocess

        try:
            postprocess.check(config.evaluate.postprocess)
        except ConfigError as error:
            complain("evaluate.postprocess", str(error).removeprefix("evaluate.postprocess").lstrip(": "))
    if train.precision == "fp16" and train.device == "cpu":
        complain("train.precision", "fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    _check_needs(config, complain)
    for student in config.students:
        if not str(student).isidentifier() or student in RESERVED_STUDENTS or hasattr(dict, str(student)):
            allowed = f"a plain word other than {', '.join(sorted(RESERVED_STUDENTS))}"
            complain(f"students.{student}", f"a student cannot be called {student!r}; allowed is {allowed}")
    for group, block in config.optim.items():
        rate = block.get("lr", 1.0) if isinstance(block, Mapping) else 1.0
        if isinstance(rate, int | float) and not rate > 0:
            complain(f"optim.{group}.lr", f"must be > 0, got {rate}")
    _check_sources(data, complain)
    with suppress(LookupError, OSError, SyntaxError, ValueError):  # of a source that is complained of already
        needs_lists = "splits" in components.signature(component(components.SOURCES, data.source))
        if needs_lists and not data.splits and data.sources is None:
            complain(
                "data.splits", "names the folder of split lists (train.txt, val.txt, ...), which files on disk need"
            )


OF_A_SOURCE = (
    *("source", "splits", "labelled", "labels", "label_threshold", "ignore", "group_regex", "obtain", "reading"),
    *("weight", "valid_classes"),
)
"""Keys of a block of ``data.sources``; all else of ``data`` is shared."""


def _check_sources(data: Any, complain: Complain) -> None:
    for name, block in (data.sources or {}).items():
        key = f"data.sources.{name}"
        if not isinstance(block, Mapping) or "source" not in block:
            complain(key, f"needs a source, such as {{source: {{name: image_folder, root: ...}}}}, got {block!r}")
            continue
        if "/" in name:
            complain(key, "a data set's name has no '/': case ids begin with it")
        for unknown in sorted(set(block) - set(OF_A_SOURCE)):
            complain(f"{key}.{unknown}", f"is not a key of a data set; allowed are {', '.join(OF_A_SOURCE)}")
    if data.sources is not None and len(data.sources) < 2:
        complain("data.sources", f"holds {len(data.sources)} data sets; give two or more, or data.source")


def _check_needs(config: Config, complain: Complain) -> None:
    """What the method declares that it needs is there."""
    method = block_name(config.method)
    try:
        target = component(components.METHODS, config.method)
        needs, takes = config.needs, components.signature(target)
    except ValueError as error:
        complain("method.name", f"{method!r} declares needs that cannot be met: {error}")
        return
    except (LookupError, OSError, SyntaxError):
        return  # complained of where blocks are checked
    count = len(config.students)
    if needs.sam == "guide" and config.skd is not None:
        complain("skd", f"method {method!r} already distils from SAM; set skd: null or another method")
    if needs.students and count != needs.students:
        wants = "1 student" if needs.students == 1 else f"{needs.students} students"
        head = " and a fusion head" if needs.fusion else ""
        complain("students", f"method {method!r} trains {wants}{head}, got {count}")
    if needs.fusion and config.fusion is None:
        complain("fusion", f"method {method!r} needs a fusion head, such as fusion: {{name: ham}}")
    if config.fusion is not None and count != 2:
        complain("fusion", f"merges exactly 2 students, got {count}; set fusion: null")
    if not config.students and "students" in takes:
        complain("students", "needs at least one student")
    if needs.unlabelled and config.data.unlabelled_batch == 0:
        what = "SAM teaches" if config.skd is not None else f"method {method!r} learns from"
        complain("data.unlabelled_batch", f"{what} unlabelled images, got 0")
    if config.spatial_dims not in needs.spatial_dims:
        allowed = " or ".join(f"{d}-D" for d in needs.spatial_dims)
        complain("method.name", f"method {method!r} works on {allowed} images; these are {config.spatial_dims}-D")


def _check_init(config: Config, complain: Complain) -> None:
    """``init`` becomes a list of blocks with ``from``, ``part`` and ``checkpoint``."""
    blocks = config.init if isinstance(config.init, list) else [] if config.init is None else [config.init]
    for block in blocks:
        if not isinstance(block, Mapping) or not isinstance(block.get("from"), str) or "part" not in block:
            complain("init", f"needs {{from: RUN, part: {' or '.join(INIT_PARTS)}}}, got {block!r}")
        elif unknown := sorted(set(map(str, block)) - INIT_KEYS):
            complain(f"init.{unknown[0]}", f"unknown key{did_you_mean(unknown[0], INIT_KEYS)}")
        elif block["part"] not in INIT_PARTS:
            complain("init.part", f"must be one of {', '.join(INIT_PARTS)}, got {block['part']!r}")
        elif block.get("checkpoint", "best") not in ("best", "last"):
            complain("init.checkpoint", f"must be best or last, got {block['checkpoint']!r}")


def _check_published(config: Config, complain: Complain) -> None:
    """The rows exist, there is what each of them changes, and no option says otherwise."""
    try:
        rows = config.published_rows
    except ConfigError as error:
        complain("published_code", f"{error} ({error.hint})")
        config.published_code = False
        return
    fusion = (config.fusion or {}).get("name")
    tunings = config.sam.get("tuning") or []
    adapters = any(block_name(t) == "adapter" for t in (tunings if isinstance(tunings, list) else [tunings]))
    try:
        has_rows, uses_sam = (
            components.literal(component(components.METHODS, config.method), "published_rows"),
            config.uses_sam,
        )
    except (LookupError, OSError, SyntaxError, ValueError):
        return  # complained of where blocks are checked
    absent = {
        "method": "" if has_rows else "method.name: knowsam",
        "fusion": "" if fusion == "ham" else "fusion: {name: ham}",
        "sam": "" if uses_sam else "a method that uses SAM",
        "adapters": "" if adapters else "sam.tuning: {name: adapter}",
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

"""From files and dotted words to nested values: ``inherits:``, overrides, and the place where each key was written."""

import copy
import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knowsam.errors import ConfigError, NotFoundError

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
        merged = merge(merged, above)
        origin |= above_where
    return merge(merged, values), origin | where


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
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values, and ``file:line`` of every dotted key."""
    return copy.deepcopy(_parse_once(text, path))


@functools.lru_cache(maxsize=64)
def _parse_once(text: str, path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    # Kept, because a sweep reads the same experiment for each of its trials.
    try:
        values: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=True) if text.strip() else {}
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


def parse_overrides(words: list[str], errors: list[str]) -> list[tuple[str, Any]]:
    """Words of the command line to dotted keys and their values, changed names first.

    Args:
        words: ``key.path=value`` each, the value as YAML; ``--`` before it is passed over.
        errors: takes what is wrong with a word, a line each; such a word is left out.
    """
    pairs = []
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals or not key or any(not part for part in key.split(".")):
            errors.append(f"command line: {word!r} is not of the form key.path=value")
            continue
        try:
            read: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=True)
        except UNREADABLE as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            errors.append(f"command line: the value of {key!r} can't be read: {reason}")
            continue
        pairs.append((key, read["value"]))
    # A changed `name` replaces its block, so it goes before the settings of the new block, wherever it was written.
    return sorted(pairs, key=lambda pair: not (pair[0].endswith(".name") or has_name(pair[1])))


def has_name(block: Any) -> bool:
    """Whether this is a block that names its component."""
    return isinstance(block, Mapping) and "name" in block


def nest(key: str, value: Any) -> dict[str, Any]:
    """``("a.b", 1)`` -> ``{"a": {"b": 1}}``."""
    head, _, rest = key.partition(".")
    return {head: nest(rest, value) if rest else value}


def walk(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of all blocks and values, a block before what is in it.

    Args:
        values: blocks in blocks.
        prefix: what each key begins with.
    """
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from walk(value, f"{prefix}{key}.")


def merge(parent: Any, child: Any, *, whole: bool = True) -> Any:
    """Child over parent, key by key; but a block whose ``name`` changes is replaced whole, and so is a table by number.

    Such a table (``data.labels``: what each class is written as) means something only as a whole: with one class fewer,
    what the parent said of the last one would stay.

    ``whole``: these are experiments, not blocks of one; an experiment has a name too, and is no component. Its students
    are replaced whole by a child that names some, so that one, two unlike ones or three are equally easy to have.

    Options over a list of blocks (``sam.tuning``) go to the only one there is, or to those that they number.
    """
    if isinstance(parent, list) and isinstance(child, Mapping) and child and "name" not in child:
        return _into_list(parent, child)
    if not (isinstance(parent, Mapping) and isinstance(child, Mapping)):
        return child
    if child and not any(isinstance(key, str) for key in child):
        return dict(child)
    if not whole and "name" in child and parent.get("name", child["name"]) != child["name"]:
        return dict(child)
    return {
        **parent,
        **{
            key: value
            if whole and key == "students" and names_students(value)
            else merge(parent.get(key), value, whole=False)
            for key, value in child.items()
        },
    }


def _into_list(blocks: list[Any], child: Mapping[Any, Any]) -> Any:
    numbered = {int(key): value for key, value in child.items() if str(key).isdecimal()}
    if len(numbered) < len(child):
        return [merge(blocks[0], child, whole=False)] if len(blocks) == 1 else child
    if max(numbered) >= len(blocks):
        return child
    return [merge(block, numbered[i], whole=False) if i in numbered else block for i, block in enumerate(blocks)]


def names_students(block: Any) -> bool:
    """Whether a ``students`` block names networks, and so replaces another one whole, or sets options of some."""
    return isinstance(block, Mapping) and (not block or any(has_name(entry) for entry in block.values()))


def _nearest_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("experiments")
    same = [p for p in (path.with_name(f"{path.name}.yaml"), Path("experiments") / f"{path.stem}.yaml") if p.is_file()]
    if same:
        return f"did you mean {same[0]}?"
    names = [p.name for p in folder.glob("*.yaml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {folder / near[0]}?" if near else ""

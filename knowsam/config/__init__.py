"""The experiment configuration: defaults <- YAML (with ``inherits:``) <- dotted words of the command line.

Everything wrong is reported at once, each with its file, line, key and the nearest right key. Blocks that name a
component are checked against that component's constructor: its signature is the schema.
"""

import copy
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from knowsam.config.checking import check
from knowsam.config.reading import merge, nest, parse_overrides, parse_yaml, read_with_parents, walk
from knowsam.config.schema import Config, component
from knowsam.errors import ConfigError

__all__ = [
    "Config",
    "beside",
    "component",
    "data_places",
    "load_config",
    "load_text",
    "parse_config",
    "to_yaml",
]

REPOSITORY = Path(__file__).resolve().parents[2]


def load_config(path: str | Path, overrides: list[str] | None = None, notes: list[str] | None = None) -> Config:
    """Read an experiment.

    Args:
        path: YAML file.
        overrides: dotted settings such as ``train.seed=1``.
        notes: gets a line for every setting that has no effect in this experiment.
    Raises:
        NotFoundError: the file, or one that it inherits, is not there.
        ConfigError: everything that is wrong with it, in one message.
    """
    values, where = read_with_parents(Path(path))
    return _finish(values, where, overrides or [], [] if notes is None else notes)


def load_text(values: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """An experiment from values in the place of a file.

    Args:
        values: nested as in an experiment file.
        overrides: dotted settings.
    Raises:
        ConfigError: everything that is wrong with it.
    """
    return _finish(copy.deepcopy(values), {}, overrides or [], [])


def parse_config(text: str, where: str | Path) -> Config:
    """A resolved configuration that a run or a checkpoint stores, from its YAML text.

    Args:
        text: what :func:`to_yaml` gave.
        where: name of the file that holds it, for messages.
    Raises:
        ConfigError: everything that this version does not accept.
    """
    return _finish(*parse_yaml(text, Path(where)), [], [])


def _finish(values: dict[str, Any], where: dict[str, str], overrides: list[str], notes: list[str]) -> Config:
    errors: list[str] = []
    # A student that one dotted setting names takes a place among the others, whose set depends on the method.
    late: list[tuple[str, Any]] = []
    for key, value in parse_overrides(overrides, errors):
        if key.startswith("students."):
            late.append((key, value))
        else:
            values = merge(values, nest(key, value))
        for dotted in walk(nest(key, value)):
            where[dotted] = "command line"
    config = check(values, late, where, errors, notes)
    if errors:
        count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  {line}" for line in errors))
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that :func:`load_config` reads back to the same configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def modules_named(config: Config) -> set[str]:
    """Modules whose classes the experiment names as ``module:Class``."""

    def names(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(name := value.get("name"), str) and ":" in name:
                yield name.partition(":")[0]
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            yield from names(item)

    return set(names(asdict(config)))


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
    places.append(Path("data") / path)
    if Path.cwd() != REPOSITORY:
        places.append(REPOSITORY / "data" / path)
    return list(dict.fromkeys(places))

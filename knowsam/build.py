"""From a configuration to objects: the only place that reads the configuration and calls constructors."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from knowsam import components
from knowsam.compat import published
from knowsam.config import Config, beside, data_places
from knowsam.data.cache import build_cache
from knowsam.data.source import Source
from knowsam.data.streams import TwoStreams, derive_seed
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.errors import ConfigError, KnowsamError, NotFoundError
from knowsam.methods.base import SSLMethod
from knowsam.models.students import Students
from knowsam.pretrained import where_to_get

if TYPE_CHECKING:
    from knowsam.data.augment import Augmenter
    from knowsam.data.splits import Splits
    from knowsam.errors import Fault
    from knowsam.models.sam import LoadReport


@dataclass
class BuiltMethod:
    """A method and, if it holds SAM, what became of SAM's official weights."""

    method: SSLMethod
    load_report: "LoadReport | None"


class AbsentSAM(nn.Module):
    """Stands where SAM would be in a method that is only deployed: no weights, and no answer."""

    def forward(self, images: torch.Tensor, coarse_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Raises RuntimeError: whoever asks wanted the whole method."""
        raise RuntimeError("this method was built without SAM, to be deployed; build it whole to ask SAM")


def build_source(config: Config, splits: "Splits | None" = None) -> Source:
    """The dataset with its splits, checked.

    Args:
        splits: use these instead of the lists that the configuration names.
    """
    data = config.data
    arguments = {key: value for key, value in data.source.items() if key != "name"}
    target = _target(components.SOURCES, data.source)
    accepted = components.signature(target)
    if "root" in arguments:
        arguments["root"] = _data_root(arguments["root"], data.obtain)
    if "splits" in accepted:
        from knowsam.data.splits import load_splits

        arguments["splits"] = splits or _read_splits(config, load_splits)
    if "label_table" in accepted:
        from knowsam.data.labels import LabelTable

        arguments["label_table"] = LabelTable(data.labels, config.num_classes, threshold=data.label_threshold)
    if "labelled" in accepted:
        arguments["labelled"] = data.labelled
    return _construct("data.source", target, num_classes=config.num_classes, **arguments)


def inspect_splits(config: Config) -> "tuple[Splits, list[Fault]] | None":
    """The split lists as far as they can be used, and what is wrong with them; None for data without lists."""
    from knowsam.data.splits import inspect_splits as inspect

    if "splits" not in components.signature(_target(components.SOURCES, config.data.source)):
        return None
    return _read_splits(config, inspect)


def _read_splits(config: Config, read: Callable[..., Any]) -> Any:
    data = config.data
    folder = beside(str(data.splits))
    try:
        return read(folder, data.labelled, group_regex=data.group_regex)
    except NotFoundError as error:
        no_lists = not any(folder.glob("*.txt"))
        raise NotFoundError(str(error), hint=(no_lists and data.obtain) or error.hint) from error


def build_streams(config: Config, source: Source, *, rank: int = 0, world_size: int = 1, progress=None) -> TwoStreams:
    """The labelled and unlabelled streams over the decoded cache; the cache is built if need be.

    A method that can do without unlabelled images, and that no SAM teaches, gets none: U = 0.
    """
    data = config.data
    unlabelled_batch = data.unlabelled_batch if config.uses_unlabelled else 0
    labelled_ids = source.labelled_ids()
    known = set() if data.unlabelled_includes_labelled else set(labelled_ids)
    unlabelled_ids = [i for i in source.train_ids() if i not in known]
    settings = {"image_size": data.image_size, "folder": data.cache, "progress": progress}
    labelled = build_cache(source, labelled_ids, masks=True, **settings)
    needs_unlabelled = unlabelled_batch and unlabelled_ids
    unlabelled = build_cache(source, unlabelled_ids, masks=False, **settings) if needs_unlabelled else None
    return TwoStreams(
        labelled,
        unlabelled,
        labelled_batch=data.labelled_batch,
        unlabelled_batch=unlabelled_batch,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
    )


def build_augmenter(config: Config) -> "Augmenter":
    """What makes weak and strong views."""
    return _construct("augment", components.AUGMENTER, **config.augment)


def build_students(config: Config) -> Students:
    """The students and, if there is one, the fusion head, from random weights."""
    classes, rows = config.num_classes, config.published_rows
    subnets = {
        name: _construct(
            f"students.{name}", _target(components.STUDENTS, block), num_classes=classes, **_options(block)
        )
        for name, block in config.students.items()
    }
    for name, subnet in subnets.items():
        if config.data.image_size % (divisor := getattr(subnet, "size_divisor", 1)):
            raise ConfigError(
                f"students.{name}: data.image_size must be divisible by {divisor}, got {config.data.image_size}",
                hint="Choose another size, or fewer levels.",
            )
    fusion = None
    if config.fusion is not None:
        target = _target(components.FUSION_HEADS, config.fusion)
        target, as_published = published.fusion_head(rows, target)
        fusion = _construct("fusion", target, num_classes=classes, **_options(config.fusion), **as_published)
    return Students(subnets, fusion, **published.students_arguments(rows))


def build_method(config: Config, *, sam: bool = True) -> BuiltMethod:
    """The method with its networks on the CPU. Seeded: the students start alike whatever the method around them.

    Args:
        config: the experiment.
        sam: False puts `AbsentSAM` where SAM would be: enough for ``deployable``, and a tenth of the size.
    """
    seed, max_steps = config.train.seed, config.train.max_steps
    rows = config.published_rows
    config = _with_options(config, published.settings(rows))
    torch.manual_seed(derive_seed(seed, "students") & 0xFFFFFFFF)
    students = build_students(config)
    guide, report = None, None
    if config.uses_sam and not sam:
        guide = AbsentSAM()
    elif config.uses_sam:
        torch.manual_seed(derive_seed(seed, "sam") & 0xFFFFFFFF)
        options = dict(config.sam)
        if options.get("weights"):
            options["weights"] = str(_weights_file(str(options["weights"])))
        guide, report = _construct(
            "sam",
            components.SAM_GUIDE,
            image_size=config.data.image_size,
            num_classes=config.num_classes,
            **options | published.guide_arguments(rows),
        )
    target = _target(components.METHODS, config.method)
    offered = {
        "students": students,
        "sam_guide": guide,
        "max_steps": max_steps,
        "forward_unlabelled": config.skd is not None and config.data.unlabelled_batch > 0,
        "formulas": published.formulas(rows),
    }
    provided = {name: value for name, value in offered.items() if name in components.signature(target)}
    method = _construct("method", target, **provided, **_options(config.method))
    if config.skd is not None:
        method = _construct("skd", components.SKD, method=method, sam_guide=guide, max_steps=max_steps, **config.skd)
    return BuiltMethod(method, report)


def build_optimizers(config: Config, method: SSLMethod) -> dict[str, ScheduledOptimizer]:
    """One per group of the method."""
    groups = method.trainable_groups()
    missing = [name for name in groups if name not in config.optim]
    unknown = [name for name in config.optim if name not in {*groups, "subnets", "sam"}]
    if missing or unknown:
        problem = f"has no block for {', '.join(missing)}" if missing else f"has a block for {', '.join(unknown)}"
        raise ConfigError(f"optim {problem}; the method trains {', '.join(groups)}")
    made = {
        name: _construct(
            f"optim.{name}",
            _target(components.OPTIMIZERS, config.optim[name]),
            parameters=parameters,
            **_options(config.optim[name]),
        )
        for name, parameters in groups.items()
    }
    return published.optimizers(config.published_rows, made)


def _with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """A copy of the configuration with some options of its blocks, by dotted key."""
    config = copy.deepcopy(config)
    for key, value in options.items():
        head, *path, last = key.split(".")
        block = getattr(config, head)
        for word in path:
            block[word] = dict(block.get(word) or {})
            block = block[word]
        block[last] = value
    return config


def _target(table: dict[str, str], block: dict[str, Any]) -> str:
    return table.get(block["name"], block["name"])


def _options(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "name"}


def _construct(key: str, target: str, **arguments: Any) -> Any:
    """Call a constructor; a value that it refuses is the user's mistake and names the block."""
    constructor = components.load(target)
    try:
        return constructor(**arguments)
    except KnowsamError:
        raise
    except (ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _data_root(root: str, obtain: str) -> str:
    """Absolute, below $KNOWSAM_DATA, or below ``data/`` of the working folder or the checkout."""
    places = [Path(root)] if Path(root).is_absolute() else data_places(root)
    for place in places:
        if place.is_dir():
            return str(place)
    tried = "\n".join(f"  {place}" for place in places)
    raise NotFoundError(
        f"the dataset folder {root!r} is not there; looked in\n{tried}",
        hint=obtain or "Put the data there, or set KNOWSAM_DATA to the folder that holds your datasets.",
    )


def _weights_file(path: str) -> Path:
    places = list(dict.fromkeys([Path(path), *(data_places(path) if not Path(path).is_absolute() else [])]))
    for place in places:
        if place.exists():
            return place
    fetched = f"weights/{Path(path).name}"  # where `weights fetch` puts it
    if any(place.exists() for place in data_places(fetched)):
        raise NotFoundError(f"SAM's weights {path!r} are not there", hint=f"Did you mean sam.weights={fetched}?")
    tried = "\n".join(f"  {place}" for place in places)
    raise NotFoundError(
        f"SAM's weights {path!r} are not there; looked at\n{tried}",
        hint=f"{where_to_get()} Its name is then weights/FILE. Or train SAM from random weights: sam.weights=null.",
    )

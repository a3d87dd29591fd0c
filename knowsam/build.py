"""From a configuration to objects: the only place that reads the configuration and calls constructors."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from knowsam import components
from knowsam.compat import published
from knowsam.config import Config, beside, component, data_places
from knowsam.data.cache import build_cache
from knowsam.data.intensity import Preparation, fit
from knowsam.data.seeds import derive_seed
from knowsam.data.source import CaseSource, Source
from knowsam.data.streams import TwoStreams
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.engine.options import TrainOptions
from knowsam.errors import ConfigError, KnowsamError, NotFoundError
from knowsam.methods.base import SSLMethod
from knowsam.methods.contract import check_groups
from knowsam.methods.sam_teacher import SkdOptions
from knowsam.methods.with_skd import WithSKD
from knowsam.models.students import Students
from knowsam.pretrained import where_to_get
from knowsam.text import did_you_mean

if TYPE_CHECKING:
    from knowsam.data.augment import Augmenter
    from knowsam.data.labels import LabelTable
    from knowsam.data.splits import Splits
    from knowsam.engine.lineage import Ancestor
    from knowsam.errors import Fault
    from knowsam.inference.inferers import Inferer
    from knowsam.io import Reading
    from knowsam.models.sam import LoadReport


@dataclass
class BuiltMethod:
    """A method and what became of weights that it began with.

    Attributes:
        method: on the CPU.
        load_report: of SAM's official weights; None where no SAM was built.
        lineage: the runs that parts of it come from.
    """

    method: SSLMethod
    load_report: "LoadReport | None"
    lineage: "list[Ancestor]" = field(default_factory=list)


class AbsentSAM(nn.Module):
    """Stands where SAM would be in a method that is only deployed: no weights, and no prediction."""

    def forward(self, images: torch.Tensor, coarse_logits: torch.Tensor | None = None) -> torch.Tensor:
        """Raises RuntimeError: whoever asks wanted the whole method."""
        raise RuntimeError("this method was built without SAM, to be deployed; build it whole to ask SAM")


def build_source(config: Config, splits: "Splits | None" = None) -> Source:
    """The dataset with its splits, checked.

    Args:
        config: the experiment.
        splits: use these instead of the lists that the configuration names.
    """
    data = config.data
    if data.sources is not None:
        return _several(config)
    target = component(components.SOURCES, data.source)
    accepted = components.signature(target)
    offered: dict[str, Any] = {"num_classes": config.num_classes, "labelled": config.lists[1]}
    options = _options(data.source)
    if "root" in options:
        options["root"] = _data_root(options["root"], data.obtain)
    if "splits" in accepted:
        from knowsam.data.splits import load_splits

        if "index" in accepted and splits is None and "root" in options:
            offered["index"] = components.load(target).index_of(options["root"], options)
        offered["splits"] = splits or _read_splits(config, partial(load_splits, index=offered.get("index")))
    if "label_table" in accepted:
        offered["label_table"] = label_table(config)
    if "reading" in accepted:
        offered["reading"] = reading(config)
    elif data.reading:
        raise ConfigError(f"data.reading is set, but source {data.source['name']!r} reads no files by it")
    offered["spatial_dims"] = config.spatial_dims
    source: Source = _construct("data.source", target, offered, options)
    own = build_preparation(config)
    if isinstance(source, CaseSource):
        source.preparation = own
    elif own.state() != Preparation().state():
        raise ConfigError(
            f"data.intensity and data.channels are set, but source {data.source['name']!r} gives images that are "
            "prepared already",
            hint="Derive the source from knowsam.data.source.CaseSource, and give cases as they are stored.",
        )
    return source


def source_parts(config: Config) -> dict[str, Config]:
    """The experiment as each of its data sets sees it, by name; empty where there is but one."""
    parts = {}
    for name, block in (config.data.sources or {}).items():
        own = {key: value for key, value in block.items() if key not in ("weight", "valid_classes")}
        parts[name] = replace(config, data=replace(config.data, sources=None, **own))
    return parts


def _several(config: Config) -> Source:
    from knowsam.data.several import Several

    blocks = config.data.sources or {}
    made: dict[str, CaseSource] = {}
    for name, part in source_parts(config).items():
        source = build_source(part)
        if not isinstance(source, CaseSource):
            raise ConfigError(f"data.sources.{name}: source {part.data.source['name']!r} cannot be one of several")
        made[name] = source
    several = Several(
        made,
        {name: block["weight"] for name, block in blocks.items() if "weight" in block},
        {name: block["valid_classes"] for name, block in blocks.items() if "valid_classes" in block},
    )
    several.preparation = build_preparation(config)
    return several


def build_preparation(config: Config, fitted: Mapping[str, Any] | None = None) -> Preparation:
    """From stored values to what networks see.

    Args:
        config: the experiment.
        fitted: ``Preparation.state()`` of the run; None: a rule of scope dataset is not fitted yet.
    """
    block = config.data.intensity
    intensity = _construct("data.intensity", component(components.INTENSITIES, block), {}, _options(block))
    preparation = Preparation(intensity, config.data.channels)
    if fitted:
        preparation.load_state(fitted)
    return preparation


def fit_preparation(source: Source) -> dict[str, Any]:
    """Fit the intensity rule on the training images, labelled or not, where it is of scope dataset.

    Returns:
        The state that a run keeps with its weights; empty for a source that prepares its images itself.
    """
    if not isinstance(source, CaseSource):
        return {}
    fit(source.preparation, source.case, source.train_ids())
    return source.preparation.state()


def label_table(config: Config) -> "LabelTable":
    """Raw mask values -> class ids."""
    from knowsam.data.labels import LabelTable

    data = config.data
    return LabelTable(data.labels, config.num_classes, threshold=data.label_threshold, ignore=data.ignore)


def reading(config: Config) -> "Reading":
    """By which rules files are read."""
    from knowsam.io import Reading

    try:
        return Reading(**config.data.reading)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.reading: {error}", hint="Keys: " + ", ".join(Reading.__dataclass_fields__)) from error


def sight(config: Config, batch_size: int | None = None) -> dict[str, Any]:
    """How networks see a case that is to be predicted: arguments of ``inference.predict.segment``.

    Args:
        config: the experiment.
        batch_size: patches at a time; that of ``evaluate`` if None.
    """
    data = config.data
    inferer: Inferer | None = None
    if data.patch_size is not None:
        from knowsam.inference.inferers import SliceBySlice, SlidingWindow

        at_once = batch_size or config.evaluate.batch_size
        inferer = SlidingWindow(tuple(data.patch_size), overlap=config.evaluate.overlap, batch_size=at_once)
        if len(data.patch_size) == 2:
            inferer = SliceBySlice(inferer)
    return {"image_size": data.image_size, "fit": data.fit, "inferer": inferer}


def inspect_splits(config: Config) -> "tuple[Splits, list[Fault]] | None":
    """The split lists as far as they can be used, and what is wrong with them; None for data without lists."""
    from knowsam.data.splits import inspect_splits as inspect

    if config.data.sources is not None or "splits" not in components.signature(
        component(components.SOURCES, config.data.source)
    ):
        return None
    found: tuple[Splits, list[Fault]] = _read_splits(config, inspect)
    return found


def _read_splits(config: Config, read: Callable[..., Any]) -> Any:
    data = config.data
    named, labelled = config.lists
    folder = beside(str(named))
    try:
        return read(folder, labelled, group_regex=data.group_regex)
    except NotFoundError as error:
        no_lists = not any(folder.glob("*.txt"))
        raise NotFoundError(str(error), hint=(no_lists and data.obtain) or error.hint) from error


def build_streams(
    config: Config,
    source: Source,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
    kind: type[TwoStreams] = TwoStreams,
) -> TwoStreams:
    """The labelled and unlabelled streams over the decoded cache; the cache is built if need be.

    A method that can do without unlabelled images, and that no SAM teaches, gets none: U = 0.

    Args:
        config: the experiment.
        source: its data.
        rank, world_size: this process among all.
        progress: told how many images are decoded, of how many.
        kind: of the streams.
    """
    data, needs = config.data, config.needs
    unlabelled_batch = data.unlabelled_batch if needs.unlabelled else 0
    labelled_ids = source.labelled_ids()
    known = set() if data.unlabelled_includes_labelled else set(labelled_ids)
    unlabelled_ids = [i for i in source.train_ids() if i not in known]
    whole = data.patch_size is not None  # patches are cut out of images at their own size
    decode = partial(
        build_cache,
        source,
        image_size=None if whole else data.image_size,
        fit=data.fit,
        folder=data.cache,
        progress=progress,
    )
    labelled = decode(labelled_ids, masks=True)
    unlabelled = decode(unlabelled_ids, masks=False) if unlabelled_batch and unlabelled_ids else None
    return kind(
        labelled,
        unlabelled,
        labelled_batch=data.labelled_batch,
        unlabelled_batch=unlabelled_batch,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        second_labelled=needs.second_labelled,
        patch_size=None if data.patch_size is None else tuple(data.patch_size),
        foreground=data.foreground,
        weights=getattr(source, "weights", None),
        valid_classes=getattr(source, "partial", None),
    )


def build_augmenter(config: Config) -> "Augmenter":
    """What makes weak and strong views, as many as the method needs."""
    block = {"name": "standard", **config.augment}
    needs = config.needs
    offered = {"strong_views": needs.strong_views, "plain_labelled": needs.plain_labelled}
    augmenter: Augmenter = _construct("augment", component(components.AUGMENTERS, block), offered, _options(block))
    return augmenter


def build_students(config: Config) -> Students:
    """The students and, if there is one, the fusion head, from random weights."""
    facts, rows, needs = _facts(config), config.published_rows, config.needs
    offered = {**facts, "out_channels": config.num_classes}
    networks = {}
    for name, block in config.students.items():
        options = _options(block)
        if options.get("weights"):
            key = f"students.{name}.weights"
            options["weights"] = str(_weights_file(str(options["weights"]), key, "the network's"))
        networks[name] = _construct(f"students.{name}", component(components.STUDENTS, block), offered, options)
    fusion = None
    if config.fusion is not None:
        target, as_published = published.fusion_head(rows, component(components.FUSION_HEADS, config.fusion))
        fusion = _construct("fusion", target, facts, _options(config.fusion) | as_published)
    students = Students(networks, fusion, **published.students_arguments(rows))
    key, sides = "image_size", [config.data.image_size]
    if config.data.patch_size is not None:
        key, sides = "patch_size", config.data.patch_size
    if any(side % students.size_divisor for side in sides):
        shown = sides if key == "patch_size" else sides[0]
        raise ConfigError(
            f"students: data.{key} must be divisible by {students.size_divisor}, got {shown}",
            hint="Choose another size, or fewer levels.",
        )
    wanted = [*(["encode", "decode"] if needs.features else []), *(["auxiliary"] if needs.auxiliary else [])]
    try:
        students.require(*wanted)
    except ValueError as error:
        raise ConfigError(f"students: method {config.method['name']!r} needs what not all have: {error}") from error
    return students


def build_method(config: Config, *, sam: bool = True, init: bool = True) -> BuiltMethod:
    """The method with its networks on the CPU. Seeded: the students start alike whatever the method around them.

    Args:
        config: the experiment.
        sam: False puts `AbsentSAM` where SAM would be: enough for ``networks()``, and a tenth of the size.
        init: False leaves out what ``init`` names, for weights that are replaced anyway.
    """
    rows = config.published_rows
    config = _with_options(config, published.settings(rows))
    target = component(components.METHODS, config.method)
    offered: dict[str, Any] = {**_facts(config), "formulas": published.formulas(rows)}
    if "students" in components.signature(target):
        torch.manual_seed(_seed(config, "students"))
        offered["students"] = build_students(config)
    report: LoadReport | None = None
    if config.uses_sam and not sam:
        offered["sam_guide"] = offered["sam"] = AbsentSAM()
    elif config.uses_sam:
        torch.manual_seed(_seed(config, "sam"))
        guide, report = build_sam_guide(config, shared=config.needs.sam == "promptable")
        offered["sam_guide"], offered["sam"] = guide, guide.sam
    lineage: list[Ancestor] = []
    if init and config.init is not None:
        from knowsam.engine.lineage import load_parts

        lineage = load_parts(_ancestors(config), {"students": offered.get("students"), "sam": offered.get("sam")})
    torch.manual_seed(_seed(config, "method"))
    method: SSLMethod = _construct("method", target, offered, _options(config.method))
    if config.skd is not None:
        options = _construct("skd", components.SKD, {}, config.skd)
        assert isinstance(options, SkdOptions)
        method = WithSKD(method, offered["sam_guide"], config.train.max_steps, options)
    return BuiltMethod(method, report, lineage)


def build_sam_guide(config: Config, *, shared: bool = False) -> "tuple[Any, LoadReport]":
    """SAM with its prompt generator.

    Args:
        config: the experiment.
        shared: the method trains SAM by prompts of its own, too, so what the guide does not reach is not frozen.
    """
    options = published.sam_blocks(config.published_rows, config.sam)
    if options.get("weights"):
        options["weights"] = str(_weights_file(str(options["weights"]), "sam.weights", "SAM's", where_to_get()))
    made: tuple[Any, LoadReport] = _construct(
        "sam", components.SAM_GUIDE, {**_facts(config), "freeze": not shared}, options
    )
    return made


def build_optimizers(
    config: Config, method: SSLMethod, notes: list[str] | None = None
) -> dict[str, ScheduledOptimizer]:
    """One per group of the method.

    Args:
        config: the experiment.
        method: its method.
        notes: gets a line if there are blocks that no group uses.
    Raises:
        ConfigError: a group without a block, or a block whose name is nearly that of a group.
    """
    groups = check_groups(method)
    if missing := [name for name in groups if name not in config.optim]:
        raise ConfigError(
            f"optim has no block for {', '.join(missing)}; the method trains {', '.join(groups)}",
            hint=f"Add optim.{missing[0]}: {{name: adam, lr: 1e-4}}, or a default_optim to the method's class.",
        )
    unused = [name for name in config.optim if name not in groups]
    for name in unused:
        if meant := did_you_mean(name, groups):
            raise ConfigError(f"optim has a block for {name}; the method trains {', '.join(groups)}{meant}")
    if notes is not None and unused:
        notes.append(f"optim.{', optim.'.join(unused)} has no effect: the method trains {', '.join(groups)}")
    made = {
        name: _construct(
            f"optim.{name}",
            component(components.OPTIMIZERS, config.optim[name]),
            {"parameters": parameters},
            _options(config.optim[name]),
        )
        for name, parameters in groups.items()
    }
    return published.optimizers(config.published_rows, made)


def train_options(config: Config) -> TrainOptions:
    """What the loop is to do."""
    train = config.train
    every = train.validate_every if train.pictures_every is None else train.pictures_every
    return TrainOptions(
        max_steps=train.max_steps,
        seed=train.seed,
        precision=train.precision,
        accumulate=train.accumulate,
        clip_norm=train.clip_norm,
        gradient_exchange=train.gradient_exchange,
        validate_every=train.validate_every,
        checkpoint_every=train.checkpoint_every,
        log_every=train.log_every,
        snapshot_every=train.snapshot_every,
        workers=config.data.workers,
        tensorboard=train.tensorboard,
        pictures_every=every,
        class_names=tuple(config.data.classes),
        title=f"{config.name}, {method_name(config)}",
    )


def method_name(config: Config) -> str:
    """The method's name, with ``+ SKD`` where SAM teaches it."""
    return str(config.method["name"]) + (" + SKD" if config.skd is not None else "")


def _facts(config: Config) -> dict[str, Any]:
    """What is handed to every component that asks for it by name."""
    return {
        "num_classes": config.num_classes,
        "in_channels": config.in_channels,
        "spatial_dims": config.spatial_dims,
        "image_size": config.data.image_size,
        "labelled_batch": config.data.labelled_batch,
        "unlabelled_batch": config.data.unlabelled_batch if config.needs.unlabelled else 0,
        "max_steps": config.train.max_steps,
    }


def _seed(config: Config, part: str) -> int:
    return derive_seed(config.train.seed, part) & 0xFFFFFFFF


def _ancestors(config: Config) -> list[dict[str, str]]:
    blocks = config.init if isinstance(config.init, list) else [config.init]
    return [
        {"run": str(beside(block["from"])), "part": block["part"], "checkpoint": block.get("checkpoint", "best")}
        for block in blocks
    ]


def _with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """A copy of the configuration with some options of its blocks, by dotted key; parts that are off stay off."""
    config = copy.deepcopy(config)
    for key, value in options.items():
        head, *path, last = key.split(".")
        block = getattr(config, head)
        for word in path:
            if block is not None:
                below = block.get(word, {})
                block[word] = below if below is None else dict(below)
                block = block[word]
        if block is not None:
            block[last] = value
    return config


def _options(block: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != "name"}


def _construct(key: str, target: str, offered: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Call a constructor; a value that it refuses is the user's mistake and names the block.

    Any other exception is a fault of the component and keeps its traceback.
    """
    try:
        constructor = components.load(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{key}: {target} cannot be imported: {error}") from error
    try:
        return components.call(constructor, offered, options)
    except KnowsamError:
        raise
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    except components.WrongArguments as error:
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


def _weights_file(path: str, key: str, whose: str, advice: str = "") -> Path:
    places = list(dict.fromkeys([Path(path), *(data_places(path) if not Path(path).is_absolute() else [])]))
    for place in places:
        if place.exists():
            return place
    fetched = f"weights/{Path(path).name}"  # where `weights fetch` puts it
    if any(place.exists() for place in data_places(fetched)):
        raise NotFoundError(f"{whose} weights {path!r} are not there", hint=f"Did you mean {key}={fetched}?")
    tried = "\n".join(f"  {place}" for place in places)
    more = f"{advice} Its name is then weights/FILE. " if advice else ""
    raise NotFoundError(
        f"{whose} weights {path!r} are not there; looked at\n{tried}",
        hint=f"{more}Or start from random weights: {key}=null.",
    )

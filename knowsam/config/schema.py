"""Every key of an experiment: its default and, beside it, its meaning.

A block that names a component takes the arguments of that component's constructor: its signature is the schema.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from knowsam import components
from knowsam.compat.rows import select
from knowsam.needs import Needs

METHOD = "knowsam"
"""The method of an experiment that names none."""


def _block(**values: Any) -> Any:
    return field(default_factory=lambda: dict(values))


def _declared(name: str) -> Any:
    """What the method of an experiment that names none declares."""
    return copy.deepcopy(components.literal(components.METHODS[METHOD], name))


@dataclass
class DataConfig:
    """Which images, and how many of them in a step."""

    source: dict[str, Any] = _block(name="builtin")  # component of components.SOURCES
    sources: dict[str, Any] | None = None  # several data sets: {name: {source: {...}, splits: ...}}
    splits: str | None = None  # folder of the split lists, beside the checkout or absolute; {seed} in it is train.seed
    classes: list[str] = field(default_factory=lambda: ["background", "lesion"])  # K names, background first
    labelled: str = "labelled_10pct"  # list of labelled cases, or `all`; {seed} in it is train.seed
    labels: dict[Any, Any] | None = None  # {class id: raw mask value(s)}; null: masks hold class ids
    label_threshold: float | None = None  # binary masks with soft edges: raw values above it are class 1
    ignore: Any = None  # raw mask value(s) of pixels of which nothing is known; losses and metrics leave them out
    group_regex: str | None = None  # the part of a case id that names its patient; no patient may be in two splits
    obtain: str = ""  # where the data come from and where they belong, said when they are absent
    unlabelled_includes_labelled: bool = False  # show labelled images in the unlabelled stream too
    channels: int = 3  # C of the networks; 3: grey images are repeated
    intensity: dict[str, Any] = _block(name="as_is")  # component of components.INTENSITIES: stored values -> 0..1
    reading: dict[str, Any] = _block()  # knowsam.io.Reading: orientation tags, palettes, keys inside a file
    image_size: int = 256  # S, pixels; divisible by 16
    fit: Literal["squash", "letterbox"] = "squash"  # how images of other shapes come to S x S
    patch_size: list[int] | None = None  # crops, [D, H, W] voxels or [H, W] pixels; null: whole images, S x S
    foreground: float = 0.5  # share of labelled crops that are drawn around a voxel of a foreground class
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
    overlap: float = 0.5  # of neighbouring patches, where data.patch_size is set
    postprocess: Any = None  # of predictions, knowsam.inference.postprocess: {name: largest}, a list of such, or `auto`


@dataclass
class Config:
    """One experiment."""

    name: str = "experiment"
    run: str | None = None  # run folder; runs/<name>/<method>_<labelled>_seed<seed> if null
    published_code: Any = False  # behave as the published code: true, or a list of rows of docs/fidelity.md
    data: DataConfig = field(default_factory=DataConfig)
    init: Any = None  # start from parts of other runs: {from: RUN, part: students} or a list of such
    augment: dict[str, Any] = _block()  # knowsam.data.augment:Augmenter
    # Networks by output name; the method's own where none is named.
    students: dict[str, Any] = field(default_factory=lambda: dict(_declared("default_students")))
    # Head over two students; the method's own if not given, null for none.
    fusion: dict[str, Any] | None = field(default_factory=lambda: _declared("default_fusion"))
    sam: dict[str, Any] = _block()  # knowsam.models.sam.build:build_sam_guide
    method: dict[str, Any] = _block(name=METHOD)
    skd: dict[str, Any] | None = None  # SAM teaches the method's students, too: {weight: 1.0, temperature: 10.0}
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
    def lists(self) -> tuple[str | None, str]:
        """``data.splits`` and ``data.labelled`` of this run: where they say {seed}, another seed takes other lists.

        The settings themselves stay as written, so that runs of all seeds are runs of one setting.
        """
        seed = str(self.train.seed)
        folder, labelled = self.data.splits, self.data.labelled
        return None if folder is None else folder.replace("{seed}", seed), labelled.replace("{seed}", seed)

    @property
    def spatial_dims(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.data.patch_size or (0, 0))

    @property
    def in_channels(self) -> int:
        """C, channels of an image."""
        return self.data.channels

    @property
    def needs(self) -> Needs:
        """What the method, with SAM as its teacher if ``skd`` says so, wants of the experiment."""
        own = components.needs(component(components.METHODS, self.method))
        return own if self.skd is None else own.taught(self.skd.get("view", "weak"))

    @property
    def uses_sam(self) -> bool:
        """Whether this experiment builds SAM at all."""
        return self.skd is not None or self.needs.sam is not None

    @property
    def published_rows(self) -> tuple[str, ...]:
        """Rows of docs/fidelity.md that behave as the published code."""
        return select(self.published_code)


def component(table: Mapping[str, str], block: Mapping[str, Any]) -> str:
    """``module:name`` of the component that a block names."""
    name = str(block.get("name"))
    return table.get(name, name)

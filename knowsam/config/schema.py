"""Every key of an experiment: its default and, beside it, its meaning.

A block that names a component takes the arguments of that component's constructor: its signature is the schema.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from knowsam import components
from knowsam.compat.rows import select


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
        return self.skd is not None or "sam_guide" in method_arguments(self)

    @property
    def published_rows(self) -> tuple[str, ...]:
        """Rows of docs/fidelity.md that behave as the published code."""
        return select(self.published_code)

    @property
    def uses_unlabelled(self) -> bool:
        """Whether unlabelled images are shown at all: not to a method that only forwards them for a wrapper's sake."""
        return self.skd is not None or "forward_unlabelled" not in method_arguments(self)


def method_arguments(config: Config) -> set[str]:
    """Arguments of the method's constructor; empty when there is no such method, which is reported elsewhere."""
    name = str(config.method.get("name"))
    target = components.METHODS.get(name, name)
    try:
        return set(components.signature(target)) if ":" in target else set()
    except (LookupError, OSError, SyntaxError, ValueError):
        return set()

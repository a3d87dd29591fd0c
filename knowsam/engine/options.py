"""What a run of the loop is to do."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainOptions:
    """Settings of ``engine.train.train``.

    Attributes:
        max_steps: optimizer updates in all.
        seed: of the run; all noise of micro-batch t is a function of (seed, rank, t).
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast; losses are float32 in any case.
        accumulate: micro-batches per update.
        clip_norm: largest gradient norm per optimizer; 0 for no clipping.
        gradient_exchange: ``fp32`` or ``bf16``, what gradients travel in between processes.
        validate_every, checkpoint_every, log_every: updates between each; all three also at the end.
        snapshot_every: updates between copies of the deployed networks that are kept; 0 keeps none.
        workers: loader processes; their number changes no result.
        tensorboard: write events beside ``metrics.jsonl``.
        pictures_every: updates between pictures of a step; 0 for none.
        class_names: K names, background first, for the pictures.
        title: said above the pictures.
        stop_at: end early after this many updates, as if interrupted (for tests of resuming).
    """

    max_steps: int
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulate: int = 1
    clip_norm: float = 0.0
    gradient_exchange: Literal["fp32", "bf16"] = "fp32"
    validate_every: int = 200
    checkpoint_every: int = 200
    log_every: int = 20
    snapshot_every: int = 0
    workers: int = 0
    tensorboard: bool = True
    pictures_every: int = 0
    class_names: tuple[str, ...] = ()
    title: str = ""
    stop_at: int | None = None

"""Trying an experiment before training it: ``train --dry-run`` and ``train --overfit-one-batch``."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from knowsam import build
from knowsam.config import Config
from knowsam.data.streams import derive_seed
from knowsam.engine.log import say
from knowsam.engine.train import autocast
from knowsam.errors import NumericError

if TYPE_CHECKING:
    from knowsam.engine.distributed import Rank


def sam_weights_line(config: Config, load_report) -> str:
    """Where SAM's weights come from, in plain words."""
    if not config.sam.get("weights"):
        trained = "only its tuned part is trained" if config.sam.get("train") == "tuned" else "it is trained whole"
        return (
            f"SAM ({config.sam.get('variant', 'vit_b')}) starts from RANDOM weights (sam.weights is null): {trained} "
            "and teaches only what it learns here. For the published method set sam.weights to a checkpoint."
        )
    return f"SAM weights from {config.sam['weights']}\n{load_report}"


def dry_run(config: Config, rank: "Rank") -> int:
    """Build everything, run one batch forward and backward, show shapes, losses and parameters."""
    from rich.console import Console
    from rich.table import Table

    source = build.build_source(config)
    streams = build.build_streams(config, source)
    built = build.build_method(config)
    method = built.method.to(rank.device).train()
    build.build_optimizers(config, method)
    raw = [x.to(rank.device) for x in streams[0]]
    batch = build.build_augmenter(config)(*raw, seed=derive_seed(config.train.seed, "augment", 0, 0))
    with autocast(rank.device, config.train.precision):
        out = method(batch, 0)
    torch.stack([term.float() for term in out.losses.values()]).sum().backward()

    console = Console()
    shapes = Table(title="one batch")
    for column in ("what", "shape", "type"):
        shapes.add_column(column)
    for name in ("labelled", "mask", "weak", "strong"):
        value = getattr(batch, name)
        shapes.add_row(name, str(tuple(value.shape)), str(value.dtype).removeprefix("torch."))
    for name, prediction in out.predictions.items():
        shapes.add_row(f"logits of {name}", str(tuple(prediction.logits.shape)), "")
    console.print(shapes)
    losses = Table(title="loss terms at step 0")
    losses.add_column("term")
    losses.add_column("value", justify="right")
    for name, term in out.losses.items():
        losses.add_row(name, f"{term.item():.4f}")
    console.print(losses)
    console.print(parameter_table(method))
    counts = {split: len(source.eval_ids(split)) for split in ("val", "test")}
    say(
        f"train {len(source.train_ids())} cases ({len(source.labelled_ids())} labelled), "
        f"val {counts['val']}, test {counts['test']}; evaluated outputs: {', '.join(method.outputs())}"
    )
    if config.uses_sam:
        say(sam_weights_line(config, built.load_report))
    return 0


def parameter_table(method: nn.Module):
    """Parameters per part, total and trainable, down to the second level of modules, as a rich table."""
    from rich.table import Table

    table = Table(title="parameters")
    table.add_column("part")
    for column in ("total", "trainable"):
        table.add_column(column, justify="right")

    def count(module: nn.Module) -> tuple[int, int]:
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    def add(name: str, module: nn.Module, depth: int) -> None:
        total, trainable = count(module)
        if total:
            table.add_row("  " * depth + name, f"{total:,}", f"{trainable:,}")
            if depth < 2:
                for child_name, child in module.named_children():
                    add(child_name, child, depth + 1)

    for name, module in method.named_children():
        add(name, module, 0)
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in count(method)))
    return table


def overfit(config: Config, rank: "Rank", steps: int) -> int:
    """Train on batch 0 alone, without augmentation: a healthy pipeline brings its Dice near 1.

    Raises:
        NumericError: the deployed output's Dice, mean over all classes, stays below 0.8.
    """
    from knowsam.data.augment import Augmenter
    from knowsam.engine.log import Progress
    from knowsam.losses import soft_dice_loss

    streams = build.build_streams(config, build.build_source(config))
    method = build.build_method(config).method.to(rank.device).train()
    optimizers = build.build_optimizers(config, method)
    batch = Augmenter.off()(*(x.to(rank.device) for x in streams[0]), seed=0)
    images = sum(streams.batch.values())
    with Progress(steps, log_every=max(1, steps // 10)) as progress:
        for step in range(steps):
            torch.manual_seed(step)
            with autocast(rank.device, config.train.precision):
                out = method(batch, step)
            total = torch.stack([term.float() for term in out.losses.values()]).sum()
            for item in optimizers.values():
                item.optimizer.zero_grad(set_to_none=True)
            total.backward()
            for item in optimizers.values():
                item.optimizer.step()
            method.after_step(step)
            progress.update(step + 1, {"loss": total.item()}, images=images)
    method.eval()
    with torch.no_grad():
        logits = method.predict(batch.labelled)[method.outputs()[0]]
    hard = nn.functional.one_hot(logits.argmax(1), config.num_classes).movedim(-1, 1).float()
    dice = 1 - soft_dice_loss(1e4 * hard, batch.mask).item()
    say(f"Dice of {method.outputs()[0]} on the one batch, mean over {config.num_classes} classes: {dice:.4f}")
    if dice < 0.8:
        raise NumericError(
            f"one batch could not be learned in {steps} steps (Dice {dice:.3f} < 0.8)",
            hint="Give more steps; if that does not help, look at the masks, the label table and the learning rates.",
        )
    return 0

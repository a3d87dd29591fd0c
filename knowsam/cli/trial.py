"""Trying an experiment before training it: ``train --dry-run`` and ``train --overfit-one-batch``."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from knowsam import build
from knowsam.config import Config
from knowsam.data.seeds import derive_seed
from knowsam.data.streams import FirstBatch
from knowsam.engine.log import say
from knowsam.engine.precision import autocast
from knowsam.engine.train import train
from knowsam.errors import NumericError
from knowsam.methods.contract import check_output, check_reached

if TYPE_CHECKING:
    from rich.table import Table

    from knowsam.engine.distributed import Rank


def sam_weights_line(config: Config, built: build.BuiltMethod) -> str:
    """Where SAM's weights come from, in plain words."""
    begun = next((ancestor for ancestor in built.lineage if ancestor.part == "sam"), None)
    if begun is not None:
        return f"SAM begins from {begun.run}, {begun.file} of step {begun.step}"
    if config.sam.get("weights"):
        return f"SAM weights from {config.sam['weights']}\n{built.load_report}"
    groups = built.method.trainable_groups()
    trained = {id(p) for p in groups.get("sam", ())}
    parts = [p for p in (built.method.sam_teacher or built.method).parameters() if id(p) in trained]
    count = sum(p.numel() for p in parts)
    name = (config.sam.get("encoder") or {}).get("name", "vit_b")
    return (
        f"SAM ({name}) starts from RANDOM weights (sam.weights is null): {count / 1e6:.2f} M of its parameters are "
        "trained, and it teaches only what it learns here. For the published method set sam.weights to a checkpoint."
    )


def dry_run(config: Config, rank: "Rank", notes: Sequence[str] = ()) -> int:
    """Build everything, run one batch, show shapes, losses, parameters and the file's ``notes``."""
    from rich.console import Console
    from rich.table import Table

    source = build.build_source(config)
    build.fit_preparation(source)
    streams = build.build_streams(config, source)
    built = build.build_method(config)
    method = built.method.to(rank.device).train()
    notes = list(notes)
    build.build_optimizers(config, method, notes)
    raw = streams[0].to(rank.device)
    batch = build.build_augmenter(config)(raw, seed=derive_seed(config.train.seed, "augment", 0, 0))
    with autocast(rank.device, config.train.precision):
        out = method(batch, 0)
    check_output(method, out, batch)
    torch.stack([term.float() for term in out.losses.values()]).sum().backward()
    check_reached(method)

    console = Console()
    shapes = Table(title="one batch")
    for column in ("what", "shape", "type"):
        shapes.add_column(column)
    views = {f"strong {n}" if n > 1 else "strong": view for n, view in enumerate(batch.strong, start=1)}
    for name, value in {"labelled": batch.labelled, "mask": batch.mask, "weak": batch.weak, **views}.items():
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
    for note in notes:
        say(f"note: {note}")
    if config.uses_sam:
        say(sam_weights_line(config, built))
    return 0


def parameter_table(method: nn.Module) -> "Table":
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
    """Train on batch 0 alone, without augmentation, by the loop of every run: its Dice must come near 1.

    Raises:
        NumericError: the deployed output's Dice, mean over all classes, stays below 0.8.
    """
    from knowsam.data.augment import Augmenter
    from knowsam.engine.runfolder import RunFolder
    from knowsam.engine.saving import RunRecord
    from knowsam.losses import soft_dice_loss

    source = build.build_source(config)
    build.fit_preparation(source)
    streams = build.build_streams(config, source, kind=FirstBatch)
    method = build.build_method(config).method.to(rank.device)
    needs = config.needs
    augmenter = Augmenter.off(strong_views=needs.strong_views, plain_labelled=needs.plain_labelled)
    batch = augmenter(streams[0].to(rank.device), seed=0)
    name = method.outputs()[0]

    def dice() -> dict[str, float]:
        method.eval()
        with torch.no_grad():
            label = method.predict_deployed(batch.labelled)[name].argmax(1)
        method.train()
        hard = nn.functional.one_hot(label, config.num_classes).movedim(-1, 1).float()
        return {name: 1 - soft_dice_loss(1e4 * hard, batch.mask).item()}

    options = replace(
        build.train_options(config),
        max_steps=steps,
        validate_every=steps,
        checkpoint_every=steps,
        log_every=max(1, steps // 10),
        snapshot_every=0,
        pictures_every=0,
        tensorboard=False,
        workers=0,
    )
    optimizers = build.build_optimizers(config, method)
    with tempfile.TemporaryDirectory(prefix="knowsam-overfit-") as folder:
        record = RunRecord(config="", data={})
        state = train(
            method, streams, augmenter, optimizers, dice, options, run=RunFolder(folder), rank=rank, record=record
        )
    reached = state.best["dice"]
    say(f"Dice of {name} on the one batch, mean over {config.num_classes} classes: {reached:.4f}")
    if reached < 0.8:
        raise NumericError(
            f"one batch could not be learned in {steps} steps (Dice {reached:.3f} < 0.8)",
            hint="Give more steps; if that does not help, look at the masks, the label table and the learning rates.",
        )
    return 0

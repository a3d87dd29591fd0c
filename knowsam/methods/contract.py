"""Whether a method keeps its contract: what is cheap to check is checked in the first step of every run.

Each refusal names the method, the term or the parameters, and what the contract wants, in the place of the traceback or
the silence that would follow.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from knowsam.data.batch import Batch
from knowsam.errors import ContractError
from knowsam.methods.base import Phase, SSLMethod, StepOutput

DOCS = "docs/extending.md says what a method returns."


def check_groups(method: SSLMethod) -> dict[str, list[nn.Parameter]]:
    """The parameter groups, if every trainable parameter is in exactly one.

    Raises:
        ContractError: a parameter in two groups, in none, or a group that is empty or holds something frozen.
    """
    title = _title(method)
    groups = method.trainable_groups()
    names = {id(p): name for name, p in method.named_parameters()}
    where: dict[int, list[str]] = {}
    for group, parameters in groups.items():
        if not parameters:
            raise ContractError(
                f"{title}: group {group!r} holds no parameter, so no optimizer can be made for it",
                hint="Leave the group out where everything in it is frozen.",
            )
        for p in parameters:
            if id(p) not in names:
                raise ContractError(
                    f"{title}: group {group!r} holds a parameter {tuple(p.shape)} that is no part of the method",
                    hint="Assign its module to an attribute of the method, so that it is saved too.",
                )
            if not p.requires_grad:
                raise ContractError(f"{title}: group {group!r} holds {names[id(p)]}, which is frozen")
            where.setdefault(id(p), []).append(group)
    twice = [f"{names[key]} ({', '.join(found)})" for key, found in where.items() if len(found) > 1]
    if twice:
        raise ContractError(f"{title}: in more than one parameter group: {_first(twice)}")
    missing = [name for name, p in method.named_parameters() if p.requires_grad and id(p) not in where]
    if missing:
        raise ContractError(
            f"{title}: in no parameter group: {_first(missing)}",
            hint="Add them to a group of trainable_groups(), or freeze them with requires_grad_(False).",
        )
    return groups


def check_output(method: SSLMethod, out: Any, batch: Batch) -> None:
    """Whether a forward pass returned what the contract says.

    Args:
        method: whose forward it was, for messages.
        out: what it returned.
        batch: what it was given.
    Raises:
        ContractError: no StepOutput, a term that is no scalar tensor or has no gradient, shapes that do not fit.
    """
    title = _title(method)
    own = getattr(method, "method", method)  # SKD around it looks at them itself
    if batch.valid_classes is not None and not own.needs.partial_labels:
        raise ContractError(
            f"{title} takes every mask for complete, but a source of this experiment labels some classes only: it "
            "would learn the others as background",
            hint="Take supervised_loss(logits, batch) or supervised_losses(students, logits, batch) for every term of "
            "a mask, and say so: needs = Needs(..., partial_labels=True).",
        )
    if not isinstance(out, StepOutput):
        raise ContractError(f"{title}.forward returned {_kind(out)}; wanted is a StepOutput", hint=DOCS)
    if not isinstance(out.losses, Mapping) or not out.losses:
        raise ContractError(f"{title}.forward returned no loss term; wanted is StepOutput(losses={{name: scalar}})")
    for name, term in out.losses.items():
        if not isinstance(term, Tensor) or term.shape != ():
            raise ContractError(
                f"{title}: loss term {name!r} is {_kind(term)}; wanted is a scalar tensor",
                hint="Average over pixels and images; a term that does not count is 0 * its formula, not 0.0.",
            )
        if torch.is_grad_enabled() and not term.requires_grad and name not in out.constant:
            raise ContractError(
                f"{title}: loss term {name!r} has no gradient, so it trains nothing",
                hint="Was its prediction detached, or computed under no_grad? Numbers to be logged go into monitors.",
            )
    for name, value in out.monitors.items():
        if not isinstance(value, Tensor) or value.shape != ():
            raise ContractError(f"{title}: monitor {name!r} is {_kind(value)}; wanted is a scalar tensor")
    for name, prediction in out.predictions.items():
        _check_prediction(f"{title}: prediction {name!r}", prediction)
    for name, prediction in out.views.teachers.items():
        _check_prediction(f"{title}: teacher {name!r} of its views", prediction)
    rows = {"joined": len(batch.labelled) + len(batch.weak), "labelled": len(batch.labelled)}
    if out.prompt is not None and len(out.prompt) != rows["joined"]:
        raise ContractError(
            f"{title}: prompt has {len(out.prompt)} rows; wanted are logits of the {rows['joined']} labelled and "
            "unlabelled images, or None"
        )
    for name, taught in out.taught.items():
        if not isinstance(taught.logits, Tensor) or (torch.is_grad_enabled() and not taught.logits.requires_grad):
            raise ContractError(f"{title}: taught {name!r} wants logits with gradient, got {_kind(taught.logits)}")


def check_reached(method: SSLMethod) -> None:
    """Whether the backward pass reached every trainable parameter.

    Raises:
        ContractError: names those without a gradient.
    """
    missed = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    if missed:
        raise ContractError(
            f"{_title(method)}: no loss term reaches {_first(missed)}",
            hint="Freeze what no loss touches with requires_grad_(False), or weigh its term by 0 rather than leave it "
            "out: with several processes every trained parameter must get a gradient at every step.",
        )


def check_phases(method: SSLMethod) -> tuple[Phase, ...]:
    """The phases of a run that hold an update, in order from update 0.

    A phase of no length (an option that switches its part off) is left out: the next one begins in its place.

    Raises:
        ContractError: none, not from 0 on, or not in order.
    """
    phases = tuple(method.phases())
    starts = [phase.start for phase in phases]
    if not starts or starts[0] != 0 or starts != sorted(starts):
        raise ContractError(f"{_title(method)}: phases start at {starts}; wanted are rising steps, the first of them 0")
    return tuple({phase.start: phase for phase in phases}.values())


def check_held(method: SSLMethod, step: int, groups: Mapping[str, Any]) -> frozenset[str]:
    """The groups that hold still at an update.

    Raises:
        ContractError: a group that does not exist.
    """
    held = frozenset(method.holds_still(step))
    if unknown := sorted(held - set(groups)):
        raise ContractError(
            f"{_title(method)}: holds_still({step}) names {', '.join(unknown)}; its groups are {', '.join(groups)}"
        )
    return held


def explain_unused(method: SSLMethod, error: RuntimeError) -> ContractError | None:
    """DDP's complaint of parameters without a gradient, with names in the place of numbers; None if it is none."""
    mark = "did not receive grad for rank"
    text = str(error)
    if mark not in text:
        return None
    numbers = [int(word) for word in text.split(mark, 1)[1].replace(":", " ").split()[1:] if word.isdecimal()]
    names = [name for name, p in method.named_parameters() if p.requires_grad]
    missed = [names[number] for number in numbers if number < len(names)]
    return ContractError(
        f"{_title(method)}: no loss term reached {_first(missed)} in the step before",
        hint="Weigh a term by 0 rather than leave it out, or freeze what no loss touches.",
    )


def _check_prediction(title: str, prediction: Any) -> None:
    images, logits, mask = prediction.images, prediction.logits, prediction.mask
    if logits.ndim != images.ndim or len(logits) != len(images) or logits.shape[2:] != images.shape[2:]:
        raise ContractError(
            f"{title}: logits {tuple(logits.shape)} do not fit the images {tuple(images.shape)} that it saw; wanted "
            "are (B, K, *S) and (B, C, *S)"
        )
    if len(mask) > len(images) or (len(mask) and mask.shape[1:] != images.shape[2:]):
        raise ContractError(
            f"{title}: mask {tuple(mask.shape)} does not fit the images {tuple(images.shape)}; wanted are the class "
            "ids (L, *S) of the first L of them"
        )


def _title(method: SSLMethod) -> str:
    return type(getattr(method, "method", method)).__name__


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:80] if isinstance(value, int | float | str) else type(value).__name__


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

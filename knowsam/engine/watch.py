"""Plain words when the logged numbers of a training look wrong: what is seen, what it means, what to try.

Every rule is a pure function of the records of ``metrics.jsonl`` so far, so a resumed run says what the uninterrupted
one would have said. Rules rather stay silent than cry wolf: each waits until a thing has lasted.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from knowsam.engine.distributed import is_main
from knowsam.engine.log import MetricsLog, Progress, json_number
from knowsam.engine.optim import ScheduledOptimizer
from knowsam.methods.base import StepOutput

Record = Mapping[str, Any]

BEHIND = 0.04
"""Dice by which another output must be better than the deployed one for a warning."""

REMEMBERED = 100
"""Training logs that the rules look back on."""


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong.

    Attributes:
        name: one word; each is said once a run.
        text: what is seen, what it means, what to try.
    """

    name: str
    text: str


@dataclass
class History:
    """What the rules look at.

    Attributes:
        max_steps: length of the run.
        train: records of kind ``train``, oldest first.
        val: records of kind ``val``; the deployed output's Dice stands first in each.
        terms: names of the loss terms among the training records' values.
        teachers: names of who teaches the students.
    """

    max_steps: int
    train: Sequence[Record] = ()
    val: Sequence[Record] = ()
    terms: Sequence[str] = ()
    teachers: Sequence[str] = ()

    @property
    def dice(self) -> list[tuple[int, float]]:
        """(step, validation Dice of the deployed output)."""
        firsts = ((r["step"], next((v for k, v in r.items() if k.startswith("dice_")), None)) for r in self.val)
        return [(step, value) for step, value in firsts if value is not None]


class Watch:
    """Keeps the records of a run, and says each finding once: on the console, in ``metrics.jsonl``, in TensorBoard.

    Args:
        log: where warnings are recorded.
        progress: where they are printed.
        max_steps: length of the run.
        records: of the run so far, when it is resumed; what they warned of is not said again.
    """

    def __init__(self, log: MetricsLog, progress: Progress, *, max_steps: int, records: Iterable[Record] = ()):
        self.log = log
        self.progress = progress
        train: deque[Record] = deque(maxlen=REMEMBERED)
        val: list[Record] = []
        self.history = History(max_steps, train, val)
        self._lists: dict[str, MutableSequence[Record]] = {"train": train, "val": val}
        self.said: set[Any] = set()
        for record in records:
            if record.get("kind") == "warning":
                self.said.add(record.get("name"))
            elif record.get("kind") in self._lists:
                self._lists[record["kind"]].append(record)

    def meet(self, out: StepOutput) -> None:
        """Learn from a step who teaches; in the first step of a process and of a phase."""
        self.history.teachers = tuple(out.views.teachers)

    def heed(self, kind: str, step: int, values: Mapping[str, float], terms: Iterable[str] = ()) -> None:
        """Take in what was just logged, and speak up if need be. Rank 0 only.

        Args:
            kind, step, values: as given to ``MetricsLog.write``.
            terms: which of the values are loss terms.
        """
        if not is_main():
            return
        self._lists[kind].append({"step": step, **{name: json_number(value) for name, value in values.items()}})
        self.history.terms = tuple(terms)
        for finding in findings(self.history):
            if finding.name not in self.said:
                self.said.add(finding.name)
                self.log.warning(step, finding.name, finding.text)
                self.progress.print_line(f"warning at step {step}: {finding.text}")


def findings(history: History) -> list[Finding]:
    """What looks wrong now, at the end of the history."""
    return [Finding(rule.__name__, text) for rule in RULES if (text := rule(history))]


def one_class(history: History) -> str | None:
    """Every unlabelled pixel has had one class for 5 logs and 50 steps, while the labelled masks hold more."""
    last = history.train[-1] if history.train else {}
    names = [n.removeprefix("top_class_") for n in last if n.startswith("top_class_") and n != "top_class_truth"]
    collapsed = []
    for name in names:
        since = _trailing(history.train, partial(_above, f"top_class_{name}", 0.9999))
        # Not in the first steps: every network begins with one class.
        since = [r for r in since if r["step"] >= 0.05 * history.max_steps]
        if len(since) < 5 or since[-1]["step"] - since[0]["step"] < 50:
            continue
        if fmean(_number(r, "top_class_truth", 1.0) for r in since) < 0.995:
            collapsed.append((name, since[0]["step"]))
    if not collapsed:
        return None
    return (
        f"{_list([name for name, _ in collapsed])} gave every pixel of the unlabelled images one and the same class "
        f"since step {min(step for _, step in collapsed)}, though the labelled masks hold more: pseudo-labels have "
        "collapsed, and what learns from them learns to find nothing. Try: look at the pictures; lower weights or "
        "longer ramps of the unlabelled terms; a student with a norm (vnet: norm: batch); more labelled images a step."
    )


def teacher_behind(history: History) -> str | None:
    """A teacher is clearly worse than the best student, three validations in a row in the second half of the run."""
    return next((text for name in history.teachers if (text := _behind(history, name))), None)


def _behind(history: History, teacher: str) -> str | None:
    last = [r for r in history.val if _number(r, f"dice_{teacher}") is not None][-3:]
    if last:
        students = [_students(r, history.teachers) for r in last]
        if len(last) < 3 or last[0]["step"] < 0.5 * history.max_steps or not students[-1]:
            return None
        if min(max(s.values(), default=0.0) - r[f"dice_{teacher}"] for s, r in zip(students, last, strict=True)) < 0.1:
            return None
        best = max(students[-1], key=students[-1].__getitem__)
        seen = (
            f"on validation {teacher} has Dice {100 * last[-1][f'dice_{teacher}']:.1f} % and {best} "
            f"{100 * last[-1][f'dice_{best}']:.1f} %, and it was so three times in a row"
        )
    else:
        recent = [r for r in history.train if _number(r, f"error_{teacher}") is not None][-10:]
        if len(recent) < 10 or recent[0]["step"] < 0.5 * history.max_steps:
            return None
        means = {
            name.removeprefix("error_"): fmean(_number(r, name, 1.0) for r in recent)
            for name in recent[-1]
            if name.startswith("error_")
        }
        best = min((name for name in means if name not in history.teachers), key=means.__getitem__, default="")
        if not best or means[teacher] < 2.0 * means[best] + 0.02:
            return None
        seen = (
            f"on labelled images {teacher} errs in {100 * means[teacher]:.1f} % of the pixels and {best} in "
            f"{100 * means[best]:.1f} %, over the last 10 logs"
        )
    return (
        f"{seen}: the teacher is worse than its students, so what it teaches holds them back. Try: a lower weight or a "
        "longer ramp of its terms, or a confidence threshold; for an average of the students a lower decay; for SAM "
        "official weights (sam.weights, see knowsam weights) or a higher optim.sam.lr."
    )


def deployed_behind(history: History) -> str | None:
    """The deployed output is 4 points worse than another, three validations in a row in the second half of the run."""
    last = list(history.val)[-3:]
    if len(last) < 3 or last[0]["step"] < 0.5 * history.max_steps:
        return None
    deployed = next((name.removeprefix("dice_") for name in last[-1] if name.startswith("dice_")), "")
    others = [name for name in history.teachers if name != deployed]  # a teacher that is deployed is compared
    dice = [_students(record, others) for record in last]
    better = [name for name in dice[-1] if all(r.get(name, 0.0) >= r.get(deployed, 1.0) + BEHIND for r in dice)]
    if not better:
        return None
    best = max(better, key=dice[-1].__getitem__)
    return (
        f"on validation {deployed}, which is deployed, has Dice {100 * dice[-1][deployed]:.1f} % and {best} "
        f"{100 * dice[-1][best]:.1f} %, and it was so three times in a row. Try: more steps; and for now predict and "
        f"export with --output {best}, which was not chosen by its own validation, though."
    )


def stalled(history: History) -> str | None:
    """The deployed output's validation Dice has not risen for 40 % of the run and five validations, or is still 0."""
    dice = history.dice
    if len(dice) < 3 or dice[-1][0] >= 0.95 * history.max_steps:
        return None
    step, value = dice[-1][0], max(v for _, v in dice)
    if value < 0.01:
        if step < 0.2 * history.max_steps:
            return None
        return (
            f"validation Dice is still {100 * value:.1f} %: nothing is found at all. Try: the pictures (do truth and "
            "image belong together?), knowsam train ... --overfit-one-batch, the table data.labels, the learning rates."
        )
    # The first step that was as good as the best: what came after it gained nothing worth the name.
    since = next(s for s, v in dice if v > value - 0.002)
    after = [v for s, v in dice if s > since]
    if len(after) < 5 or step - since < 0.4 * history.max_steps:
        return None
    return (
        f"validation Dice has not risen since step {since} (best {100 * value:.1f} %). best.pt is kept, so ending here "
        "loses nothing. Try: a lower learning rate or an earlier decay, stronger augmentation, other weights of the "
        "unlabelled terms; or fewer steps next time."
    )


def falling(history: History) -> str | None:
    """The deployed output's last three validations are all far below its best."""
    dice = history.dice
    if len(dice) < 4:
        return None
    step, best = max(dice[:-3], key=lambda pair: pair[1])
    if max(v for _, v in dice[-3:]) > best - 0.1:
        return None
    return (
        f"validation Dice has fallen from {100 * best:.1f} % at step {step} to {100 * dice[-1][1]:.1f} %, and stayed "
        "low for three validations. Wrong pseudo-labels that confirm themselves do this, and so does too high a "
        "learning rate. Try: the pictures of the unlabelled images, a lower learning rate, lower weights of their "
        "terms."
    )


def exploding(history: History) -> str | None:
    """A loss term is ten times what it ever was, a few logs before and earlier, and large."""
    grown = []
    for name in ("loss", *history.terms):
        series = [value for record in history.train if (value := _number(record, name)) is not None]
        # The three logs before it may be on the way up; a term that is ramped up starts near 0, hence `> 1`.
        if len(series) < 9 or _number(history.train[-1], name) is None or series[-1] <= 1.0:
            continue
        before = max(abs(value) for value in series[:-4])
        if series[-1] > 10.0 * before:
            grown.append((name, before, series[-1]))
    if not grown:
        return None
    name, before, value = max(grown, key=lambda item: (item[0] != "loss", item[2]))  # a term says more than their sum
    what = "the loss" if name == "loss" else f"loss term {name}"
    more = [other for other, *_ in grown if other not in (name, "loss")]
    others = f", and {_list(more)} with it" if more else ""
    return (
        f"{what} is {value:.3g}; it was never above {before:.3g} until a few logs ago{others}. The next steps may end "
        "in NaN. Try: a lower learning rate, train.clip_norm=1.0, precision bf16 or fp32 instead of fp16."
    )


def no_gradient(history: History) -> str | None:
    """A group of parameters got no gradient at all, two logs in a row."""
    last = list(history.train)[-2:]
    dead = [
        name.removeprefix("grad_norm_")
        for name in (last[-1] if len(last) == 2 else ())
        if name.startswith("grad_norm_") and all(_number(r, name) == 0.0 for r in last)
    ]
    if not dead:
        return None
    return (
        f"the gradient of {_list(dead)} is exactly 0: no loss reaches it, so it does not learn. Try: are its loss "
        "terms weighted by 0, is everything in it detached? knowsam train ... --dry-run lists terms and parameters."
    )


def no_rate(history: History) -> str | None:
    """A learning rate is 0 or below, before the run ends."""
    steps_left = history.max_steps - history.train[-1]["step"] if history.train else 0
    dead = [
        (name.removeprefix("lr_"), value)
        for name, value in (history.train[-1].items() if steps_left else ())
        if name.startswith("lr_") and value is not None and value <= 0.0
    ]
    if not dead:
        return None
    names = ", ".join(f"{name} ({value:g})" for name, value in dead)
    return (
        f"the learning rate of {names} is not above 0 with {steps_left} steps to go: nothing is learned "
        "any more. Try: another optim.*.schedule, or the max_steps that the schedule was made for."
    )


RULES = (one_class, teacher_behind, deployed_behind, stalled, falling, exploding, no_gradient, no_rate)


@torch.no_grad()
def label_statistics(out: StepOutput) -> dict[str, Tensor]:
    """Numbers that tell whether pseudo-labels mean anything; scalars on the device, nothing waits for them.

    Every network is judged by the images and the masks that it saw itself, mixed ones included.

    Args:
        out: of a step.
    Returns:
        For every student and teacher ``top_class_<name>``, the share of its commonest class in the unlabelled pixels,
        and ``error_<name>``, the share of labelled pixels that it gets wrong, each if it saw such images; and
        ``top_class_truth`` of the labelled masks. 0..1.
    """
    found: dict[str, Tensor] = {}
    truth: tuple[Tensor, int] | None = None
    for name, shown in {**out.views.teachers, **out.predictions}.items():
        label, classes = shown.logits.max(1).indices, shown.logits.shape[1]  # ten times as fast as argmax(1) on the CPU
        count = len(shown.mask)
        if len(label) > count:
            found[f"top_class_{name}"] = _top_share(label[count:], classes)
        if count:
            known = shown.mask < classes if shown.valid is None else shown.valid & (shown.mask < classes)
            wrong = (label[:count] != shown.mask) & known
            found[f"error_{name}"] = wrong.sum() / known.sum().clamp(min=1)
            truth = shown.mask, classes
    if truth is not None:
        found["top_class_truth"] = _top_share(*truth)
    return found


@torch.no_grad()
def gradient_norm(item: ScheduledOptimizer) -> Tensor:
    """2-norm over all gradients of a group; 0 where there is none."""
    return _norm([p.grad for p in item.parameters if p.grad is not None])


@torch.no_grad()
def parameter_norms(optimizers: Mapping[str, ScheduledOptimizer]) -> dict[str, Tensor]:
    """``param_norm_<group>``: 2-norm over all parameters of each group."""
    return {f"param_norm_{name}": _norm(item.parameters) for name, item in optimizers.items()}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return nn.utils.get_total_norm(tensors) if tensors else torch.zeros(())


def _top_share(label: Tensor, classes: int) -> Tensor:
    return torch.stack([(label == k).float().mean() for k in range(classes)]).max()


def _number(record: Record, name: str, default: Any = None) -> Any:
    value = record.get(name)
    return default if value is None else value


def _above(name: str, limit: float, record: Record) -> bool:
    return bool(_number(record, name, 0.0) > limit)


def _trailing(records: Sequence[Record], test: Callable[[Record], bool]) -> list[Record]:
    """The records at the end, oldest first, that all pass the test."""
    return list(takewhile(test, reversed(records)))[::-1]


def _students(record: Record, teachers: Sequence[str] = ()) -> dict[str, float]:
    """Validation Dice by output, without teachers."""
    return {
        name.removeprefix("dice_"): value
        for name, value in record.items()
        if name.startswith("dice_") and name.removeprefix("dice_") not in teachers and value is not None
    }


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

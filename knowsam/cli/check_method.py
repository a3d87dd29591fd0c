"""``knowsam check-method``: whether a method keeps the contract of the loop, before it is trained."""

import argparse
from typing import TYPE_CHECKING, Any

from knowsam.config import Config

if TYPE_CHECKING:
    from knowsam.methods.base import StepOutput

EPILOG = """examples:
  knowsam check-method my_lab.methods:UniMatch
  knowsam check-method mean_teacher method.ema_decay=0.9 --classes 2,4 --skd

Builds the method small (its own default students, a tiny SAM from random weights), and makes one update in every phase:
every trainable parameter in one group and reached by a term, every term a scalar with gradient, shapes that fit, the
teacher moved by nothing but after_step, the state saved and loaded.
exit codes: 0 it keeps the contract, 70 it does not, 78 configuration.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("method", help="a name of the table, or module:Class")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted settings, as method.weight=0.5")
    parser.add_argument(
        "--classes", type=_numbers, default=[2, 3], metavar="K,K,...", help="numbers of classes to try (default 2,3)"
    )
    parser.add_argument("--skd", action="store_true", help="also with SAM as its teacher")
    parser.add_argument("--image-size", type=int, default=64, metavar="S", help="side in pixels (default 64)")


def _numbers(text: str) -> list[int]:
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if min(found) < 2:
        raise argparse.ArgumentTypeError(f"must be numbers of at least 2 with commas between, got {text!r}")
    return found


def run(args: argparse.Namespace) -> int:
    """Check each number of classes, with and without SKD, and say what was tried."""
    from knowsam.engine.log import say
    from knowsam.engine.precision import settle_math

    settle_math()
    for classes in args.classes:
        for skd in (False, True) if args.skd else (False,):
            config = small_experiment(args.method, args.overrides, classes=classes, size=args.image_size, skd=skd)
            found = check(config)
            steps = ", ".join(f"step {step}{f' ({name})' if name else ''}" for step, name in found["steps"])
            say(
                f"{args.method}{' + SKD' if skd else ''}, K = {classes}: keeps the contract at {steps}; "
                f"terms {', '.join(found['terms'])}; groups "
                + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in found["groups"].items())
            )
    return 0


def small_experiment(method: str, overrides: list[str], *, classes: int, size: int, skd: bool) -> Config:
    """An experiment on made-up images, small enough for seconds.

    Args:
        method: a name of the table, or ``module:Class``.
        overrides: dotted settings.
        classes: K.
        size: side in pixels.
        skd: with SAM as its teacher.
    """
    from knowsam.config import load_text

    names = ["background", *(f"class_{k}" for k in range(1, classes))]
    values: dict[str, Any] = {
        "name": "check",
        "method": {"name": method},
        "data": {"classes": names, "image_size": size, "labelled_batch": 2, "unlabelled_batch": 2},
        "sam": {"encoder": {"name": "vit_tiny"}, "tuning": [{"name": "adapter"}]},
        "train": {"max_steps": 20},
        **({"skd": {"weight": 1.0}} if skd else {}),
    }
    return load_text(values, overrides)


def check(config: Config) -> dict[str, Any]:
    """Make one update in every phase of a method, and hold it to the contract.

    Returns:
        ``steps`` (number and phase), names of the ``terms``, and parameters by group.
    Raises:
        ContractError: what it does not keep.
    """
    import copy

    import torch

    from knowsam import build
    from knowsam.errors import ContractError
    from knowsam.methods.contract import check_groups, check_held, check_output, check_phases, check_reached
    from knowsam.methods.ema import EmaTeacher

    built = build.build_method(config)
    method = built.method.train()
    groups = check_groups(method)
    optimizers = build.build_optimizers(config, method)
    phases = check_phases(method)
    last = config.train.max_steps - 1
    steps = {phase.start: phase.name for phase in phases if phase.start <= last} | {last: phases[-1].name}
    terms: dict[str, None] = {}
    for step in sorted(steps):
        batch = made_up_batch(config, seed=step)
        carried = None
        for round_ in range(method.updates_per_batch):
            batch.round, batch.carried = round_, carried
            check_held(method, step, groups)
            for item in optimizers.values():
                item.optimizer.zero_grad(set_to_none=True)
            averaged = [(m, copy.deepcopy(m.state_dict())) for m in method.modules() if isinstance(m, EmaTeacher)]
            out: StepOutput = method(batch, step)
            check_output(method, out, batch)
            torch.stack([term.float() for term in out.losses.values()]).sum().backward()
            check_reached(method)
            terms |= dict.fromkeys(out.losses)
            for item in optimizers.values():
                item.optimizer.step()
            for teacher, before in averaged:
                if moved := [k for k, x in teacher.state_dict().items() if not torch.equal(x, before[k])]:
                    raise ContractError(f"a teacher was moved by something other than after_step: {moved[0]}")
            method.after_step(step)
            carried = out.carry
    broken = [name for name, x in method.state_dict().items() if x.is_floating_point() and not x.isfinite().all()]
    if broken:
        raise ContractError(f"after one update {broken[0]} is not finite", hint="Look at the terms' weights.")
    other = build.build_method(config).method
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    method.eval()
    other.eval()
    images = made_up_batch(config, seed=0).labelled
    with torch.no_grad():
        one, two = method.predict(images), other.predict(images)
    if tuple(one) != method.outputs():
        raise ContractError(f"predict gives {', '.join(one)}; outputs() says {', '.join(method.outputs())}")
    for name, logits in one.items():
        wanted = (len(images), config.num_classes, *images.shape[2:])
        if logits.shape != wanted:
            raise ContractError(f"output {name!r} has shape {tuple(logits.shape)}; wanted is {wanted}")
        if not torch.equal(logits, two[name]):
            raise ContractError(
                f"output {name!r} differs after the state was saved and loaded",
                hint="Everything that a prediction depends on must be a parameter or a persistent buffer.",
            )
    return {
        "steps": [(step, steps[step]) for step in sorted(steps)],
        "terms": list(terms),
        "groups": {name: sum(p.numel() for p in parameters) for name, parameters in groups.items()},
    }


def made_up_batch(config: Config, *, seed: int) -> Any:
    """Noise images and masks in the shapes that the method asks for."""
    import torch

    from knowsam.data.batch import Batch, Ids, Labelled

    generator = torch.Generator().manual_seed(seed)
    needs, data = config.needs, config.data
    side = (data.image_size,) * config.spatial_dims
    unlabelled = data.unlabelled_batch if needs.unlabelled else 0

    def images(count: int) -> torch.Tensor:
        return torch.rand(count, config.in_channels, *side, generator=generator)

    def masks() -> torch.Tensor:
        return torch.randint(config.num_classes, (data.labelled_batch, *side), generator=generator)

    return Batch(
        images(data.labelled_batch),
        masks(),
        images(unlabelled),
        tuple(images(unlabelled) for _ in range(needs.strong_views)),
        Ids(
            tuple(f"labelled {n}" for n in range(data.labelled_batch)),
            tuple(f"unlabelled {n}" for n in range(unlabelled)),
        ),
        images(data.labelled_batch) if needs.plain_labelled else None,
        Labelled(images(data.labelled_batch), masks()) if needs.second_labelled else None,
    )

"""Which parameters of a SAM are new, which train, and what of a model has to be saved.

A module declares as ``new_parameters`` the names, relative to itself, of what no official file holds: parameters,
buffers or submodules with all that is in them, ``""`` for the whole module. As ``unused_official`` it declares,
likewise, what official files hold and it does without. Nothing else tells them: no name has a meaning by itself.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from knowsam.errors import CheckpointError


def is_new(model: nn.Module) -> Callable[[str], bool]:
    """Whether no official file holds a parameter or buffer of ``model``, by its name there."""
    return _declared(model, "new_parameters")


def is_unused(model: nn.Module) -> Callable[[str], bool]:
    """Whether ``model`` does without a tensor of an official file, by its name there."""
    return _declared(model, "unused_official")


def _declared(model: nn.Module, attribute: str) -> Callable[[str], bool]:
    places = {
        ".".join(part for part in (name, entry) if part)
        for name, module in model.named_modules()
        for entry in getattr(module, attribute, ())
    }

    def among(name: str) -> bool:
        parts = name.split(".")
        return "" in places or any(".".join(parts[:n]) in places for n in range(1, len(parts) + 1))

    return among


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What to save of a model whose official weights stay as they are: a part of its ``state_dict``.

    Parameters that train, those that no official file holds, and buffers. Build the model with the same official
    weights to use it again, then :func:`load_trained`.

    Args:
        module: a :class:`Sam`, a :class:`SamGuide`, or anything that holds one.
    """
    new = is_new(module)
    parameters = module.named_parameters(remove_duplicate=False)
    frozen = {name for name, parameter in parameters if not parameter.requires_grad and not new(name)}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def load_trained(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`trained_state` gave of a model of the same build, in place.

    Raises:
        CheckpointError: a name or a shape that the module has not, or one missing that trains here; nothing was loaded.
    """
    own = module.state_dict()
    problems = {
        "unknown": [name for name in state if name not in own],
        "missing": [name for name in trained_state(module) if name not in state],
        "of another shape": [name for name, tensor in state.items() if name in own and tensor.shape != own[name].shape],
    }
    if any(problems.values()):
        counts = "; ".join(f"{len(names)} {what}: {', '.join(names[:3])}" for what, names in problems.items() if names)
        raise CheckpointError(
            f"this state does not fit the model: {counts}",
            hint="Build the model as it was built for training: the same encoder, tuning, prompts and train.",
        )
    module.load_state_dict(state, strict=False)  # every name is accounted for above

"""Named places of a network where tunings attach modules."""

from collections.abc import Iterable
from typing import ClassVar, cast

from torch import Tensor, nn


class Hooks(nn.ModuleDict):
    """What is attached to a part, by hook and in order: ``adapters.<hook>.<i>``. No official file holds any of it."""

    new_parameters = ("",)


class Hooked:
    """A part with hooks, each of which takes any number of modules. Mixed into an ``nn.Module`` that sets ``adapters``.

    Attributes:
        HOOKS: their names; what each does stands at the class that has it.
        adapters: the modules, by hook.
    """

    HOOKS: ClassVar[tuple[str, ...]] = ()
    adapters: Hooks

    def attach(self, hook: str, module: nn.Module) -> None:
        """Attach ``module`` at ``hook``, after those that are there.

        Raises:
            ValueError: no such hook.
        """
        if hook not in self.HOOKS:
            raise ValueError(f"{type(self).__name__} has no hook {hook!r}; it has {', '.join(self.HOOKS)}")
        if hook not in self.adapters:
            self.adapters[hook] = nn.ModuleList()
        cast(nn.ModuleList, self.adapters[hook]).append(module)

    def attached(self, hook: str) -> Iterable[nn.Module]:
        """The modules at ``hook``, in order."""
        return cast(nn.ModuleList, self.adapters[hook]) if hook in self.adapters else ()

    def adapt(self, hook: str, x: Tensor) -> Tensor:
        """x through the modules at ``hook``, one after the other."""
        for module in self.attached(hook):
            x = module(x)
        return x

    def add(self, hook: str, x: Tensor, total: Tensor) -> Tensor:
        """``total`` plus what each module at ``hook`` makes of x."""
        for module in self.attached(hook):
            total = total + module(x)
        return total

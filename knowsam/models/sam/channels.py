"""Images of any number of channels to the three that SAM's encoders were trained on."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Rule = Literal["repeat", "learned"] | Sequence[int]


class Channels(nn.Module):
    """Images (B, c, *S) -> (B, 3, *S).

    Args:
        rule: ``repeat``: three channels stay, one becomes three alike, other numbers are refused. Three numbers, such
            as ``[0, 1, 3]``: these channels, from 0. ``learned``: three mixtures, which begin as the mean of all
            channels and train with SAM's other new parts: a 1 x 1 convolution without bias, clamped to 0..1.
        in_channels: c.
    Raises:
        ValueError: the rule and c do not fit together.
    """

    new_parameters = ("mixture",)

    def __init__(self, rule: Rule = "repeat", in_channels: int = 3) -> None:
        super().__init__()
        self.rule, self.in_channels = rule, in_channels
        self.index: list[int] | None = None
        self.mixture: nn.Parameter | None = None
        if rule == "learned":
            self.mixture = nn.Parameter(torch.full((3, in_channels), 1 / in_channels))
        elif rule == "repeat":
            if in_channels not in (1, 3):
                raise ValueError(
                    f"sam.channels is repeat, which takes 1 or 3 channels; images have {in_channels}: choose three, "
                    "such as sam.channels=[0,1,2], or sam.channels=learned"
                )
        elif isinstance(rule, str) or len(rule) != 3 or not all(0 <= int(i) < in_channels for i in rule):
            raise ValueError(
                f"sam.channels is {rule!r}; allowed: repeat, learned, or three numbers of 0..{in_channels - 1}"
            )
        else:
            self.index = [int(i) for i in rule]

    def forward(self, images: Tensor) -> Tensor:
        """(B, c, *S) -> (B, 3, *S), in 0..1 as the images.

        Raises:
            ValueError: another number of channels.
        """
        if self.index is None and self.mixture is None and images.shape[1] in (1, 3):
            return images if images.shape[1] == 3 else images.expand(-1, 3, *images.shape[2:])
        if images.shape[1] != self.in_channels or (self.index is None and self.mixture is None):
            takes = f"{self.in_channels}" if self.in_channels != 3 else "3 channels, or 1, which is repeated"
            raise ValueError(f"images are {tuple(images.shape)}: SAM takes {takes}; choose or merge channels")
        if self.index is not None:
            return images[:, self.index]
        assert self.mixture is not None
        return torch.einsum("oc,bc...->bo...", self.mixture, images).clamp(0, 1)

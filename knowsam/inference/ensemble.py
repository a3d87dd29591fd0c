"""Several trained methods as one: the mean of their probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Averages the class probabilities of methods, output by output, each method with the same weight.

    They are averaged at the networks' resolution, before the mean is brought to an image's own size.

    Args:
        methods: ``SSLMethod`` s or anything with ``predict``; at least one.
        outputs: names that all of them predict; the deployed one first.
    """

    def __init__(self, methods: Sequence[Any], outputs: Sequence[str]):
        super().__init__()
        self.members = nn.ModuleList(methods)
        self.names = tuple(outputs)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logarithm of the mean probabilities, (B, K, ...) by output name, as logits are.

        Args:
            images: (B, C, ...) in 0..1.
        """
        methods: list[Any] = list(self.members)
        members = [method.predict(images) for method in methods]
        # Of logarithms, so that a probability too small for float32 does not become minus infinity.
        return {
            name: torch.stack([of[name].float().log_softmax(1) for of in members]).logsumexp(0)
            - float(np.log(len(members)))
            for name in self.names
        }

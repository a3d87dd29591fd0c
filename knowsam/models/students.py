"""One or more students, and the fusion head over a pair of them, as one network."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Students(nn.Module):
    """Runs every student on the same images; with a fusion head the fused logits are the deployed output.

    Args:
        subnets: students by name, each (B, 3, S, S) -> (B, K, S, S).
        fusion_head: merges exactly two students, or None.
        mean, std: what the images (0..1) are normalised with before the students see them.
        memory_format: layout of the convolutions; ``channels_last`` is faster on CPUs and GPUs alike.
    Raises:
        ValueError: no student, a student called ``fusion``, or a fusion head over other than two students.
    """

    def __init__(
        self,
        subnets: Mapping[str, nn.Module],
        fusion_head: nn.Module | None = None,
        *,
        mean: float = 0.5,
        std: float = 0.25,
        memory_format: torch.memory_format = torch.channels_last,
    ):
        super().__init__()
        if not subnets or "fusion" in subnets:
            raise ValueError("need at least one student, none of them called 'fusion'")
        if fusion_head is not None and len(subnets) != 2:
            raise ValueError(f"a fusion head merges exactly 2 students, got {len(subnets)}: {', '.join(subnets)}")
        self.subnets = nn.ModuleDict(subnets)
        self.fusion_head = fusion_head
        self.mean, self.std = mean, std
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    @property
    def names(self) -> tuple[str, ...]:
        """The students, without the fusion head."""
        return tuple(self.subnets)

    @property
    def deployed(self) -> str:
        """Name of the output that is evaluated first and exported."""
        return "fusion" if self.fusion_head is not None else self.names[0]

    def alone(self, name: str) -> "Students":
        """One student as a network of its own; weights and normalisation are this one's.

        Raises:
            KeyError: no such student.
        """
        return Students({name: self.subnets[name]}, mean=self.mean, std=self.std, memory_format=self.memory_format)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S) by name; ``fusion`` last if there is one."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits = {name: subnet(x) for name, subnet in self.subnets.items()}
        if self.fusion_head is not None:
            logits["fusion"] = self.fusion_head(*logits.values())
        return logits


class DeployedStudents(nn.Module):
    """The students as one plain network: image (B, 3, S, S) in 0..1 -> logits (B, K, S, S) of one output.

    Holds and runs only what that output needs: both students for ``fusion``, else the one student.
    """

    def __init__(self, students: Students, output: str | None = None):
        super().__init__()
        self.output = output or students.deployed
        self.students = students if self.output == "fusion" else students.alone(self.output)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in 0..1 -> logits (B, K, S, S)."""
        return self.students(images)[self.output]

    def undecided(self, images: Tensor, margin: float) -> Tensor:
        """Where logits that differ by ``margin`` within a student may make the fused ones jump: bool (B, S, S).

        Args:
            images: (B, 3, S, S) in 0..1.
            margin: of logits.
        """
        logits = self.students(images)
        if self.output != "fusion":
            return torch.zeros_like(logits[self.output][:, 0], dtype=torch.bool)
        first, second = (logits[name] for name in self.students.names)
        return self.students.fusion_head.undecided(first, second, margin)

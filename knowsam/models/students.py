"""One or more students, each with its own normalisation, and the fusion head over a pair of them, as one network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

Statistic = float | Sequence[float]
"""One number, or one per channel of the images."""

# Layouts that are of tensors with so many axes only.
AXES = {torch.channels_last: 4, torch.channels_last_3d: 5}


def lay_out(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring a network's weights into a memory format, in place."""
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # which torch's stubs do not know


class Student(nn.Module):
    """One network, with what images (0..1) are normalised with before it sees them, and its memory format.

    What is not given is what the network declares as an attribute of that name, else the default.

    Args:
        network: (B, C, *S) -> logits (B, K, *S); of a list or a tuple the first is taken. May have ``encode`` (images
            -> features, fine to coarse), ``decode`` (features -> logits), ``auxiliary`` (features -> logits by name,
            with the names in ``auxiliary_outputs``), ``decode_all`` (features -> both) and ``size_divisor`` (of S).
        mean, std: a number or one per channel; 0.5 and 0.25.
        memory_format: layout of the convolutions; ``channels_last`` for 2-D, which is faster on CPUs and GPUs alike,
            and contiguous for 3-D.
    Raises:
        ValueError: a mean or std that is neither a number nor a list of numbers, or a std of 0.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Statistic | None = None,
        std: Statistic | None = None,
        memory_format: torch.memory_format | None = None,
    ):
        super().__init__()
        self.network = network
        self.mean = _statistic("mean", getattr(network, "mean", 0.5) if mean is None else mean)
        self.std = _statistic("std", getattr(network, "std", 0.25) if std is None else std)
        for name, value in (("mean", self.mean), ("std", self.std)):
            # Constants, so that they are no part of a checkpoint, but follow the network to its device.
            tensor = None if isinstance(value, float) else torch.tensor(value)
            self.register_buffer(f"_{name}", tensor, persistent=False)
        if memory_format is None:
            flat = all(parameter.ndim < 5 for parameter in network.parameters())  # no convolution of volumes
            memory_format = torch.channels_last if flat else torch.contiguous_format
            memory_format = getattr(network, "memory_format", memory_format)
        self.memory_format: torch.memory_format = memory_format
        lay_out(network, memory_format)

    @property
    def size_divisor(self) -> int:
        """What every side of an image must be divisible by."""
        return int(getattr(self.network, "size_divisor", 1))

    def offers(self, what: str) -> bool:
        """Whether the network has ``encode``, ``decode`` or ``auxiliary``, the latter with anything in it."""
        return callable(getattr(self.network, what, None)) and bool(
            what != "auxiliary" or getattr(self.network, "auxiliary_outputs", True)
        )

    def normalise(self, images: Tensor) -> Tensor:
        """(B, C, *S) in 0..1 -> what the network sees, in its memory format.

        Raises:
            ValueError: images of other channels than mean or std.
        """
        mean, std = (self._per_channel(name, images) for name in ("mean", "std"))
        fits = AXES.get(self.memory_format, images.ndim) == images.ndim
        layout = self.memory_format if fits else torch.contiguous_format
        return ((images - mean) / std).contiguous(memory_format=layout)

    def _per_channel(self, name: str, images: Tensor) -> float | Tensor:
        value: float | tuple[float, ...] = getattr(self, name)
        if isinstance(value, float):
            return value
        if len(value) != images.shape[1]:
            raise ValueError(
                f"images {tuple(images.shape)} have {images.shape[1]} channels, but {name} is of {len(value)}: "
                f"give one number, or one per channel"
            )
        tensor: Tensor = getattr(self, f"_{name}")
        return tensor.view(-1, *(1,) * (images.ndim - 2))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *S) in 0..1 -> logits (B, K, *S)."""
        made = self.network(self.normalise(images))
        logits: Tensor = made[0] if isinstance(made, list | tuple) else made
        return logits

    def encode(self, images: Tensor) -> list[Tensor]:
        """(B, C, *S) in 0..1 -> features, fine to coarse.

        Raises:
            ValueError: the network has no ``encode``, or one that gives something else.
        """
        features = self._ask("encode")(self.normalise(images))
        if not isinstance(features, list | tuple) or not all(isinstance(x, Tensor) for x in features):
            raise ValueError(
                f"encode of {type(self.network).__name__} gives {_kinds(features)}; a student's gives a list of "
                "tensors, fine to coarse, that its decode takes"
            )
        return list(features)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Features of :meth:`encode`, perhaps disturbed -> logits (B, K, *S).

        Raises:
            ValueError: the network has no ``decode``.
        """
        logits: Tensor = self._ask("decode")(features)
        return logits

    def auxiliary(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Features of :meth:`encode` -> further logits by name, each (B, K, ...) at its own resolution.

        Raises:
            ValueError: the network has no ``auxiliary``.
        """
        logits: dict[str, Tensor] = self._ask("auxiliary")(features)
        return logits

    def decode_all(self, features: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """:meth:`decode` and :meth:`auxiliary`, in one pass where the network knows how.

        Raises:
            ValueError: the network lacks one of the two.
        """
        self._ask("auxiliary")
        if not self.offers("decode_all"):
            return self.decode(features), self.auxiliary(features)
        both: tuple[Tensor, dict[str, Tensor]] = self.network.decode_all(features)  # type: ignore[operator]
        return both

    def _ask(self, what: str) -> Any:
        if not self.offers(what):
            raise ValueError(f"student {type(self.network).__name__} offers no {what}; {_KNOWN[what]}")
        return getattr(self.network, what)


_KNOWN = {
    "encode": "unet, vnet, dynunet, segresnet, swin_unetr and timm_unet do",
    "decode": "unet, vnet, dynunet, segresnet, swin_unetr and timm_unet do",
    "auxiliary": "unet does with deep_supervision or more decoders, dynunet with deep_supervision",
}


class Students(nn.Module):
    """Runs every student on the same images; with a fusion head the fused logits are the deployed output.

    Args:
        subnets: networks by name, each (B, C, *S) -> (B, K, *S); those that are no :class:`Student` become one.
        fusion_head: merges the logits of exactly two students, or None.
        mean, std, memory_format: of all students, instead of each one's own.
    Raises:
        ValueError: no student, a student called ``fusion``, or a fusion head over other than two students.
    """

    def __init__(
        self,
        subnets: Mapping[str, nn.Module],
        fusion_head: nn.Module | None = None,
        *,
        mean: Statistic | None = None,
        std: Statistic | None = None,
        memory_format: torch.memory_format | None = None,
    ):
        super().__init__()
        if not subnets or "fusion" in subnets:
            raise ValueError("need at least one student, none of them called 'fusion'")
        if fusion_head is not None and len(subnets) != 2:
            raise ValueError(f"a fusion head merges exactly 2 students, got {len(subnets)}: {', '.join(subnets)}")
        own = {"mean": mean, "std": std, "memory_format": memory_format}
        self.subnets = nn.ModuleDict({name: _as_student(network, own) for name, network in subnets.items()})
        self.fusion_head = fusion_head
        if fusion_head is not None:
            lay_out(fusion_head, self.student(self.names[0]).memory_format)

    def student(self, name: str) -> Student:
        """One student.

        Raises:
            KeyError: there is none of this name.
        """
        return cast(Student, self.subnets[name])

    @property
    def names(self) -> tuple[str, ...]:
        """The students, without the fusion head."""
        return tuple(self.subnets)

    @property
    def deployed(self) -> str:
        """Name of the output that is evaluated first and exported."""
        return "fusion" if self.fusion_head is not None else self.names[0]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Every output, the deployed one first."""
        return tuple(dict.fromkeys((self.deployed, *self.names)))

    @property
    def size_divisor(self) -> int:
        """What every side of an image must be divisible by."""
        return math.lcm(*(self.student(name).size_divisor for name in self.names))

    def normalisation(self) -> dict[str, Any]:
        """``mean`` and ``std`` that all students share; those of each student by its name where they differ."""
        each = {name: {"mean": self.student(name).mean, "std": self.student(name).std} for name in self.names}
        first = each[self.names[0]]
        return first if all(own == first for own in each.values()) else each

    def require(self, *needed: str) -> None:
        """Refuse students that lack any of ``encode``, ``decode``, ``auxiliary``.

        Raises:
            ValueError: names what is lacking where, and who has it.
        """
        for what in needed:
            having = [name for name in self.names if self.student(name).offers(what)]
            lacking = [
                f"{name} ({type(self.student(name).network).__name__})" for name in self.names if name not in having
            ]
            if lacking:
                others = f"of the students here {', '.join(having)} offers it; " if having else ""
                raise ValueError(f"student {', '.join(lacking)} offers no {what}; {others}by name {_KNOWN[what]}")

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, *S) in 0..1 -> logits (B, K, *S) by name; ``fusion`` last if there is one."""
        return self._fuse({name: subnet(images) for name, subnet in self.subnets.items()})

    def encode(self, images: Tensor) -> dict[str, list[Tensor]]:
        """(B, C, *S) in 0..1 -> every student's features by name, fine to coarse.

        Raises:
            ValueError: a student has no ``encode``.
        """
        self.require("encode")
        return {name: self.student(name).encode(images) for name in self.names}

    def decode(self, features: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Features by student's name, perhaps disturbed -> logits (B, K, *S) by name.

        Those of all students give ``fusion`` too, if there is one: ``decode(encode(images))`` is ``forward(images)``.

        Raises:
            ValueError: a student has no ``decode``.
        """
        self.require("decode")
        return self._fuse({name: self.student(name).decode(features[name]) for name in self.names if name in features})

    def auxiliary(self, features: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Features by student's name -> further logits by student's name and their own.

        Raises:
            ValueError: one of these students has no ``auxiliary``.
        """
        return {name: self.student(name).auxiliary(given) for name, given in features.items()}

    def decode_all(
        self, features: Mapping[str, Sequence[Tensor]]
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """:meth:`decode` and :meth:`auxiliary`, in one pass through every decoder that knows how.

        Raises:
            ValueError: one of these students lacks one of the two.
        """
        both = {name: self.student(name).decode_all(features[name]) for name in self.names if name in features}
        return self._fuse({name: logits for name, (logits, _) in both.items()}), {n: x for n, (_, x) in both.items()}

    def _fuse(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.fusion_head is not None and len(logits) == len(self.subnets):
            logits["fusion"] = self.fusion_head(*logits.values())
        return logits

    def network(self, output: str | None = None) -> "DeployedStudents":
        """The network of one output, with these weights; of the deployed one if None.

        Raises:
            ValueError: no such output.
        """
        return DeployedStudents(self, output)


class DeployedStudents(nn.Module):
    """The students as one plain network: image (B, C, *S) in 0..1 -> logits (B, K, *S) of one output.

    Holds and runs only what that output needs: both students for ``fusion``, else the one student.

    Args:
        students: whose weights these are.
        output: ``fusion`` or a student's name; the deployed output if None.
    Raises:
        ValueError: no such output.
    """

    def __init__(self, students: Students, output: str | None = None):
        super().__init__()
        self.output = output or students.deployed
        if self.output not in students.outputs:
            raise ValueError(f"there is no output {self.output!r}; there are {', '.join(students.outputs)}")
        self.students = students if self.output == "fusion" else Students({self.output: students.student(self.output)})

    @property
    def size_divisor(self) -> int:
        """What every side of an image must be divisible by."""
        return self.students.size_divisor

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, *S) in 0..1 -> logits (B, K, *S)."""
        logits: Tensor = self.students(images)[self.output]
        return logits

    def undecided(self, images: Tensor, margin: float) -> Tensor:
        """Where logits that differ by ``margin`` within a student may make the fused ones jump: bool (B, *S).

        Args:
            images: (B, C, *S) in 0..1.
            margin: of logits.
        """
        logits = self.students(images)
        undecided = getattr(self.students.fusion_head, "undecided", None)
        if undecided is None:
            return torch.zeros_like(logits[self.output][:, 0], dtype=torch.bool)
        first, second = (logits[name] for name in self.students.names)
        where: Tensor = undecided(first, second, margin)
        return where


def _as_student(network: nn.Module, own: Mapping[str, Any]) -> Student:
    """The network as a student; ``own``: what is not each one's own choice."""
    if not isinstance(network, Student):
        return Student(network, **own)
    if all(value is None for value in own.values()):
        return network
    kept = {name: getattr(network, name) if value is None else value for name, value in own.items()}
    return Student(network.network, **kept)


def _statistic(name: str, value: Any) -> float | tuple[float, ...]:
    """A number as it is, several as a tuple; checked."""
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not numbers or not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} must be a number, or one per channel of the images, got {value!r}")
    if name == "std" and min(numbers) <= 0:
        raise ValueError(f"std must be above 0, got {value!r}")
    return tuple(map(float, numbers)) if isinstance(value, Sequence) else float(value)


def _kinds(value: Any) -> str:
    """What a value is made of, for a message."""
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(type(x).__name__ for x in value) or 'nothing'}"
    return type(value).__name__

"""What every format must do, and what several share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from knowsam.errors import DataError
from knowsam.io.stored import Header, PredictionKind, Reading, Stored, StoredMask
from knowsam.io.volume_grid import VolumeGrid


class Kind(ABC):
    """A format, or several that are read alike.

    Attributes:
        name: for messages.
        extensions: in small letters, with the dot.
    """

    name: ClassVar[str]
    extensions: ClassVar[tuple[str, ...]]

    @abstractmethod
    def sniff(self, head: bytes) -> bool:
        """Whether a file that begins with these bytes (1,024, or all) is of this kind."""

    @abstractmethod
    def header(self, path: Path, reading: Reading) -> Header:
        """From the header alone; refuses what ``read`` refuses for its size."""

    @abstractmethod
    def read(self, path: Path, reading: Reading) -> Stored:
        """The image."""

    @abstractmethod
    def read_mask(self, path: Path, reading: Reading) -> StoredMask:
        """The mask."""

    def grid(self, path: Path, reading: Reading) -> VolumeGrid | None:
        """Where a volume lies in the patient; None where the format does not say."""
        return None

    @abstractmethod
    def extension(self, path: Path, kind: PredictionKind) -> str:
        """What the name of a prediction ends with."""

    @abstractmethod
    def encode(
        self, path: Path, kind: PredictionKind, values: np.ndarray, classes: Sequence[str], reading: Reading
    ) -> bytes:
        """Content of a prediction's file, see ``knowsam.io.encode``."""


def suffix(name: str) -> str:
    """``.png`` or ``.nii.gz`` as it is written; empty where the last part is a number (``IM.0001``, ``1.2.840.7``)."""
    if name.lower().endswith(".nii.gz"):
        return name[-7:]
    last = Path(name).suffix
    return "" if last[1:].isdigit() else last


def raw_labels(array: np.ndarray, where: str) -> np.ndarray:
    """Raw mask values as uint8 or uint16, same shape; nothing is rounded.

    Args:
        array: values as stored, any shape and type.
        where: file name for the message.
    Raises:
        DataError: a value that is not a whole number in 0..65535.
    """
    if array.dtype in (np.uint8, np.uint16):
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype == bool:
        return array.astype(np.uint8)
    if array.dtype == np.float16:  # too small for the comparison below
        array = array.astype(np.float32)
    if array.dtype.kind not in "iuf":
        raise DataError(f"{where}: a mask of type {array.dtype} is not read; allowed are whole numbers in 0..65535")
    bad = ~((array >= 0) & (array <= 65535))
    if array.dtype.kind == "f":
        bad |= array != np.floor(array)
    if bad.any():
        some = ", ".join(str(v) for v in np.unique(array[bad])[:5])
        raise DataError(f"{where}: {int(bad.sum())} mask pixels are not whole numbers in 0..65535, such as {some}")
    return array.astype(np.uint16)


def labels_of(array: np.ndarray, where: str) -> np.ndarray:
    """Label values of a file without a palette.

    Args:
        array: (C, *S). Three channels that agree everywhere are one.
        where: file name for the messages.
    Returns:
        uint8 or uint16 (*S), or uint8 (*S, 3) where the mask really is coloured.
    Raises:
        DataError: as ``raw_labels``; another number of channels; colours of more than 8 bits.
    """
    if len(array) == 1 or (len(array) == 3 and (array == array[:1]).all()):
        return raw_labels(array[0], where)
    if len(array) != 3:
        raise DataError(f"{where}: a mask of {len(array)} channels is not read; needed is one channel, or RGB")
    if array.dtype != np.uint8:
        raise DataError(
            f"{where}: a mask with colours of type {array.dtype}, such as 16 bits per colour channel, is not read",
            hint="save it with 8 bits per channel, or as one grey channel",
        )
    return np.ascontiguousarray(np.moveaxis(array, 0, -1))

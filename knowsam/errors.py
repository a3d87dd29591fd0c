"""What a user can cause. The command line prints these without a traceback and exits with their code."""

from collections.abc import Iterable
from typing import NamedTuple


class KnowsamError(Exception):
    """A user's mistake: what came, what is allowed, and (``hint``) what to do about it.

    Args:
        message: what came and what is allowed; may hold several lines when several things are wrong.
        hint: what to do, one sentence; printed on its own line.
    Attributes:
        exit_code: of the command that ends with it.
        kind: what it is about, in front of the message.
        reported_by_main: the process of rank 0 ends with the same error and prints it, so this one need not.
    """

    exit_code = 1
    kind = "error"
    reported_by_main: bool = False

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message)
        self.hint = hint


class ConfigError(KnowsamError):
    """Unknown key, wrong type, impossible pair of settings."""

    exit_code = 78
    kind = "config"


class ContractError(KnowsamError):
    """A method that does not keep the contract of ``methods.base``: its author's mistake, in the contract's words."""

    exit_code = 70
    kind = "method"


class Fault(NamedTuple):
    """One thing that is wrong with the data.

    Attributes:
        kind: in a few words, such as ``"missing mask"``; the same for all faults of a kind.
        text: the whole story, with the file.
        cases: ids that it concerns.
    """

    kind: str
    text: str
    cases: tuple[str, ...] = ()


class DataError(KnowsamError):
    """Bad, mismatched or leaking data or split lists.

    Args:
        message, hint: as for ``KnowsamError``.
        faults: the same one by one, for a report of all that is wrong; empty where the message says it.
    """

    exit_code = 65
    kind = "data"

    def __init__(self, message: str, *, hint: str = "", faults: Iterable[Fault] = ()):
        super().__init__(message, hint=hint)
        self.faults = tuple(faults)


class NotFoundError(KnowsamError):
    """A file, folder, run or checkpoint that is not there."""

    exit_code = 66
    kind = "not found"


class CheckpointError(KnowsamError):
    """Weights or a checkpoint that cannot be used as they are."""

    exit_code = 80
    kind = "checkpoint"


class StorageError(KnowsamError):
    """The disk is full or a write failed."""

    exit_code = 74
    kind = "storage"


class ExistsError(KnowsamError):
    """A file that would be written is there already, and nothing allowed to replace it."""

    exit_code = 73
    kind = "exists"


class RunFolderError(KnowsamError):
    """The run folder is in use by another process, or holds a different run."""

    exit_code = 73
    kind = "run folder"


class NetworkError(KnowsamError):
    """Something that must come over the network cannot be reached."""

    exit_code = 69
    kind = "network"


class NumericError(KnowsamError):
    """A loss that is not finite."""

    exit_code = 79
    kind = "numeric"

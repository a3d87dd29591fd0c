"""The code of the user's own that a run runs: kept beside it, hashed, and compared when it is resumed."""

import hashlib
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import knowsam

PACKAGE = Path(knowsam.__file__).resolve().parent


class OwnCode:
    """The user's own modules that a run uses, each with the text that it had when it was first seen here.

    A module counts as the user's own unless it belongs to Python, to knowsam, to what is installed, or is the program
    that was started. A run uses the modules that its experiment names, what these reach, and whatever is imported
    while it lasts; what a notebook imported before for other ends is not the run's.

    Args:
        named: modules that the experiment names.
    """

    def __init__(self, named: Iterable[str] = ()) -> None:
        paths = sysconfig.get_paths()
        self._foreign = {Path(paths[name]).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        self._foreign |= {Path(folder).resolve() for folder in (*site.getsitepackages(), site.getusersitepackages())}
        self._foreign |= {PACKAGE, PACKAGE.parent / "tools", Path(sys.prefix).resolve() / "bin"}
        self._named = set(named)
        self._before = set(sys.modules)
        self._texts: dict[str, str] = {}
        self._files: dict[str, Path | None] = {"__main__": None}

    def texts(self) -> dict[str, str]:
        """Module -> source text, of all that are used so far."""
        open_ends = (self._named & set(sys.modules)) | (set(sys.modules) - self._before)
        seen: set[str] = set()
        while open_ends:
            name = open_ends.pop()
            seen.add(name)
            if name not in self._files:
                self._files[name] = self._own_file(sys.modules[name])
            if (path := self._files[name]) is not None:
                if name not in self._texts:
                    self._texts[name] = path.read_text(encoding="utf-8", errors="replace")
                open_ends |= _reached(sys.modules[name]) - seen
        return dict(sorted(self._texts.items()))

    def hashes(self) -> dict[str, str]:
        """Module -> SHA-256 of its source text."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts().items()}

    def _own_file(self, module: ModuleType) -> Path | None:
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or not file.endswith(".py"):
            return None
        path = Path(file).resolve()
        if not path.is_file() or any(path.is_relative_to(folder) for folder in self._foreign):
            return None
        return None if {"site-packages", "dist-packages"} & set(path.parts) else path


def _reached(module: ModuleType) -> set[str]:
    """Imported modules whose contents a module's names stand for, and the packages that it lies in."""
    parts = module.__name__.split(".")
    names = {".".join(parts[:n]) for n in range(1, len(parts))}
    for value in list(vars(module).values()):
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str):
            names.add(name)
    return names & set(sys.modules)


def code_changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Modules whose text differs between two sets of hashes.

    Args:
        before: of the run so far; a module that is not imported now is left out, as it may be imported later.
        now: of this process; a module that is new has no past to differ from.
    """
    return [name for name, digest in before.items() if name in now and now[name] != digest]

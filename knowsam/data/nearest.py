"""The nearest of very many names to one that is missing, for ``nearest is 'p1_B'`` in messages."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

_COMPARED = 50  # names that difflib sees
_CUTOFF = 0.6
_PIECE = 1 << 24  # bytes that are looked at in one go
MOST_BYTES = 150_000_000
"""Of names that are looked at for one message: a few seconds, whatever their number."""


class NearestNames:
    """Looks for names that resemble others.

    difflib compares two names in microseconds, and all names in minutes. So it sees only the names that share most
    pairs of neighbouring letters, beginning and end with the missing one, which are counted for all names at once.

    Args:
        names: those there are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names: Sequence[str] = names if isinstance(names, Sequence) else list(names)
        # Closed by NUL, which no file's name holds; folded like loosely(), so that letters of another case are shared.
        text = "\0".join(_folded(name) if not name.isascii() else name for name in self._names) + "\0"
        # surrogates: a name on the disk that is no text at all
        self._text = np.frombuffer(text.lower().encode("utf-8", "surrogatepass"), np.uint8)
        self._ends = np.flatnonzero(self._text == 0) + 1
        self._lengths = np.diff(self._ends, prepend=0) - 1

    def affordable(self, wanted: int) -> int:
        """How many of ``wanted`` names are looked for in one message; at least one."""
        return max(1, min(wanted, MOST_BYTES // max(len(self._text), 1)))

    def of(self, name: str) -> str | None:
        """The name that differs by letters' case, Unicode form or extension only; else the most similar; else None."""
        if not len(self._names):
            return None
        letters = np.frombuffer(_folded(name).lower().encode("utf-8", "surrogatepass"), np.uint8)
        shared = self._shared(letters)
        alike = shared / (np.maximum(self._lengths - 1, 0) + max(len(letters) - 1, 1))
        # numbered names share their pairs by the thousand, in another order
        ends = self._common(letters, from_end=False) + self._common(letters, from_end=True)
        alike += np.minimum(ends, self._lengths) / (self._lengths + max(len(letters), 1))
        count = min(_COMPARED, len(alike))
        best = np.argpartition(-alike, count - 1)[:count]
        candidates = [self._names[n] for n in best[np.lexsort((best, -alike[best]))].tolist()]
        wanted = loosely(name)
        same = next((candidate for candidate in candidates if loosely(candidate) == wanted), None)
        return same or _closest(name, candidates)

    def _shared(self, letters: np.ndarray) -> np.ndarray:
        """Of each name's pairs of neighbouring letters, how many the wanted name has too, (N,)."""
        ours = np.zeros(1 << 16, bool)
        ours[letters[:-1].astype(np.uint16) << 8 | letters[1:]] = True
        found = np.zeros(len(self._ends), np.int64)
        first = 0
        while first < len(self._ends):
            begin = int(self._ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(self._ends, begin + _PIECE, side="right")))
            text = self._text[begin : int(self._ends[last - 1])].astype(np.uint16)
            hits = np.zeros(len(text), np.int64)
            hits[:-1] = ours[text[:-1] << 8 | text[1:]]  # a pair with NUL in it is never the wanted name's
            found[first:last] = np.add.reduceat(hits, np.r_[0, self._ends[first : last - 1] - begin])
            first = last
        return found

    def _common(self, letters: np.ndarray, *, from_end: bool) -> np.ndarray:
        """Length of the beginning (or the end) that each name has in common with the wanted one, (N,)."""
        common = np.zeros(len(self._ends), np.int64)
        left = np.arange(len(self._ends))
        places = self._ends - 2 if from_end else self._ends - self._lengths - 1
        for n in range(len(letters)):
            left = left[self._lengths[left] > n]
            same = self._text[places[left] + (-n if from_end else n)] == letters[-1 - n if from_end else n]
            left = left[same]
            if not len(left):
                break
            common[left] += 1
        return common


def _closest(name: str, candidates: Sequence[str]) -> str | None:
    """As ``difflib.get_close_matches``; of several that are equally close, the first."""
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(name)  # of which it remembers what it needs
    best, closest = _CUTOFF, None
    for candidate in candidates:
        matcher.set_seq1(candidate)
        if matcher.real_quick_ratio() >= best and matcher.quick_ratio() >= best:
            ratio = matcher.ratio()
            if ratio > best or (closest is None and ratio == best):
                best, closest = ratio, candidate
    return closest


def loosely(name: str) -> str:
    """Equal for names that differ by case, Unicode form or extension only."""
    return re.sub(r"\.(png|jpe?g|bmp|tiff?|h5)$", "", _folded(name))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()

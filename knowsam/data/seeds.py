"""Seeds of every random draw, from the run's seed and words for what is drawn."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any number of integers and words; different words give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

"""Reads the documentation: its pages, their fenced blocks and their links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# Before a block: why no test of this folder runs it, or which other test does.
MARKS = ("<!-- not run: ", "<!-- run by: ")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why a test does not run it (empty: it does)."""

    language: str
    text: str
    not_run: str

    @property
    def file(self) -> str:
        """Name of the file that the block is, if its first line says so, as in ``# my_lab/methods.py``."""
        named = re.match(r"# ([\w/]+\.(?:py|yaml))\n", self.text)
        return named[1] if named else ""


def blocks(page: Path) -> list[Block]:
    """Fenced blocks of a page, in order."""
    found = []
    why = ""
    fence: list[str] | None = None
    language = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if fence is not None:
            if line.strip() == "```":
                found.append(Block(language, "\n".join(fence) + "\n", why))
                fence, why = None, ""
            else:
                fence.append(line)
        elif line.lstrip().startswith("```"):
            fence, language = [], line.strip().removeprefix("```")
        elif line.startswith(MARKS):
            why = line.removeprefix("<!-- ").removesuffix("-->").strip()
        elif line.strip():
            why = ""
    assert fence is None, f"{page.name}: a block is not closed"
    return found


def pages() -> list[Path]:
    """Every page."""
    return sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)

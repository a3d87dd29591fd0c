"""Reads the documentation: its pages, their fenced blocks and their links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

# Pages whose python blocks run, one after the other in the same names; files that they name are written first.
RUN = (
    "skd_in_your_method.md",
    "extending.md",
    "writing_a_method.md",
    "methods_from_papers.md",
    "extending_sam.md",
    "labels.md",
    "prompts.md",
)

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


def files() -> dict[str, Block]:
    """File name -> block, of every file that the pages tell one to write."""
    found = {}
    for page in RUN:
        for block in blocks(DOCS / page):
            if block.file:
                assert block.file not in found, f"{page}: {block.file} is written twice"
                found[block.file] = block
    return found


def write_files(folder: Path) -> None:
    """Write them; experiments inherit from the shipped ones."""
    for name, block in files().items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(re.sub(r"(?m)^inherits: ", f"inherits: {ROOT}/experiments/", block.text), encoding="utf-8")


def section(page: str, title: str) -> str:
    """Text of a section of a page, up to the next heading, without fenced blocks."""
    text = re.sub(r"(?ms)^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"))
    found = re.search(rf"(?ms)^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", text)
    assert found, f"{page} has no section {title!r}"
    return found[2]


def first_cells(text: str) -> list[str]:
    """Names in backticks in the first column of every table of a text, in order."""
    rows = re.findall(r"(?m)^\| *([^|]*?) *\|", text)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]

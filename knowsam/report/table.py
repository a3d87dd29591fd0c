"""A table as rows of text, and as Markdown, as LaTeX with booktabs, and as CSV."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "×": r"$\times$",
}
_MINUS = re.compile(r"(?<![\w.-])-(?=\d)")


@dataclass(frozen=True)
class Table:
    """Text in columns.

    Attributes:
        name: of this kind of table, for labels: ``results``, ``tests``, ...
        title: one line.
        head: names of the columns.
        rows: as many texts each.
        left: number of leading columns that hold words; the others hold numbers.
        strong: indices of rows to set off.
    """

    name: str
    title: str
    head: list[str]
    rows: list[list[str]]
    left: int = 1
    strong: frozenset[int] = field(default_factory=frozenset)


def markdown_text(text: str) -> str:
    """Text of others as it is: nothing in it is markup, and a cell stays one cell."""
    escaped = re.sub(r"([\\|*`<>\[\]])", r"\\\1", " ".join(text.split()))
    # Inside a word an underscore is no emphasis, and setting names are full of them.
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", escaped)


def latex_text(text: str) -> str:
    """Text of others for LaTeX, every special character escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def to_markdown(table: Table) -> str:
    """A GitHub table under its title."""

    def line(texts: Iterable[str]) -> str:
        return "| " + " | ".join(texts) + " |"

    rows = []
    for i, row in enumerate(table.rows):
        texts = [markdown_text(text) for text in row]
        rows.append(line([f"**{text}**" if i in table.strong and text else text for text in texts]))
    rule = ["---" if i < table.left else "---:" for i in range(len(table.head))]
    head = [markdown_text(text) for text in table.head]
    return "\n".join([f"**{markdown_text(table.title)}**", "", line(head), line(rule), *rows, ""])


def to_latex(table: Table, notes: Sequence[str] = ()) -> str:
    """A ``table`` environment with booktabs rules.

    Args:
        table: what to print.
        notes: sentences below it.
    """

    def cell(text: str, *, strong: bool) -> str:
        # A hyphen before a digit is a minus sign.
        shown = latex_text(text) if not _MINUS.search(text) else _MINUS.sub("\0", text)
        shown = latex_text(shown).replace("\0", "$-$") if "\0" in shown else shown
        return rf"\textbf{{{shown}}}" if strong and shown else shown

    def line(texts: Sequence[str], *, strong: bool = False) -> str:
        return "    " + " & ".join(cell(text, strong=strong) for text in texts) + r" \\"

    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        r"  \small" if len(table.head) < 9 else r"  \scriptsize",
        r"  \setlength{\tabcolsep}{3pt}",
        rf"  \caption{{{latex_text(table.title)}.}}",
        rf"  \begin{{tabular}}{{@{{}}{columns}@{{}}}}",
        r"    \toprule",
        line(table.head),
        r"    \midrule",
        *(line(row, strong=i in table.strong) for i, row in enumerate(table.rows)),
        r"    \bottomrule",
        r"  \end{tabular}",
    ]
    if notes:
        lines += ["", r"  \smallskip", r"  \parbox{\linewidth}{\footnotesize"]
        lines += [f"    {latex_text(note)}" for note in notes]
        lines[-1] += "}"
    return "\n".join([*lines, r"\end{table}", ""])


def to_csv(records: Sequence[Mapping[str, str]]) -> str:
    """CSV with a head; no text in it is run as a formula by a spreadsheet.

    Args:
        records: at least one; all with the same keys in the same order.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(records[0])
    writer.writerows([_csv_field(text) for text in record.values()] for record in records)
    return file.getvalue()


def _csv_field(text: str) -> str:
    try:
        float(text)
    except ValueError:
        return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
    return text

"""A notebook as a page: ``{notebook} notebooks/x.ipynb`` shows its text and code, and offers the file."""

import json
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Notebook(SphinxDirective):
    """Markdown cells as text, code cells as code. A level-2 heading, first in its cell, begins a section."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(path)
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        content: list[nodes.Node] = []
        sections: list[nodes.section] = []
        for cell in cells:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                text = f"```python\n{text}\n```"
            title, _, rest = text.partition("\n")
            if title.startswith("# "):
                text = rest  # the page has a title of its own
            elif title.startswith("## "):
                name = title.removeprefix("## ")
                section = nodes.section(ids=[nodes.make_id(name)])
                section += nodes.title("", name)
                sections.append(section)
                text = rest
            parsed = self.parse_text_to_nodes(text)
            if sections:
                sections[-1] += parsed
            else:
                content += parsed
        return [*content, *sections]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("notebook", Notebook)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

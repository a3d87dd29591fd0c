"""Figures that follow the page from light to dark: an SVG below ``figures/`` is put into the page itself.

In an ``<img>`` it could not see which theme the reader chose. Where Markdown is shown without Sphinx the same file is
an ordinary image and follows the browser's preference.
"""

import html
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class InlineFigures(SphinxTransform):
    """Replaces images of ``figures/*.svg`` by the file's content."""

    default_priority = 100  # before Sphinx collects and copies images

    def apply(self, **_: object) -> None:
        """Called by Sphinx, once a page."""
        for image in list(self.document.findall(nodes.image)):
            uri = image["uri"]
            if not (uri.startswith("figures/") and uri.endswith(".svg")):
                continue
            path = Path(self.env.srcdir) / uri
            self.env.note_dependency(path)
            title = html.escape(image.get("alt", ""), quote=True)
            svg = path.read_text(encoding="utf-8").replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
            # Wider than a telephone, and then scrolled by itself, which a keyboard must be able to do too.
            figure = f'<figure class="knowsam-figure" tabindex="0">{svg}</figure>'
            raw = nodes.raw("", figure, format="html")
            paragraph = image.parent
            alone = isinstance(paragraph, nodes.paragraph) and len(paragraph) == 1
            (paragraph if alone else image).replace_self(raw)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_transform(InlineFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

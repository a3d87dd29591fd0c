"""Reference pages from docstrings: ``{api} losses`` documents every module of a room, found on the disk.

A new module is on its page without anybody listing it. Names that begin with an underscore are hidden.
"""

import ast
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import knowsam

PACKAGE = Path(knowsam.__file__).parent


def modules(room: str) -> list[str]:
    """Dotted names of a room's public modules below ``knowsam``, the room first, packages before what they hold."""
    path = PACKAGE.joinpath(*room.split("."))
    if path.with_suffix(".py").is_file():
        return [f"knowsam.{room}"]
    found = [".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in path.rglob("*.py")]
    names = sorted(name.removesuffix(".__init__") for name in found)
    return [f"knowsam.{name}" for name in names if not any(part.startswith("_") for part in name.split("."))]


class Api(SphinxDirective):
    """One heading a module, with what its docstrings say."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        sections: list[nodes.Node] = []
        found = modules(self.arguments[0])
        if not found:
            raise self.error(f"there is no room {self.arguments[0]!r} in knowsam")
        for name in found:
            self.env.note_dependency(_file(name))
            package = _file(name).name == "__init__.py"
            if package and not ast.get_docstring(ast.parse(_file(name).read_text(encoding="utf-8"))):
                continue  # nothing to say
            # What a package only passes on is documented where it is defined.
            members = [] if package else ["   :members:", "   :ignore-module-all:"]
            content = self.parse_text_to_nodes("\n".join(["```{eval-rst}", f".. automodule:: {name}", *members, "```"]))
            section = nodes.section(ids=[nodes.make_id(name)])
            section += nodes.title("", "", nodes.literal("", name))
            section += content
            sections.append(section)
        return sections


def _file(module: str) -> Path:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def plain_text(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Docstrings are prose, not markup: the star of a shape such as ``(B, *spatial)`` begins no emphasis."""
    lines[:] = [re.sub(r"(?<=[\s(])\*(?=\w+[\s,.;:)\]])", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("api", Api)
    # After napoleon (500), which escapes what it knows itself.
    app.connect("autodoc-process-docstring", plain_text, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

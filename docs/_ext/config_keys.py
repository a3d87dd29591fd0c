"""Tables of every key that an experiment may hold: ``{config-keys}``.

Read from the source text of the dataclasses of ``knowsam.config.schema`` (a field's comment is its meaning) and of the
constructors that ``knowsam.components`` names (its docstring's ``Args``), so that no key is listed by hand.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields, replace

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from knowsam import components
from knowsam.config import schema


@dataclass(frozen=True)
class Key:
    """One row: the key below its block, its annotation and default as in the source, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Block:
    """A table: where its keys go in an experiment, the component they belong to if there is a choice, and the keys."""

    place: str
    component: str
    summary: str
    keys: list[Key]


def blocks() -> list[Block]:
    """Every block of an experiment, in the order of ``Config``."""
    named = {
        "data.source": (components.SOURCES, "source"),
        "data.intensity": (components.INTENSITIES, "intensity"),
        "augment": (components.AUGMENTERS, "augment"),
        "students.<name>": (components.STUDENTS, "students"),
        "fusion": (components.FUSION_HEADS, "fusion"),
        "sam": ({"": components.SAM_GUIDE}, "sam"),
        **{f"sam.{part}": (table, part) for part, (table, _) in components.SAM_PARTS.items()},
        "method": (components.METHODS, "method"),
        "skd": ({"": components.SKD}, "skd"),
        "optim.<group>": (components.OPTIMIZERS, "optim"),
    }
    return [
        Block("", "", "", list(_fields(schema.Config))),
        Block("data", "", "", list(_fields(schema.DataConfig))),
        *(
            _component(place, name, target, components.OFFERED[kind])
            for place, (table, kind) in named.items()
            for name, target in table.items()
        ),
        Block("train", "", "", list(_fields(schema.TrainConfig))),
        Block("evaluate", "", "", list(_fields(schema.EvaluateConfig))),
    ]


def _fields(kind: type) -> Iterator[Key]:
    """Fields of a dataclass that hold a value; those that are blocks of their own have tables of their own."""
    source = inspect.getsource(kind)
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    own_tables = {"data", "augment", "students", "fusion", "sam", "method", "skd", "optim", "train", "evaluate"}
    skipped = own_tables if kind is schema.Config else {"source"} if kind is schema.DataConfig else set()
    default = kind()
    known = {field.name for field in fields(kind)}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and node.target.id in known - skipped:
            comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
            value = getattr(default, node.target.id)
            yield Key(node.target.id, ast.unparse(node.annotation), _yaml(value), comment)


def _component(place: str, name: str, target: str, provided: Collection[str]) -> Block:
    """Keys of a block that names a component: the arguments of its constructor, less those that build.py hands in.

    Options that are a block within are listed with their dotted names.
    """
    summary, keys = _arguments(target, provided)
    if place == "method":
        own = {"students": components.literal(target, "default_students")}
        own["fusion"] = components.literal(target, "default_fusion")
        said = "; ".join(f"``{key}: {_yaml(value)}``" for key, value in own.items() if value)
        summary = f"{summary} Its own networks, where an experiment names none: {said}."
    return Block(place, name, summary, keys)


def _arguments(target: str, provided: Collection[str]) -> tuple[str, list[Key]]:
    module, _, attribute = target.partition(":")
    made = getattr(importlib.import_module(module), attribute)
    summary, meanings = arguments_of(inspect.getdoc(made) or "")
    if inspect.isfunction(made):  # what a function hands on is explained by the class that it makes
        _, further = arguments_of(inspect.getdoc(inspect.signature(made).return_annotation) or "")
        meanings = {**further, **meanings}
    keys: list[Key] = []
    for argument, parameter in components.signature(target).items():
        if argument in provided:
            continue
        if parameter.options:
            default = "null" if parameter.default == "None" else "as below"
            keys.append(Key(argument, parameter.annotation, default, meanings.get(argument, "")))
            _, within = _arguments(parameter.options, ())
            keys += [replace(key, name=f"{argument}.{key.name}") for key in within]
        else:
            default = "required" if parameter.required else _literal(ast.parse(parameter.default, mode="eval").body)
            keys.append(Key(argument, parameter.annotation, default, meanings.get(argument, "")))
    return summary, keys


def _literal(node: ast.expr) -> str:
    try:
        return _yaml(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)  # the name of a constant


def _yaml(value: object) -> str:
    """A default as one would write it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return value or "''" if isinstance(value, str) else str(value)


def arguments_of(docstring: str) -> tuple[str, dict[str, str]]:
    """First paragraph of a Google-style docstring, and the entries of its ``Args`` by argument."""
    summary = " ".join(docstring.partition("\n\n")[0].split())
    section = re.search(r"(?ms)^(?:Args|Attributes):\n(.*?)(?=^\S|\Z)", docstring)
    meanings: dict[str, str] = {}
    for entry in re.findall(r"(?m)^    (\w[\w, ]*): ((?:.|\n {8})+)", section[1] if section else ""):
        for name in entry[0].split(", "):
            meanings[name] = " ".join(entry[1].split())
    return summary, meanings


class ConfigKeys(SphinxDirective):
    """One section a block, one table a component."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx."""
        sections: dict[str, nodes.section] = {}
        for block in blocks():
            self.env.note_dependency(schema.__file__)
            if block.place not in sections:
                title = block.place or "at the top"
                section = nodes.section(ids=[nodes.make_id(f"keys {title}")])
                section += nodes.title("", "", nodes.literal("", title) if block.place else nodes.Text(title))
                sections[block.place] = section
            sections[block.place] += self._block(block)
        return list(sections.values())

    def _block(self, block: Block) -> list[nodes.Node]:
        shown: list[nodes.Node] = []
        if block.component:
            words = [nodes.literal("", f"name: {block.component}"), nodes.Text(". "), *inline(block.summary)]
            shown.append(nodes.paragraph("", "", *words))
        elif block.summary:
            shown.append(nodes.paragraph("", "", *inline(block.summary)))
        if not block.keys:
            return [*shown, nodes.paragraph("", "It has no keys of its own.")]
        table = nodes.table(classes=["config-keys"])
        group = nodes.tgroup(cols=3)
        group += [nodes.colspec(colwidth=width) for width in (24, 20, 56)]
        head, body = nodes.thead(), nodes.tbody()
        head += _row(*([nodes.Text(word)] for word in ("Key", "Default", "Meaning and type")))
        prefix = f"{block.place}." if block.place else ""
        for key in block.keys:
            name = nodes.literal("", key.name, ids=[nodes.make_id(f"{prefix}{block.component} {key.name}")])
            kind = nodes.inline("", "", nodes.literal("", key.kind), classes=["kind"])
            meaning = [*inline(key.meaning), nodes.Text(" "), kind] if key.meaning else [kind]
            body += _row([name], [nodes.literal("", key.default)], meaning)
        group += [head, body]
        table += group
        return [*shown, table]


def _row(*cells: list[nodes.Node]) -> nodes.row:
    row = nodes.row()
    row += [nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells]
    return row


def inline(text: str) -> list[nodes.Node]:
    """Text with ``literals``, in one backtick or two; names of roles are dropped."""
    parts = re.split(r"(?::\w+:)?`{1,2}([^`]+)`{1,2}", text)
    return [nodes.literal("", part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts) if part]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

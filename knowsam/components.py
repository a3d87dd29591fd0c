"""Tables of what a YAML block may name, and the constructor signatures that are the blocks' schema.

Signatures and declared literals are read from the source text, so that checking a configuration imports neither torch
nor anything else slow, and runs no code of anybody's. A name that holds a colon, such as ``my_lab.code:MyMethod``, is
taken from outside the package; inherited constructors, re-exported names and dataclasses are followed.
"""

import ast
import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from knowsam.needs import Needs
from knowsam.text import did_you_mean

METHODS = {
    "knowsam": "knowsam.methods.knowsam:KnowSAM",
    "mean_teacher": "knowsam.methods.mean_teacher:MeanTeacher",
    "supervised": "knowsam.methods.supervised:Supervised",
}
STUDENTS = {
    "unet": "knowsam.models.unet:UNet",
    "vnet": "knowsam.models.vnet:VNet",
    "dynunet": "knowsam.models.monai_networks:dynunet",
    "segresnet": "knowsam.models.monai_networks:segresnet",
    "swin_unetr": "knowsam.models.monai_networks:swin_unetr",
    "timm_unet": "knowsam.models.timm_unet:TimmUNet",
}
FUSION_HEADS = {"ham": "knowsam.models.fusion:FusionHead"}
SOURCES = {
    "builtin": "knowsam.data.builtin:BuiltIn",
    "image_folder": "knowsam.data.folder:ImageFolder",
    "h5_slices": "knowsam.data.h5:H5Slices",
    "volumes": "knowsam.data.folder:ImageFolder",  # patch_size of three numbers makes the difference
}
INTENSITIES = {
    "as_is": "knowsam.data.intensity:AsIs",
    "window": "knowsam.data.intensity:Window",
    "minmax": "knowsam.data.intensity:MinMax",
    "percentile": "knowsam.data.intensity:Percentile",
    "zscore": "knowsam.data.intensity:ZScore",
}
OPTIMIZERS = {
    "adam": "knowsam.engine.optim:adam",
    "adamw": "knowsam.engine.optim:adamw",
    "sgd": "knowsam.engine.optim:sgd",
}
# Blocks inside `sam`.
SAM_ENCODERS = {
    "vit_b": "knowsam.models.sam.sizes:vit_b",
    "vit_l": "knowsam.models.sam.sizes:vit_l",
    "vit_h": "knowsam.models.sam.sizes:vit_h",
    "vit_tiny": "knowsam.models.sam.sizes:vit_tiny",
    "vit_small": "knowsam.models.sam.sizes:vit_small",
    "sam_vit": "knowsam.models.sam.sizes:sam_vit",
}
SAM_DECODERS = {"sam": "knowsam.models.sam.mask_decoder:SamMaskDecoder"}
SAM_PROMPTS = {"learned": "knowsam.models.sam.prompt_generator:PromptGenerator"}
TUNINGS = {"adapter": "knowsam.models.tuning.adapter:add_adapters"}
AUGMENTERS = {"standard": "knowsam.data.augment:Augmenter"}
SKD = "knowsam.methods.sam_teacher:SkdOptions"
SAM_GUIDE = "knowsam.models.sam.build:build_sam_guide"

# Blocks inside `sam`, each with its table and the name that it has where none is given.
SAM_PARTS = {
    "encoder": (SAM_ENCODERS, "vit_b"),
    "decoder": (SAM_DECODERS, "sam"),
    "prompt": (SAM_PROMPTS, "learned"),
    "tuning": (TUNINGS, None),
}

FACTS = (
    "num_classes",
    "in_channels",
    "spatial_dims",
    "image_size",
    "labelled_batch",
    "unlabelled_batch",
    "max_steps",
)
"""What of an experiment is handed to every method that asks for it by name."""

OFFERED: dict[str, frozenset[str]] = {
    "method": frozenset({*FACTS, "students", "sam_guide", "sam", "formulas"}),
    "students": frozenset({"num_classes", "out_channels", "in_channels", "spatial_dims", "image_size"}),
    "fusion": frozenset({"num_classes", "spatial_dims"}),
    "optim": frozenset({"parameters"}),
    "source": frozenset({"splits", "num_classes", "labelled", "label_table", "index", "reading", "spatial_dims"}),
    "intensity": frozenset(),
    "augment": frozenset({"strong_views", "plain_labelled"}),
    "sam": frozenset({"image_size", "num_classes", "in_channels", "spatial_dims", "omit", "freeze"}),
    "encoder": frozenset({"image_size", "in_channels", "encoder_type"}),
    "decoder": frozenset({"embed_dim", "image_size", "num_classes"}),
    "prompt": frozenset({"num_classes", "embed_dim"}),
    "tuning": frozenset({"encoder", "mask_decoder", "sam", "embed_dim"}),
    "skd": frozenset(),
}
"""Kind of component -> arguments that whoever builds it hands in by name, so that YAML does not set them."""

# Packages whose classes say nothing about a component: the search for a constructor or a literal ends there.
FOUNDATIONS = ("torch", "abc", "typing", "builtins", "enum", "collections")


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor.

    Attributes:
        annotation: as text; empty if there is none.
        required: whether it must be given.
        default: as text.
        options: ``module:name`` of the dataclass that the annotation names, whose fields a YAML block may give.
    """

    annotation: str
    required: bool
    default: str = ""
    options: str = ""


class WrongArguments(TypeError):
    """Options that a constructor does not have, or arguments that it lacks."""


class Signature(dict[str, Parameter]):
    """Arguments of a constructor by name.

    Attributes:
        open: whether it takes others too (``**kwargs``), so that nothing can be said about a name that is not here.
    """

    open: bool = False


def load(target: str) -> Any:
    """Import ``package.module:name``."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


def signature(target: str) -> Signature:
    """Arguments of the class or function ``package.module:name``, without ``self``, read from its source text.

    A class without a constructor of its own has its base's; a dataclass has its fields.

    Raises:
        LookupError: there is no such module, or it holds no such class or function.
    """
    module, node = _find(target)
    if isinstance(node, ast.FunctionDef):
        return _arguments(module, node, skip=0)
    return _constructor(module, node)


def literal(target: str, name: str) -> Any:
    """What the class ``package.module:name``, or the nearest of its bases, declares as class attribute ``name``.

    Returns:
        The value of a literal, or of a call of ``Needs`` with literals; None if there is none that can be read.
    Raises:
        LookupError: there is no such module, or it holds no such class or function.
    """
    module, node = _find(target)
    for _, owner in _ancestry(module, node):
        for item in owner.body:
            if isinstance(item, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in item.targets):
                return _value(item.value)
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
                return _value(item.value)
    return None


def needs(target: str) -> Needs:
    """What the method ``package.module:Class`` declares that it needs; the default if it says nothing.

    Raises:
        LookupError: there is no such module, or it holds no such class.
        ValueError: it declares values that no method may need.
    """
    return literal(target, "needs") or Needs()


def call(constructor: Callable[..., Any], offered: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """``constructor(**options)``, with those of ``offered`` that it asks for by name.

    An option whose annotation is a dataclass may be given as a mapping of its fields.

    Raises:
        WrongArguments: options that the constructor does not have, each with the nearest that it has, or arguments that
            it lacks.
    """
    parameters = inspect.signature(constructor).parameters
    given = {name: value for name, value in offered.items() if name in parameters} | dict(options)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in options if name not in parameters and not takes_all]
    missing = [
        name
        for name, p in parameters.items()
        if name not in given and p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if unknown or missing:
        free = [name for name in parameters if name not in offered]
        what = [f"it has no parameter {name!r}{did_you_mean(name, free)}" for name in unknown]
        what += [f"it needs {name!r}" for name in missing]
        raise WrongArguments(f"{getattr(constructor, '__name__', constructor)}: {'; '.join(what)}")
    return constructor(**{name: _as_options(constructor, name, value) for name, value in given.items()})


def _as_options(constructor: Callable[..., Any], name: str, value: Any) -> Any:
    """A mapping as the dataclass that the argument is annotated with, if it is one."""
    if not isinstance(value, Mapping):
        return value
    owner = constructor.__dict__.get("__init__", constructor) if isinstance(constructor, type) else constructor
    try:
        hint = typing.get_type_hints(owner).get(name)
    except (NameError, TypeError, AttributeError):  # names that only type checkers see are no options
        return value
    for kind in (hint, *typing.get_args(hint)):
        if isinstance(kind, type) and is_dataclass(kind):
            return call(kind, {}, value)
    return value


# ---------------------------------------------------------------- reading source text


def source_file(module: str) -> Path:
    """The file of a module, found without importing it or the packages around it.

    Raises:
        LookupError: there is none.
    """
    if module.partition(".")[0] == "knowsam":  # beside this file, whatever else is called so on the Python path
        base = Path(__file__).parent.joinpath(*module.split(".")[1:])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        raise LookupError(f"there is no module {module!r}")
    spec = _spec(module)
    if spec is None or not spec.origin:
        raise LookupError(f"there is no module {module!r} on the Python path (PYTHONPATH=. adds the folder you are in)")
    return Path(spec.origin)


def _spec(module: str) -> ModuleSpec | None:
    """As ``importlib.util.find_spec``, which imports the packages above a module; this does not."""
    places, spec = None, None
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        finders = (finder.find_spec(name, places) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((found for found in finders if found is not None), None)
        if spec is None:
            return None
        places = spec.submodule_search_locations
        if depth < len(parts) and places is None:
            return None
    return spec


def _tree(module: str) -> ast.Module:
    path = source_file(module)
    if path.suffix != ".py":
        raise LookupError(f"module {module!r} is no Python text, so its signatures cannot be read: {path.name}")
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)  # a file may be edited while a notebook runs


@lru_cache(maxsize=256)
def _parsed(path: Path, changed: int, size: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _find(target: str, seen: tuple[str, ...] = ()) -> tuple[str, ast.ClassDef | ast.FunctionDef]:
    """The module that defines ``module:name``, re-exports followed, and its definition there."""
    module, _, name = target.partition(":")
    if target in seen:
        raise LookupError(f"{target!r} is imported in a circle")
    found: ast.ClassDef | ast.FunctionDef | None = None
    elsewhere = ""
    for node in _statements(_tree(module)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            found, elsewhere = node, ""
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):  # another name of the same
            if any(isinstance(t, ast.Name) and t.id == name for t in node.targets) and node.value.id != name:
                found, elsewhere = None, f"{module}:{node.value.id}"
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    found, elsewhere = None, f"{_absolute(module, node)}:{alias.name}"
                elif alias.name == "*" and found is None and not elsewhere:
                    with suppress(LookupError):
                        return _find(f"{_absolute(module, node)}:{name}", (*seen, target))
    if found is not None:
        return module, found
    if elsewhere:
        return _find(elsewhere, (*seen, target))
    raise LookupError(f"module {module!r} has no class or function {name!r}")


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Of a module, those under ``if`` and ``try`` included."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if isinstance(node, ast.If):
            waiting[:0] = [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            waiting[:0] = [*node.body, *(s for handler in node.handlers for s in handler.body), *node.orelse]


def _absolute(module: str, node: ast.ImportFrom) -> str:
    """The module that a ``from`` statement of another one names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    is_package = source_file(module).name == "__init__.py"
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def _resolve(module: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    """The definition of a (dotted) name as a module sees it; None where it cannot be told, or is a foundation's."""
    head, _, rest = name.partition(".")
    try:
        if not rest:
            found, node = _find(f"{module}:{head}")
            return None if found.partition(".")[0] in FOUNDATIONS else (found, node)
        for statement in _statements(_tree(module)):
            if isinstance(statement, ast.Import):
                for alias in statement.names:
                    if (alias.asname or alias.name) == name.rpartition(".")[0] or alias.asname == head:
                        owner = alias.name if alias.asname else name.rpartition(".")[0]
                        return _resolve_in(owner, name.rpartition(".")[2])
            elif isinstance(statement, ast.ImportFrom):
                for alias in statement.names:
                    if (alias.asname or alias.name) == head:
                        owner = f"{_absolute(module, statement)}.{alias.name}"
                        return _resolve_in(owner, rest)
    except (LookupError, OSError, SyntaxError, ValueError):
        pass
    return None


def _resolve_in(owner: str, name: str) -> tuple[str, ast.ClassDef | ast.FunctionDef] | None:
    return None if owner.partition(".")[0] in FOUNDATIONS else _find(f"{owner}:{name}")


def _ancestry(module: str, node: ast.AST) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and its bases, nearest first, as far as their text can be found."""
    waiting = [(module, node)]
    while waiting:
        where, owner = waiting.pop(0)
        if not isinstance(owner, ast.ClassDef):
            continue
        yield where, owner
        bases = (_resolve(where, ast.unparse(_plain(base))) for base in owner.bases)
        waiting += [base for base in bases if base is not None]


def _plain(base: ast.expr) -> ast.expr:
    """``Base`` of ``Base[Argument]``."""
    return base.value if isinstance(base, ast.Subscript) else base


def _constructor(module: str, node: ast.ClassDef) -> Signature:
    fields = Signature()
    for where, owner in _ancestry(module, node):
        for item in owner.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                found = _arguments(where, item, skip=1)
                if found.open and (bases := [b for b in owner.bases if _resolve(where, ast.unparse(_plain(b)))]):
                    base = _resolve(where, ast.unparse(_plain(bases[0])))
                    if base is not None and isinstance(base[1], ast.ClassDef):
                        passed_on = _constructor(*base)  # type: ignore[arg-type]
                        merged = Signature({**passed_on, **found})
                        merged.open = passed_on.open
                        return merged
                return found
        if any("dataclass" in ast.unparse(decorator) for decorator in owner.decorator_list):
            fields = Signature({**_fields(where, owner), **fields})
    return fields


def _fields(module: str, node: ast.ClassDef) -> Signature:
    """Arguments that ``dataclass`` makes of a class."""
    found = Signature()
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if "ClassVar" not in annotation:
                text = "" if item.value is None else ast.unparse(item.value)
                found[item.target.id] = Parameter(
                    annotation, item.value is None, text, _options_target(module, annotation)
                )
    return found


def _arguments(module: str, function: ast.FunctionDef, *, skip: int) -> Signature:
    positional = [*function.args.posonlyargs, *function.args.args][skip:]
    without_default = len(positional) - len(function.args.defaults)
    defaults = [*[None] * without_default, *function.args.defaults, *function.args.kw_defaults]
    found = Signature()
    for argument, default in zip([*positional, *function.args.kwonlyargs], defaults, strict=True):
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        found[argument.arg] = Parameter(
            annotation,
            default is None,
            "" if default is None else ast.unparse(default),
            _options_target(module, annotation),
        )
    found.open = function.args.kwarg is not None
    return found


def _options_target(module: str, annotation: str) -> str:
    """``module:name`` of a dataclass that an annotation names, alone or beside None."""
    for part in _split(annotation.strip("'\""), "|"):
        name = part.strip()
        if name.replace("_", "").isalnum() and name[:1].isupper() and name != "None":
            found = _resolve(module, name)
            if found is not None and isinstance(found[1], ast.ClassDef):
                where, node = found
                if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
                    return f"{where}:{node.name}"
    return ""


def _value(node: ast.expr | None) -> Any:
    if node is None:
        return None
    try:
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Needs":
            return Needs(**{str(word.arg): ast.literal_eval(word.value) for word in node.keywords})
        return ast.literal_eval(node)
    except (SyntaxError, TypeError, ValueError) as error:
        if isinstance(node, ast.Call):
            raise ValueError(f"{ast.unparse(node)}: {error}") from error
        return None


# ---------------------------------------------------------------- types


def type_error(value: Any, annotation: str) -> str | None:
    """Why ``value`` does not fit the annotation, or None. Annotations that YAML can't express are not judged."""
    options = _split(annotation, "|")
    verdicts = [_fits(value, option.strip()) for option in options if option.strip()]
    if not verdicts or any(verdict is not False for verdict in verdicts):
        return None
    return f"must be {annotation.replace('Literal[', 'one of [')}, got {value!r}"


def _fits(value: Any, kind: str) -> bool | None:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in ("str", "Path"):
        return isinstance(value, str)
    if kind == "None":
        return value is None
    if kind.startswith("Literal["):
        return value in ast.literal_eval(f"({kind[8:-1]},)")
    if kind.startswith(("tuple", "list", "Sequence")):
        if not isinstance(value, list | tuple):
            return False
        inner = [part.strip() for part in _split(kind.partition("[")[2].removesuffix("]"), ",")]
        if kind.startswith("tuple") and inner[-1:] != ["..."] and len(inner) != len(value) and inner != [""]:
            return False
        inner = [inner[0]] * len(value) if inner[-1:] == ["..."] or len(inner) != len(value) else inner
        return all(type_error(v, k) is None for v, k in zip(value, inner, strict=True))
    if kind.startswith(("dict", "Mapping")):
        return isinstance(value, dict)
    return None


def _split(text: str, separator: str) -> list[str]:
    """Split at separators outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]

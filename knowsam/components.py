"""Tables of what a YAML block may name, and the constructor signatures that are the blocks' schema.

Signatures are read from the source text, so that checking a configuration imports neither torch nor anything else slow.
A name that holds a colon, such as ``my_lab.code:MyMethod``, is taken from outside the package.
"""

import ast
import importlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

METHODS = {
    "knowsam": "knowsam.methods.knowsam:KnowSAM",
    "mean_teacher": "knowsam.methods.mean_teacher:MeanTeacher",
    "supervised": "knowsam.methods.supervised:Supervised",
}
STUDENTS = {
    "unet": "knowsam.models.unet:UNet",
    "vnet": "knowsam.models.vnet:VNet",
}
FUSION_HEADS = {"ham": "knowsam.models.fusion:FusionHead"}
SOURCES = {
    "builtin": "knowsam.data.builtin:BuiltIn",
    "image_folder": "knowsam.data.folder:ImageFolder",
    "h5_slices": "knowsam.data.h5:H5Slices",
}
OPTIMIZERS = {
    "adam": "knowsam.engine.optim:adam",
    "adamw": "knowsam.engine.optim:adamw",
    "sgd": "knowsam.engine.optim:sgd",
}
# Blocks inside `sam`; the classes themselves stand in models/sam/variants.py.
SAM_VARIANTS = ("vit_b", "vit_l", "vit_h", "tiny", "small")
TUNINGS = {"adapter": "knowsam.models.tuning.adapter:add_adapters"}
PROMPT_GENERATORS = {"learned": "knowsam.models.sam.prompt_generator:PromptGenerator"}
SKD = "knowsam.methods.with_skd:WithSKD"
AUGMENTER = "knowsam.data.augment:Augmenter"
SAM_GUIDE = "knowsam.models.sam.variants:build_sam_guide"


@dataclass(frozen=True)
class Parameter:
    """One argument of a constructor: its annotation as text, whether it must be given, else its default as text."""

    annotation: str
    required: bool
    default: str = ""


def load(target: str) -> Any:
    """Import ``package.module:name``."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


@lru_cache
def signature(target: str) -> dict[str, Parameter]:
    """Arguments of the class or function ``package.module:name``, without ``self``, read from its source text.

    Raises:
        LookupError: there is no such module, or it holds no such class or function.
    """
    module, name = target.split(":")
    tree = ast.parse(source_file(module).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _arguments(node, skip=0)
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    return _arguments(item, skip=1)
            return {}
    raise LookupError(f"module {module!r} has no class or function {name!r}")


def source_file(module: str) -> Path:
    """The file of a module, which is not imported. Raises LookupError: there is none."""
    if module.partition(".")[0] == "knowsam":  # found without running the packages' __init__, which import torch
        path = Path(__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
        if not path.is_file():
            raise LookupError(f"there is no module {module!r}")
        return path
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        raise LookupError(f"module {module!r} cannot be imported: {error}; is its folder in PYTHONPATH?") from error
    if spec is None or not spec.origin:
        raise LookupError(f"there is no module {module!r} on the Python path (PYTHONPATH=. adds the folder you are in)")
    return Path(spec.origin)


def _arguments(function: ast.FunctionDef, *, skip: int) -> dict[str, Parameter]:
    positional = [*function.args.posonlyargs, *function.args.args][skip:]
    without_default = len(positional) - len(function.args.defaults)
    defaults = [*[None] * without_default, *function.args.defaults, *function.args.kw_defaults]
    return {
        argument.arg: Parameter(
            ast.unparse(argument.annotation) if argument.annotation else "",
            default is None,
            "" if default is None else ast.unparse(default),
        )
        for argument, default in zip([*positional, *function.args.kwonlyargs], defaults, strict=True)
    }


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

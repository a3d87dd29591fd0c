"""What picture files say about themselves beside their pixels, and what a user should be told of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

from knowsam import io
from knowsam.errors import KnowsamError
from knowsam.io.palettes import DARK

Colour = tuple[int, int, int]

ORIENTATION_RULES: dict[Literal["apply", "stored"], str] = {
    "apply": "Image and mask are turned, each as its own tag says and as viewers show them, in training and in "
    "prediction; data.reading={orientation: stored} leaves both as they are stored",
    "stored": "Neither image nor mask is turned, in training and in prediction, as data.reading={orientation: stored} "
    "says",
}
"""What happens to pictures with an orientation tag, by ``Reading.orientation``."""

_TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "flipped",
    5: "transposed",
    6: "turned by 90 degrees",
    7: "transposed and turned",
    8: "turned by 270 degrees",
}
_NEARLY_BLACK = 64
_SHOWN = 3


@dataclass(frozen=True)
class Traits:
    """Of one picture file, from its header.

    Attributes:
        orientation: EXIF or TIFF tag, 1..8; 1: as it is stored.
        palette: colours by index; None: the file has no palette.
        deep: more than 8 bits a value.
        by: of a mask with a palette, what was read: its indices, or its colours (or grey levels).
    """

    orientation: int = 1
    palette: tuple[Colour, ...] | None = None
    deep: bool = False
    by: Literal["index", "colour"] = "index"


def file_traits(path: str | Path) -> Traits:
    """Read them; those of a file that cannot be read are the usual ones, for reading it tells what is wrong."""
    try:
        with open(path, "rb") as file, Image.open(file) as picture:
            orientation = int(picture.getexif().get(ExifTags.Base.Orientation, 1))
            flat = picture.getpalette() if picture.mode in ("P", "PA") else None
        deep = is_deep(path)
    except (KnowsamError, OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return Traits()
    palette = None if flat is None else tuple(zip(flat[::3], flat[1::3], flat[2::3], strict=False))
    return Traits(orientation if orientation in _TURNS else 1, palette, deep)


def is_deep(path: str | Path) -> bool:
    """Whether a picture stores more than 8 bits a value, from the header alone.

    Raises:
        KnowsamError: as ``io.header``.
    """
    return io.header(path).dtype.itemsize > 1


def orientation_note(
    images: Mapping[str, Traits], masks: Mapping[str, Traits], rule: Literal["apply", "stored"] = "apply"
) -> str | None:
    """How many pictures have an orientation tag, and what becomes of it; None without any.

    Args:
        images, masks: by id.
        rule: ``Reading.orientation``.
    """
    said = []
    for what, traits in (("image", images), ("mask", masks)):
        turned = {i: t.orientation for i, t in traits.items() if t.orientation != 1}
        if turned:
            kinds = ", ".join(
                f"{sum(n == k for n in turned.values())} {_TURNS[k]} (tag {k})" for k in sorted(set(turned.values()))
            )
            said.append(f"{len(turned)} of {len(traits)} {what}s have an EXIF orientation: {kinds}; {_some(turned)}")
    if not said:
        return None
    unlike = [i for i, t in masks.items() if t.orientation == 1 and images.get(i, Traits()).orientation != 1]
    text = ". ".join(said) + f". {ORIENTATION_RULES[rule]}"
    if unlike and rule == "apply":
        text += (
            f". {len(unlike)} masks have no such tag: they must have been drawn over the image as a viewer shows it. "
            "Where they were drawn on the stored pixels, they miss its objects: look at knowsam check --preview"
        )
    return text


def turned_mask_note(image: Traits, mask: Traits) -> str:
    """Why a mask has height and width of its image exchanged, to end a message with; empty if that is not known."""
    if image.orientation >= 5 and mask.orientation < 5:
        return (
            f"; it would fit the image as it is stored, before its EXIF orientation {image.orientation} is applied: "
            "data.reading={orientation: stored}"
        )
    return ""


def palette_note(masks: Mapping[str, Traits], used: Mapping[str, Iterable[int]]) -> str | None:
    """What keeps palettes of a set of masks from being read alike; None if nothing does.

    ``io.PaletteWatch`` refuses the same, at the first mask that contradicts an earlier one; this names all.

    Args:
        masks: by id; those without a palette play no part.
        used: id -> indices that occur in the mask, of those that are read by index.
    """
    ids: dict[str, list[str]] = {"index": [], "colour": []}
    holders: dict[int, dict[Colour, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case_id, traits in masks.items():
        if not traits.palette:
            continue
        colours = {index: traits.palette[index] for index in used.get(case_id, ()) if index < len(traits.palette)}
        if traits.by == "index" and all(max(colour) <= DARK for colour in colours.values()):
            continue  # black all over: agrees with every reading
        ids[traits.by].append(case_id)
        for index, colour in colours.items() if traits.by == "index" else ():
            holders[index][colour].append(case_id)
    if ids["index"] and ids["colour"]:
        return (
            f"palette masks disagree: {len(ids['index'])} are read by index ({_some(ids['index'])}), "
            f"{len(ids['colour'])} by colour or grey level ({_some(ids['colour'])}): one class would be several values"
        )
    unlike = {index: colours for index, colours in holders.items() if len(colours) > 1}
    if not unlike:
        return None
    index, found = min(unlike.items())
    shown = "; ".join(f"{_name(colour)} in {len(those)} ({_some(those)})" for colour, those in found.items())
    return (
        f"palette masks disagree: index {index} is {shown}. Masks are read by index, so one class would be two "
        "different things"
    )


def depth_note(brightest: Mapping[str, int], traits: Mapping[str, Traits]) -> str | None:
    """Whether images of more than 8 bits come out nearly black, as those of 12 bits in 16-bit files do.

    Args:
        brightest: id -> largest value of the image as the network sees it, 0..255.
        traits: of the image files by id.
    """
    dark = {i: value for i, value in brightest.items() if traits.get(i, Traits()).deep and value < _NEARLY_BLACK}
    if not dark:
        return None
    return (
        f"{len(dark)} of {len(brightest)} images hold more than 8 bits and use little of their range, as 12 bits in "
        f"16-bit files do: they come out nearly black, at most {max(dark.values())} of 255; {_some(dark)}. Bring them "
        "to the whole range by data.intensity={name: percentile} (or minmax), for all images alike"
    )


def _name(colour: Colour) -> str:
    plain = {(0, 0, 0): "black", (255, 255, 255): "white"}
    return plain.get(colour, str(list(colour)))


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")

"""What picture files say about themselves beside their pixels, and what a user should be told of it."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import ExifTags, Image

from knowsam.data.readers import is_deep
from knowsam.errors import KnowsamError

Colour = tuple[int, int, int]

ORIENTATION_RULE = (
    "Neither image nor mask is turned, in training and in prediction: pixels stay as they are stored, while viewers "
    "turn them"
)
"""What happens to pictures with an orientation tag."""

_TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "flipped",
    5: "transposed",
    6: "turned by 90 degrees",
    7: "transposed and turned",
    8: "turned by 270 degrees",
}
_BLACK, _WHITE = 64, 192  # brightness at most, at least
_SHOWN = 3


@dataclass(frozen=True)
class Traits:
    """Of one picture file, from its header.

    Attributes:
        orientation: EXIF or TIFF tag, 1..8; 1: as it is stored.
        palette: colours by index; None: the file has no palette.
        deep: more than 8 bits a value.
    """

    orientation: int = 1
    palette: tuple[Colour, ...] | None = None
    deep: bool = False


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


def orientation_note(images: Mapping[str, Traits], masks: Mapping[str, Traits]) -> str | None:
    """How many pictures have an orientation tag, and what becomes of it; None without any.

    Args:
        images, masks: by id.
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
    text = ". ".join(said) + f". {ORIENTATION_RULE}"
    if unlike:
        text += (
            f". {len(unlike)} masks have no such tag: those drawn over the image as a viewer shows it do not lie on "
            "its objects. Look at knowsam check --preview; storing the images upright mends it"
        )
    return text


def turned_mask_note(image: Traits, mask: Traits) -> str:
    """Why a mask has height and width of its image exchanged, to end a message with; empty if that is not known."""
    if image.orientation >= 5 and mask.orientation < 5:
        return f"; it would fit the image {_TURNS[image.orientation]} as its EXIF orientation {image.orientation} says"
    return ""


@dataclass(frozen=True)
class PaletteNote:
    """What palettes of masks say.

    Attributes:
        text: for people.
        ambiguous: index and colour disagree between files, so reading by index would mix classes up.
    """

    text: str
    ambiguous: bool


def palette_note(masks: Mapping[str, Traits], used: Mapping[str, Iterable[int]]) -> PaletteNote | None:
    """Whether palettes of masks contradict the indices that are read; None if they do not.

    Args:
        masks: by id; those without a palette play no part.
        used: id -> indices that occur in the mask.
    """
    holders: dict[int, dict[Colour, list[str]]] = defaultdict(lambda: defaultdict(list))
    for case_id, traits in masks.items():
        for index in used.get(case_id, ()) if traits.palette else ():
            if index < len(traits.palette or ()):
                holders[index][(traits.palette or ())[index]].append(case_id)
    unlike = {index: colours for index, colours in holders.items() if len(colours) > 1}
    if unlike:
        index, colours = min(unlike.items())
        shown = "; ".join(f"{_name(colour)} in {len(ids)} ({_some(ids)})" for colour, ids in colours.items())
        return PaletteNote(
            f"palette masks disagree: index {index} is {shown}. Masks are read by index, so one class would be two "
            "different things",
            True,
        )
    colours_of = {index: next(iter(colours)) for index, colours in holders.items()}
    if len(colours_of) > 1 and 0 in colours_of and min(colours_of[0]) >= _WHITE:
        dark = [index for index, colour in colours_of.items() if max(colour) <= _BLACK]
        if dark:
            table = {0: dark[0], **{n: k for n, k in enumerate((i for i in colours_of if i != dark[0]), start=1)}}
            flow = ", ".join(f"{k}: {v}" for k, v in table.items())
            return PaletteNote(
                f"palette masks show index 0 as {_name(colours_of[0])} and index {dark[0]} as "
                f"{_name(colours_of[dark[0]])}. Masks are read by index: class 0, background, is what viewers show "
                f"white. If black is background, give --labels '{{{flow}}}'",
                False,
            )
    return None


def depth_note(brightest: Mapping[str, int], traits: Mapping[str, Traits]) -> str | None:
    """Whether images of more than 8 bits come out nearly black, as those of 12 bits in 16-bit files do.

    Args:
        brightest: id -> largest value of the image as the network sees it, 0..255.
        traits: of the image files by id.
    """
    dark = {i: value for i, value in brightest.items() if traits.get(i, Traits()).deep and value < _BLACK}
    if not dark:
        return None
    return (
        f"{len(dark)} of {len(brightest)} images hold more than 8 bits and use little of their range, as 12 bits in "
        f"16-bit files do: they come out nearly black, at most {max(dark.values())} of 255; {_some(dark)}. Bring them "
        "to the whole range by data.source.intensity=percentile (or minmax), for all images alike"
    )


def _name(colour: Colour) -> str:
    plain = {(0, 0, 0): "black", (255, 255, 255): "white"}
    return plain.get(colour, str(list(colour)))


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "")

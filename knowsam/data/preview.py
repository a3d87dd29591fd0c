"""A picture of what training will see: labelled images with their masks, unlabelled ones as weak and strong view."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from knowsam.data.batch import Batch, Ids
from knowsam.data.check import Findings
from knowsam.data.intensity import as_picture, same_levels
from knowsam.data.levels import as_tensor
from knowsam.data.seeds import derive_seed
from knowsam.data.sizing import Fit
from knowsam.data.source import Source
from knowsam.data.streams import RawBatch
from knowsam.errors import DataError
from knowsam.palette import class_colour

_TILE, _GAP, _HEAD = 224, 8, 26
_INK, _PAPER = (31, 35, 40), (255, 255, 255)


def preview_cases(
    source: Source,
    found: Findings,
    augment: Callable[..., Batch],
    *,
    image_size: int,
    fit: str = "squash",
    class_names: Sequence[str],
    seed: int = 0,
    rows: int = 4,
) -> bytes:
    """Draw a few cases of a checked source, spread over its lists, through an augmenter.

    Args:
        source: 2-D training cases.
        found: what is wrong with them; broken cases are not drawn, and empty masks only for want of others.
        augment: called as (raw batch, seed=...).
        image_size: S, pixels.
        fit: how images come to S x S, see ``sizing.Fit``.
        class_names: K names.
        seed: of the run whose first views are drawn.
        rows: most cases of each kind.
    Returns:
        A PNG file.
    Raises:
        DataError: no labelled case can be read.
    """
    broken = {i for fault in found.errors for i in fault.cases}
    empty = {i for counts in found.classes.values() for i in counts.empty}
    known = set(source.labelled_ids())
    labelled = [i for i in source.labelled_ids() if i not in broken]
    labelled = _spread([i for i in labelled if i not in empty] or labelled, rows)
    unlabelled = _spread([i for i in source.train_ids() if i not in known and i not in broken], rows)
    if not labelled:
        raise DataError("no labelled case can be read")
    fitting = Fit(image_size, fit)
    first, second = same_levels([_images(source, ids, fitting) for ids in (labelled, unlabelled)])
    second = second if len(second) else first[:0]
    masks = np.stack([fitting.mask(source.mask(i)) for i in labelled])
    images, ids, others = (as_tensor(x) for x in (first, masks, second))
    raw = RawBatch(images, ids, others, Ids(tuple(labelled), tuple(unlabelled)), images[:0], ids[:0])
    batch = augment(raw, seed=derive_seed(seed, "augment", 0, 0))
    return preview(first, masks, second, batch, names=labelled, unlabelled_names=unlabelled, class_names=class_names)


def _spread(ids: list[str], count: int) -> list[str]:
    return [ids[n * len(ids) // count] for n in range(count)] if len(ids) > count else ids


def _images(source: Source, ids: Sequence[str], fitting: Fit) -> np.ndarray:
    """Levels (N, C, S, S)."""
    found = [source.image(case_id) for case_id in ids]
    if any(image.ndim != 3 for image in found):
        raise DataError("the preview draws pictures, and these are volumes", hint="Look at knowsam predict --overlays.")
    images = [np.moveaxis(fitting.image(image), 2, 0) for image in found]
    return np.stack(same_levels(images)) if images else np.empty((0, 3, fitting.size, fitting.size), np.uint8)


def preview(
    labelled: np.ndarray,
    masks: np.ndarray,
    unlabelled: np.ndarray,
    batch: Batch,
    *,
    names: Sequence[str],
    unlabelled_names: Sequence[str] = (),
    class_names: Sequence[str],
) -> bytes:
    """Draw the sheet.

    A row: a labelled image, its mask's contour, its augmented form; an unlabelled image, its weak and strong view.

    Args:
        labelled: uint8 (L, 3, S, S), L >= 1.
        masks: uint8 (L, S, S) class ids.
        unlabelled: uint8 (U, 3, S, S); U may be 0.
        batch: what the augmenter made of these three.
        names, unlabelled_names: ids, L and U.
        class_names: K names.
    Returns:
        A PNG file.
    """
    heads = ["labelled image", "with its mask", "augmented, mask moved along"]
    columns: list[list[Image.Image]] = [
        [_tile(image) for image in labelled],
        [_tile(image, mask) for image, mask in zip(labelled, masks, strict=True)],
        [_tile(_bytes(i), m) for i, m in zip(batch.labelled.cpu().numpy(), batch.mask.cpu().numpy(), strict=True)],
    ]
    if len(unlabelled):
        many = len(batch.strong) > 1
        heads += ["unlabelled image", "weak view"]
        heads += [f"strong view {n}" if many else "strong view" for n in range(1, len(batch.strong) + 1)]
        columns += [[_tile(image) for image in unlabelled]]
        columns += [[_tile(_bytes(image)) for image in view.cpu().numpy()] for view in (batch.weak, *batch.strong)]
    rows = max(map(len, columns))
    step, height = _TILE + _GAP, _TILE + _HEAD
    sheet = Image.new("RGB", (len(columns) * step + _GAP, _HEAD + rows * height + _HEAD + _GAP), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (head, tiles) in enumerate(zip(heads, columns, strict=True)):
        x = _GAP + column * step
        draw.text((x, 6), head, _INK, font)
        for row, tile in enumerate(tiles):
            sheet.paste(tile, (x, _HEAD + row * height))
            if column in (0, 3):
                name = (names if column == 0 else unlabelled_names)[row]
                draw.text((x, _HEAD + row * height + _TILE + 4), _short(name), _INK, font)
    x, y = _GAP, _HEAD + rows * height + 4
    for k, name in enumerate(class_names[1:], start=1):
        draw.rectangle((x, y + 2, x + 12, y + 14), class_colour(k))
        draw.text((x + 18, y), _short(name), _INK, font)
        x += 40 + int(draw.textlength(_short(name), font))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def contour(mask: np.ndarray, width: int = 1) -> np.ndarray:
    """Where a class borders on another one: bool (H, W), True on the inner side, background excepted.

    Args:
        mask: class ids (H, W).
        width: of the line, pixels.
    """
    inner = mask > 0
    edge = np.zeros_like(inner)
    padded = np.pad(mask, width, mode="edge")
    for dy in range(-width, width + 1):
        for dx in range(-width, width + 1):
            y, x = width + dy, width + dx
            edge |= padded[y : y + mask.shape[0], x : x + mask.shape[1]] != mask
    return edge & inner


def _tile(image: np.ndarray, mask: np.ndarray | None = None) -> Image.Image:
    """(3, S, S) -> a tile; the contour is drawn at the tile's own resolution, so that it stays thin."""
    picture = Image.fromarray(np.ascontiguousarray(as_picture(np.moveaxis(image, 0, 2))))
    picture = picture.resize((_TILE, _TILE), Image.Resampling.BILINEAR)
    if mask is None:
        return picture
    large = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((_TILE, _TILE), Image.Resampling.NEAREST))
    pixels, edge = np.array(picture), contour(large, width=2)
    for k in np.unique(large[edge]):
        pixels[edge & (large == k)] = class_colour(int(k))
    return Image.fromarray(pixels)


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.rint(image * 255).astype(np.uint8)


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"...{text[-27:]}"

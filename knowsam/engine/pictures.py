"""Pictures of a training step: what the method saw, its labels, and what each network predicted.

Drawn from what the step computed anyway, after the update: no network runs, no random number is drawn and nothing is
written to, so a run with pictures ends in the same bits as one without. Masks of unlabelled images do not exist here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from knowsam.data.batch import Batch
from knowsam.engine.distributed import is_main
from knowsam.engine.log import MetricsLog, warn
from knowsam.engine.options import TrainOptions
from knowsam.files import write_atomically
from knowsam.losses import IGNORE
from knowsam.methods.base import Mix, Prediction, StepOutput
from knowsam.palette import class_colour

MOST = 64
"""Pictures that one run may leave; where ``every`` would give more, every n-th of them is drawn."""

ROWS = 2
"""Images of each kind in one picture."""

# viridis at 0, 1/4, 1/2, 3/4, 1: equal steps look equal, and it stays readable without colour.
HEAT = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SIDE, GAP, MARGIN = 184, 8, 20
INK, SOFT, PAPER = (31, 35, 40), (89, 99, 110), (255, 255, 255)
OPACITY = 0.45


class Pictures:
    """Draws a step now and then, into ``<run>/pictures/step-000200.png`` and TensorBoard.

    Args:
        folder: where the files go; made when the first is drawn.
        log: whose TensorBoard shows them too.
        options: how often, which is widened to a multiple where a run would leave more than ``MOST``; the last step is
            drawn too.
    """

    def __init__(self, folder: Path, log: MetricsLog, options: TrainOptions):
        self.folder = folder
        self.log = log
        every, self.max_steps = options.pictures_every, options.max_steps
        self.every = every * math.ceil(self.max_steps / every / MOST) if every else 0
        self.class_names = list(options.class_names)
        self.title = options.title

    def due(self, step: int) -> bool:
        """Whether the update that ended step ``step`` is to be drawn; on rank 0 only."""
        return is_main() and self.every > 0 and (step % self.every == 0 or step == self.max_steps)

    def draw(self, step: int, batch: Batch, out: StepOutput) -> None:
        """Draw one step. Information only: whatever goes wrong is one warning, and the end of the pictures."""
        try:
            heading = f"{self.title}  step {step} of {self.max_steps}".strip()
            image = draw_step(batch, out, class_names=self.class_names, heading=heading)
            self.folder.mkdir(exist_ok=True)
            path = self.folder / f"step-{step:0{max(6, len(str(self.max_steps)))}}.png"
            write_atomically(path, lambda file: image.save(file, "PNG", compress_level=6))
            self.log.picture("pictures", step, np.asarray(image))
        except Exception as error:
            self.every = 0
            warn(f"no more pictures of training: {type(error).__name__}: {error}; training goes on")


@torch.no_grad()
def draw_step(batch: Batch, out: StepOutput, *, class_names: Sequence[str], heading: str = "") -> Image.Image:
    """One sheet: labelled images, unlabelled images and mixes, a row each, with every network's prediction beside them.

    A prediction stands beside the images that the network saw itself; of a volume the middle slice is drawn.

    Args:
        batch: what the step saw.
        out: what it gave.
        class_names: K names, background first.
        heading: the first line.
    Returns:
        RGB image.
    """
    labelled, unlabelled = len(batch.mask), len(batch.weak)
    rows = (labelled, labelled + unlabelled)
    aligned = {n: p for n, p in out.predictions.items() if len(p.mask) == labelled and len(p.images) in rows}
    aligned = {n: p for n, p in aligned.items() if p.mask is batch.mask}
    apart = {n: p for n, p in out.predictions.items() if n not in aligned}
    # Those that saw the labelled images too come first, so that the others leave no hole between columns.
    teachers = dict(sorted(out.views.teachers.items(), key=lambda item: -len(item[1].images)))
    heat, of = _uncertainty(out)
    if heat is not None and len(heat) != labelled + unlabelled:
        heat = None
    sections = [
        ("labelled images, with the truth outlined in white", _labelled_rows(batch, aligned, teachers, heat, of))
    ]
    if unlabelled and (rest := _unlabelled_rows(batch, aligned, teachers, heat, of)):
        sections.append(("unlabelled images: no mask of theirs is ever read", rest))
    for name, prediction in apart.items():
        panels: list[Panel] = []
        for i in range(min(2 * ROWS, len(prediction.images))):
            image, truth = _pixels(prediction.images[i]), None
            if i < len(prediction.mask):
                known = prediction.mask[i] != IGNORE
                known = known if prediction.valid is None else known & prediction.valid[i]
                truth = _ids(torch.where(known, prediction.mask[i], -1))
                panels.append(Panel("label", image, truth))
            panels.append(Panel(name, image, _argmax(prediction.logits[i])))
        if panels:
            sections.append((f"what {name} saw, and its prediction", [panels]))
    if out.views.mix is not None:
        sections.append(
            ("mixed images: framed cells come from another image", _mixed_rows(out.views.mix, labelled, sections))
        )
    return _sheet(sections, class_names, heading, has_heat=heat is not None)


def _labelled_rows(
    batch: Batch,
    predictions: Mapping[str, Prediction],
    teachers: Mapping[str, Prediction],
    heat: Tensor | None,
    of: str,
) -> "list[list[Panel]]":
    rows = []
    for i in range(min(ROWS, len(batch.mask))):
        image, truth = _pixels(batch.labelled[i]), _ids(batch.mask[i])
        row = [Panel("image", image), Panel("truth", image, np.where(truth == IGNORE, -1, truth))]
        row += [Panel(name, image, _argmax(p.logits[i]), outline=truth) for name, p in predictions.items()]
        row += [
            Panel(_teacher(name), image, _argmax(p.logits[i]), outline=truth) if len(p.mask) else Panel("", None)
            for name, p in teachers.items()
        ]
        row += [] if heat is None else [Panel(f"uncertainty{of}", None, heat=_floats(heat[i]))]
        rows.append(row)
    return rows


def _unlabelled_rows(
    batch: Batch,
    predictions: Mapping[str, Prediction],
    teachers: Mapping[str, Prediction],
    heat: Tensor | None,
    of: str,
) -> "list[list[Panel]]":
    labelled, unlabelled = len(batch.mask), len(batch.weak)
    shown = {name: p for name, p in predictions.items() if len(p.images) == labelled + unlabelled}
    teaching = {name: p for name, p in teachers.items() if len(p.images) - len(p.mask) == unlabelled}
    rows = []
    for i in range(min(ROWS, unlabelled) if shown or teaching else 0):
        weak = _pixels(batch.weak[i])
        row = [Panel("weak view", weak)]
        row += [Panel("strong view", _pixels(view[i])) for view in batch.strong[:1]]
        row += [
            Panel(name, _pixels(p.images[labelled + i]), _argmax(p.logits[labelled + i])) for name, p in shown.items()
        ]
        row += [
            Panel(f"pseudo-label: {_teacher(name)}", weak, _argmax(p.logits[len(p.mask) + i]))
            for name, p in teaching.items()
        ]
        row += [] if heat is None else [Panel(f"uncertainty{of}", None, heat=_floats(heat[labelled + i]))]
        rows.append(row)
    return rows


def _mixed_rows(mix: Mix, labelled: int, above: "list[tuple[str, list[list[Panel]]]]") -> "list[list[Panel]]":
    rows = [
        [
            Panel("mixed image", image := _pixels(mix.images[i]), cells=(cells := _flat(mix.other[i]).cpu().numpy())),
            Panel("mixed label", image, _ids(torch.where(mix.valid[i], mix.label[i], -1)), cells=cells),
            Panel("prediction", image, _argmax(mix.logits[i])),
        ]
        for i in sorted({0, min(labelled, len(mix.images) - 1)})  # one of a labelled image, one of an unlabelled
    ]
    across = [panel for row in rows for panel in row]
    return [across] if len(across) <= max(len(row) for _, section in above for row in section) else rows


@dataclass
class Panel:
    """One cell of the sheet.

    Attributes:
        caption: above it; an empty cell if there is no image and no heat either.
        image: uint8 (S, S, 3).
        label: int (S, S), painted over the image; -1 where nothing is known.
        outline: int (S, S), a second label, drawn as white lines.
        heat: float (S, S) in 0..1, drawn instead of an image.
        cells: bool (S, S), framed in white.
    """

    caption: str
    image: np.ndarray | None
    label: np.ndarray | None = None
    outline: np.ndarray | None = None
    heat: np.ndarray | None = None
    cells: np.ndarray | None = None

    def render(self) -> np.ndarray:
        """uint8 (SIDE, SIDE, 3)."""
        if self.heat is not None:
            return heat_colours(np.asarray(_resize(np.clip(self.heat, 0.0, 1.0).astype(np.float32), smooth=True)))
        assert self.image is not None
        canvas = np.asarray(Image.fromarray(self.image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(float)
        if self.label is not None:
            label = _resize(self.label.astype(np.int32))
            painted = np.asarray([PAPER, *(class_colour(k) for k in range(1, max(2, int(label.max()) + 1)))])
            edge = _edges(label)
            for where, opacity in ((label > 0, OPACITY), (edge & (label > 0), 1.0)):
                canvas[where] += opacity * (painted[label[where]] - canvas[where])
            canvas[label < 0] *= 0.35
        for lines in (self.outline, self.cells):
            if lines is not None:
                edge = _edges(_resize(lines.astype(np.int32)))
                canvas[_grow(edge)] *= 0.55  # a dark rim, so that the white line is seen on white tissue
                canvas[edge] = 255.0
        return np.clip(canvas, 0, 255).round().astype(np.uint8)


def heat_colours(values: np.ndarray) -> np.ndarray:
    """(H, W) in 0..1 -> uint8 (H, W, 3)."""
    place = np.linspace(0.0, 1.0, len(HEAT))
    return np.stack([np.interp(values, place, HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def _uncertainty(out: StepOutput) -> tuple[Tensor | None, str]:
    """The method's own map, or else the entropy of its last output over log K; and whose it is."""
    if out.views.uncertainty is not None:
        return out.views.uncertainty, ""
    if not out.predictions:
        return None, ""
    name, prediction = list(out.predictions.items())[-1]
    log_probs = prediction.logits.float().log_softmax(1)
    entropy = -(log_probs.exp() * log_probs).sum(1) / math.log(log_probs.shape[1])
    return entropy, f" of {name}"


def _teacher(name: str) -> str:
    return "SAM" if name == "sam" else name


def _flat(x: Tensor) -> Tensor:
    """(..., H, W) as it is, (D, H, W) at its middle slice."""
    return x if x.ndim == 2 else x[len(x) // 2]


def _pixels(image: Tensor) -> np.ndarray:
    """(C, *S) in 0..1 -> uint8 (H, W, 3); the first channel in grey where they are not three."""
    image = image if image.ndim == 3 else image[:, image.shape[1] // 2]
    image = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    pixels: np.ndarray = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels


def _ids(label: Tensor) -> np.ndarray:
    ids: np.ndarray = _flat(label).to("cpu", torch.int32).numpy()
    return ids


def _floats(values: Tensor) -> np.ndarray:
    floats: np.ndarray = _flat(values).float().cpu().numpy()
    return floats


def _argmax(logits: Tensor) -> np.ndarray:
    return _ids(logits.argmax(0))


def _resize(values: np.ndarray, *, smooth: bool = False) -> np.ndarray:
    """float32 or int32 (S, S) -> (SIDE, SIDE)."""
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(values).resize((SIDE, SIDE), how))


def _edges(label: np.ndarray) -> np.ndarray:
    """Pixels on either side of a border between two values: a line of two pixels."""
    edge = np.zeros(label.shape, dtype=bool)
    down, right = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _sheet(
    sections: list[tuple[str, list[list[Panel]]]], class_names: Sequence[str], heading: str, *, has_heat: bool
) -> Image.Image:
    """Put the panels on a page with headings, captions and a legend."""
    big, normal, small = (ImageFont.load_default(size) for size in (22, 17, 14))
    columns = max(len(row) for _, rows in sections for row in rows)
    # Never so narrow that a heading or the legend would be cut.
    width = 2 * MARGIN + max(columns, 4) * (SIDE + GAP) - GAP
    height = MARGIN + 34 + sum(34 + 20 + len(rows) * (SIDE + GAP) for _, rows in sections) + 48
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    y = MARGIN
    pen.text((MARGIN, y), _fit(heading, big, width - 2 * MARGIN), INK, big)
    y += 34
    for title, rows in sections:
        pen.text((MARGIN, y + 6), title, INK, normal)
        y += 34
        for number, row in enumerate(rows):
            for column, panel in enumerate(row):
                x = MARGIN + column * (SIDE + GAP)
                if panel.image is None and panel.heat is None:
                    continue
                if number == 0:
                    pen.text((x, y), _fit(panel.caption, small, SIDE), SOFT, small)
                page.paste(Image.fromarray(panel.render()), (x, y + 20))
            y += SIDE + GAP
        y += 20
    _legend(page, pen, y + 10, class_names, small, has_heat=has_heat)
    return page


def _legend(
    page: Image.Image, pen: ImageDraw.ImageDraw, y: int, class_names: Sequence[str], font: Font, *, has_heat: bool
) -> None:
    x, bar, right = MARGIN, 120, page.width - MARGIN
    if has_heat:
        left = right - bar - 12
        page.paste(Image.fromarray(heat_colours(np.linspace(0, 1, bar)[None].repeat(14, 0))), (left, y + 2))
        pen.text((left - 8, y), "uncertainty 0", SOFT, font, anchor="ra")
        pen.text((right, y), "1", SOFT, font, anchor="ra")
        right = left - 8 - round(font.getlength("uncertainty 0"))
    for k, name in enumerate(class_names):
        if k == 0:
            continue  # the background is not painted
        end = x + 20 + font.getlength(name) + 18
        if end > right:
            pen.text((x, y), "...", SOFT, font)
            break
        pen.rectangle((x, y + 2, x + 14, y + 16), class_colour(k))
        pen.text((x + 20, y), name, INK, font)
        x = round(end)


def _fit(text: str, font: Font, width: int) -> str:
    """The text, cut where it would leave its place."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."

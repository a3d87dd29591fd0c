"""Pictures of a training step: what the method saw, its labels, and what each network predicted.

Drawn from what the step computed anyway, after the update: no network runs, no random number is drawn and nothing is
written to, so a run with pictures ends in the same bits as one without. Masks of unlabelled images do not exist here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from knowsam.data.batch import Batch
from knowsam.engine.distributed import is_main
from knowsam.engine.log import MetricsLog, warn
from knowsam.files import write_atomically
from knowsam.methods.base import StepOutput
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
        every: steps between pictures; 0 for none. Widened to a multiple where a run would leave more than ``MOST``.
        max_steps: length of the run; its last step is drawn too.
        class_names: K names, background first.
        title: said above every picture.
    """

    def __init__(
        self, folder: Path, log: MetricsLog, *, every: int, max_steps: int, class_names: Sequence[str], title: str = ""
    ):
        self.folder = folder
        self.log = log
        self.every = every * math.ceil(max_steps / every / MOST) if every else 0
        self.max_steps = max_steps
        self.class_names = list(class_names)
        self.title = title

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
    """One sheet: labelled images, unlabelled images and mixes, a row each, with everybody's answer beside them.

    Args:
        batch: what the step saw.
        out: what it gave.
        class_names: K names, background first.
        heading: the first line.
    Returns:
        RGB image.
    """
    labelled, unlabelled = len(batch.mask), len(batch.strong)
    answers = {name: prediction.logits for name, prediction in out.predictions.items()}
    # Those that saw the labelled images too come first, so that the others leave no hole between columns.
    teachers = dict(sorted(out.views.teachers.items(), key=lambda item: -len(item[1])))
    heat, of = _uncertainty(out)
    sections = []

    rows = [
        [
            Panel("image", image := _pixels(batch.labelled[i])),
            Panel("truth", image, truth := _ids(batch.mask[i])),
            *(Panel(name, image, _argmax(x[i]), outline=truth) for name, x in answers.items()),
            *(
                Panel(_teacher(name), image, _argmax(x[i]), outline=truth)
                if len(x) == labelled + unlabelled
                else Panel("", None)
                for name, x in teachers.items()
            ),
            *([] if heat is None else [Panel(f"uncertainty{of}", None, heat=_floats(heat[i]))]),
        ]
        for i in range(min(ROWS, labelled))
    ]
    sections.append(("labelled images, with the truth outlined in white", rows))

    answers = {name: x for name, x in answers.items() if len(x) == labelled + unlabelled}
    rows = [
        [
            Panel("weak view", weak := _pixels(batch.weak[i])),
            Panel("strong view", strong := _pixels(batch.strong[i])),
            *(Panel(name, strong, _argmax(x[labelled + i])) for name, x in answers.items()),
            *(Panel(f"pseudo-label: {_teacher(n)}", weak, _argmax(x[i - unlabelled])) for n, x in teachers.items()),
            *([] if heat is None else [Panel(f"uncertainty{of}", None, heat=_floats(heat[labelled + i]))]),
        ]
        for i in range(min(ROWS, unlabelled))
        if answers or teachers
    ]
    if rows:
        sections.append(("unlabelled images: no mask of theirs is ever read", rows))

    mix = out.views.mix
    if mix is not None:
        mixes = [
            [
                Panel("mixed image", image := _pixels(mix.images[i]), cells=(cells := mix.other[i].cpu().numpy())),
                Panel("mixed label", image, _ids(torch.where(mix.valid[i], mix.label[i], -1)), cells=cells),
                Panel("answer", image, _argmax(mix.logits[i])),
            ]
            for i in sorted({0, min(labelled, len(mix.images) - 1)})  # one of a labelled image, one of an unlabelled
        ]
        across = [panel for row in mixes for panel in row]
        rows = [across] if len(across) <= len(sections[0][1][0]) else mixes
        sections.append(("mixed images: framed cells come from another image", rows))
    return _sheet(sections, class_names, heading, has_heat=heat is not None)


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


def _pixels(image: Tensor) -> np.ndarray:
    return (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _ids(label: Tensor) -> np.ndarray:
    return label.to("cpu", torch.int32).numpy()


def _floats(values: Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


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

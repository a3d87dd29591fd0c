"""Draws the figures of the documentation: ``python docs/figures/make.py`` writes the SVG files beside this one.

Curves, cells and bars are computed by the package's own functions, pictures are of the built-in dataset. Colours are
variables: inside a page they follow its theme, alone the browser's preference.
"""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from knowsam.data.augment import Augmenter  # noqa: E402
from knowsam.data.batch import Ids  # noqa: E402
from knowsam.data.builtin import BuiltIn  # noqa: E402
from knowsam.data.streams import RawBatch  # noqa: E402
from knowsam.losses import sam_distillation_loss  # noqa: E402
from knowsam.mixing import cells_to_mask, paste, select_cells  # noqa: E402
from knowsam.schedules import lr_factor, sigmoid_rampup  # noqa: E402

LIGHT = (
    "--ink:#1c2024;--muted:#59636f;--line:#7c8792;--panel:#f3f5f7;--data:#e7ebef;"
    "--student:#d7e7fb;--student-line:#2b6cb3;"
    "--sam:#fdebc8;--sam-line:#a86c05;--loss:#d8f0df;--loss-line:#2a7f49;--hot:#c2321f;"
)
DARK = (
    "--ink:#eceef1;--muted:#aab3bd;--line:#8a949f;--panel:#1c2025;--data:#2c3239;"
    "--student:#173654;--student-line:#72b0ef;"
    "--sam:#4b3612;--sam-line:#e3ad4d;--loss:#164029;--loss-line:#63cb8d;--hot:#ff7a66;"
)
STYLE = f"""
.kf{{{LIGHT}font-family:-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
@media (prefers-color-scheme:dark){{.kf{{{DARK}}}}}
body[data-theme="light"] .kf{{{LIGHT}}}
body[data-theme="dark"] .kf{{{DARK}}}
.kf text{{fill:var(--ink);font-size:13px}}
.kf .small{{font-size:11.5px;fill:var(--muted)}}
.kf .strong{{font-weight:600}}
.kf .line{{stroke:var(--line);stroke-width:1.6;fill:none}}
.kf .head{{fill:var(--line);stroke:none}}
.kf .dash{{stroke-dasharray:6 4}}
"""


class Figure:
    """Collects shapes; ``str()`` is the file."""

    def __init__(self, name: str, width: int, height: int):
        self.name, self.width, self.height = name, width, height
        self.parts: list[str] = []

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", kind: str = "", colour: str = "") -> None:
        """Lines are separated by a newline; ``kind`` is one of the style's classes."""
        style = f' style="fill:var(--{colour})"' if colour else ""
        for i, line in enumerate(words.split("\n")):
            line = line.replace("&", "&amp;").replace("<", "&lt;")
            self.parts.append(
                f'<text x="{x:g}" y="{y + 16 * i:g}" text-anchor="{anchor}" class="{kind}"{style}>{line}</text>'
            )

    def box(
        self, x: float, y: float, w: float, h: float, words: str = "", *, fill: str = "data", line: str = "", under=""
    ) -> None:
        """A rounded box with words in its middle and, smaller, a line under them."""
        line = line or (f"{fill}-line" if fill in ("student", "sam", "loss") else "line")
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="7" '
            f'style="fill:var(--{fill});stroke:var(--{line});stroke-width:1.4"/>'
        )
        lines = words.count("\n") + 1 + bool(under)
        top = y + h / 2 + 4.5 - 8 * (lines - 1)
        if words:
            self.text(x + w / 2, top, words, kind="strong")
        if under:
            self.text(x + w / 2, top + 16 * (lines - 1), under, kind="small")

    def panel(self, x: float, y: float, w: float, h: float, title: str, *, line: str = "line") -> None:
        """A dashed frame around what belongs together, its title at the top left."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="10" '
            f'style="fill:var(--panel);stroke:var(--{line});stroke-width:1.2;stroke-dasharray:3 3"/>'
        )
        self.text(x + 10, y + 18, title, anchor="start", kind="small strong")

    def arrow(self, *points: tuple[float, float], dash: bool = False, both: bool = False) -> None:
        """Along the points; dashed where no gradient flows back."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        start = f' marker-start="url(#{self.name}-head)"' if both else ""
        self.parts.append(
            f'<path d="{path}" class="line{" dash" if dash else ""}" marker-end="url(#{self.name}-head)"{start}/>'
        )

    def curve(self, points: list[tuple[float, float]], colour: str, *, dash: str = "") -> None:
        """A line through the points."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f";stroke-dasharray:{dash}" if dash else ""
        self.parts.append(
            f'<polyline points="{path}" style="fill:none;stroke:var(--{colour});stroke-width:2.2{dashes}"/>'
        )

    def rect(self, x: float, y: float, w: float, h: float, style: str) -> None:
        """A bare rectangle."""
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" style="{style}"/>')

    def picture(self, x: float, y: float, side: float, pixels: np.ndarray, under: str = "") -> None:
        """uint8 (S, S, 3) as PNG inside the file."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(
            f'<image x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" href="data:image/png;base64,{data}"/>'
        )
        self.rect(x, y, side, side, "fill:none;stroke:var(--line)")
        if under:
            self.text(x + side / 2, y + side + 15, under, kind="small")

    def __str__(self) -> str:
        head = (
            f'<marker id="{self.name}-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7.5" markerHeight="7.5" '
            'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" class="head"/></marker>'
        )
        body = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="kf" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}">\n<style>{STYLE}</style>\n<defs>{head}</defs>\n'
            f"{body}\n</svg>\n"
        )


def legend(figure: Figure, x: float, y: float) -> None:
    """What solid and dashed arrows mean."""
    figure.arrow((x, y), (x + 44, y))
    figure.text(x + 52, y + 4, "forward, gradient flows back", anchor="start", kind="small")
    figure.arrow((x + 240, y), (x + 284, y), dash=True)
    figure.text(x + 292, y + 4, "forward only: detached, no gradient flows back", anchor="start", kind="small")


def method() -> Figure:
    """One training step of KnowSAM."""
    f = Figure("method", 760, 490)
    f.panel(160, 46, 170, 178, "two students", line="student-line")
    f.panel(10, 268, 740, 176, "SAM guide: teaches during training, not deployed (optimizer: sam)", line="sam-line")
    f.box(12, 106, 112, 58, "images", under="labelled + strong")
    f.box(182, 74, 126, 44, "student A", fill="student", under="U-Net")
    f.box(182, 158, 126, 44, "student B", fill="student", under="V-Net")
    f.arrow((124, 128), (150, 128), (150, 96), (180, 96))
    f.arrow((124, 142), (150, 142), (150, 180), (180, 180))
    f.arrow((245, 119), (245, 157), dash=True, both=True)
    f.text(252, 142, "consistency", anchor="start", kind="small")
    f.box(392, 110, 116, 52, "fusion head", fill="student", under="HAM")
    f.arrow((308, 96), (356, 96), (356, 126), (390, 126))
    f.arrow((308, 180), (356, 180), (356, 146), (390, 146))
    f.box(568, 110, 132, 52, "fused logits", fill="student", under="deployed")
    f.arrow((508, 136), (566, 136))
    f.box(574, 62, 120, 26, "seg", fill="loss")
    f.arrow((634, 110), (634, 90))
    f.text(340, 213, "seg, entropy on each student", anchor="start", kind="small", colour="loss-line")
    f.text(340, 229, "(students and fusion head: optimizer subnets)", anchor="start", kind="small")

    f.box(24, 330, 104, 58, "images", under="labelled + weak")
    f.box(158, 330, 132, 58, "image encoder", fill="sam", under="ViT + adapters")
    f.arrow((128, 359), (156, 359))
    f.box(330, 302, 146, 48, "mask prompt", fill="sam", under="fused logits, embedded")
    f.box(330, 376, 146, 48, "prompt generator", fill="sam", under="sparse + dense")
    f.arrow((290, 366), (310, 366), (310, 400), (328, 400))
    f.box(516, 334, 104, 58, "mask decoder", fill="sam", under="once per class")
    f.arrow((290, 356), (310, 356), (310, 363), (514, 363))
    f.arrow((476, 326), (496, 326), (496, 350), (514, 350))
    f.arrow((476, 400), (496, 400), (496, 378), (514, 378))
    f.box(652, 338, 86, 50, "SAM\nlogits", fill="sam")
    f.arrow((620, 363), (650, 363))
    f.box(652, 406, 86, 26, "seg", fill="loss")
    f.arrow((695, 388), (695, 404))
    f.arrow((634, 162), (634, 246), (403, 246), (403, 300), dash=True)
    f.text(520, 262, "feedback: what the students believe", kind="small")
    f.arrow((727, 338), (727, 24), (245, 24), (245, 44), dash=True)
    f.text(480, 18, "SKD: SAM's class distribution teaches each student", kind="small", colour="loss-line")
    legend(f, 40, 470)
    return f


def pictures() -> tuple[BuiltIn, np.ndarray, np.ndarray, np.ndarray]:
    """The built-in data, a labelled case with its mask, and an unlabelled one."""
    source = BuiltIn()
    return source, source.image("train_0003"), source.mask("train_0003"), source.image("train_0040")


def chw(image: np.ndarray) -> torch.Tensor:
    """(H, W, 3) -> (1, 3, H, W)."""
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def shown(image: torch.Tensor) -> np.ndarray:
    """float (3, S, S) in 0..1 -> uint8 (S, S, 3)."""
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()


def streams() -> Figure:
    """What each network sees of a batch."""
    _, image, mask, unlabelled = pictures()
    none = chw(image)[:0]  # no second labelled batch
    raw = RawBatch(chw(image), torch.from_numpy(mask)[None], chw(unlabelled), Ids(), none, none[:, 0])
    batch = Augmenter()(raw, seed=11)
    drawn = np.repeat((batch.mask[0].numpy() * 255).astype(np.uint8)[..., None], 3, 2)
    f = Figure("streams", 760, 400)
    f.text(70, 24, "from the cache", kind="strong")
    f.text(330, 24, "views of this step", kind="strong")
    f.text(620, 24, "seen by", kind="strong")
    f.text(70, 62, "labelled stream", kind="small")
    f.picture(18, 76, 104, image)
    f.text(70, 236, "unlabelled stream", kind="small")
    f.picture(18, 250, 104, unlabelled)
    f.arrow((122, 128), (206, 128))
    f.text(164, 120, "augment", kind="small")
    f.arrow((122, 302), (206, 302))
    f.text(164, 294, "augment", kind="small")
    f.picture(210, 70, 116, drawn, "mask, moved alike")
    f.picture(334, 70, 116, shown(batch.labelled[0]), "labelled")
    f.picture(210, 244, 116, shown(batch.strong[0][0]), "strong")
    f.picture(334, 244, 116, shown(batch.weak[0]), "weak, same geometry")
    f.box(540, 66, 200, 58, "students, fusion head", fill="student", under="labelled + strong")
    f.box(540, 168, 200, 58, "SAM guide", fill="sam", under="labelled + weak")
    f.box(540, 270, 200, 58, "Mean Teacher's teacher", fill="data", under="weak")
    f.text(640, 356, "the mask is for losses only;", kind="small")
    f.text(640, 372, "no unlabelled mask is ever opened", kind="small")
    f.arrow((456, 110), (538, 95))
    f.arrow((456, 150), (500, 160), (538, 188))
    f.arrow((268, 244), (268, 216), (486, 216), (510, 120), (538, 108))
    f.arrow((456, 286), (506, 240), (538, 206))
    f.arrow((456, 306), (538, 299))
    return f


def mixing() -> Figure:
    """An image whose most uncertain cells are replaced by its partner's."""
    _, image, mask, partner = pictures()
    # Uncertain is what lies near the edge of the lesion; a picture of the principle, not of a trained network.
    inside = torch.from_numpy(mask)[None, None].float()
    blurred = torch.nn.functional.avg_pool2d(inside, 17, 1, 8, count_include_pad=False)[0]
    uncertainty = 4 * blurred * (1 - blurred)  # (1, S, S)
    cells = select_cells(uncertainty, grid=4, cells=5, pick="most_uncertain")
    side = image.shape[0]
    where = cells_to_mask(cells, (side, side))
    mixed = paste(chw(image), chw(partner), where)[0].permute(1, 2, 0).numpy()
    f = Figure("mixing", 760, 250)
    for x, title in ((10, "image"), (206, "fused entropy, 4 x 4 cells"), (402, "its partner"), (598, "mixed image")):
        f.text(x + 76, 24, title, kind="strong")
    f.picture(10, 40, 152, image)
    means = torch.nn.functional.adaptive_avg_pool2d(uncertainty, 4)[0]
    for row in range(4):
        for column in range(4):
            opacity = 0.08 + 0.9 * float(means[row, column] / means.max())
            style = f"fill:var(--sam-line);fill-opacity:{opacity:.2f};stroke:var(--line)"
            f.rect(206 + 38 * column, 40 + 38 * row, 38, 38, style)
    f.picture(402, 40, 152, partner)
    f.picture(598, 40, 152, mixed)
    for row in range(4):
        for column in range(4):
            if cells[0, row, column]:
                for x in (206, 402, 598):
                    style = "fill:none;stroke:var(--hot);stroke-width:2.4"
                    f.rect(x + 38 * column + 1.5, 40 + 38 * row + 1.5, 35, 35, style)
    f.arrow((164, 116), (203, 116))
    f.arrow((556, 116), (595, 116))
    f.text(86, 212, "own label, or SAM's\nwhere there is none", kind="small")
    f.text(282, 212, "the 5 most uncertain\ncells are chosen", kind="small")
    f.text(478, 212, "from the other half\nof the batch", kind="small")
    f.text(674, 212, "label pasted likewise", kind="small")
    return f


def axes(f: Figure, x: float, y: float, w: float, h: float, title: str, below: str) -> None:
    """Frame, ticks at 0 and 1, titles."""
    f.rect(x, y, w, h, "fill:var(--panel);stroke:var(--line)")
    f.text(x + w / 2, y - 10, title, kind="strong")
    for value in (0, 0.5, 1):
        f.text(x - 8, y + h * (1 - value) + 4, f"{value:g}", anchor="end", kind="small")
        f.text(x + w * value, y + h + 17, f"{100 * value:g} %", kind="small")
    f.text(x + w / 2, y + h + 35, below, kind="small")


def schedules() -> Figure:
    """Weights and learning rates over a run, with the defaults."""
    f = Figure("schedules", 760, 300)
    at = np.linspace(0, 1, 121)

    def place(x: float, y: float, w: float, h: float, function) -> list[tuple[float, float]]:
        return [(x + w * t, y + h * (1 - function(float(t)))) for t in at]

    left, right = (44, 40, 310, 190), (430, 40, 310, 190)
    styles = (("student-line", ""), ("loss-line", "7 4"), ("sam-line", "2 4"))

    def key(x: float, step: float, names: tuple[str, ...]) -> None:
        for i, ((colour, dash), name) in enumerate(zip(styles, names, strict=True)):
            f.curve([(x + step * i, 284), (x + step * i + 22, 284)], colour, dash=dash)
            f.text(x + step * i + 28, 288, name, anchor="start", kind="small")

    axes(f, *left, "factor of a loss term", "part of the run")
    f.curve(place(*left, lambda t: sigmoid_rampup(t, 0.4)), "student-line")
    f.curve(place(*left, lambda t: sigmoid_rampup(t, 1.0)), "loss-line", dash="7 4")
    begin = left[0] + 0.24 * left[2]
    f.curve([(left[0], 230), (begin, 230), (begin, 40), (left[0] + left[2], 40)], "sam-line", dash="2 4")
    key(44, 104, ("SKD", "consistency", "mixing starts at 24 %"))
    axes(f, *right, "factor of the learning rate", "part of the run")
    for (colour, dash), name in zip(styles, ("linear", "cosine", "polynomial"), strict=True):
        f.curve(place(*right, lambda t, name=name: lr_factor(round(1000 * t), 1000, schedule=name)), colour, dash=dash)
    key(430, 80, ("linear", "cosine", "polynomial, power 0.9"))
    return f


def splits() -> Figure:
    """Which list is used for what."""
    f = Figure("splits", 760, 236)
    f.panel(10, 14, 400, 150, "train.txt")
    f.box(26, 44, 150, 104, "labelled_10pct.txt", fill="loss", under="image + mask")
    f.box(190, 44, 204, 104, "the rest", fill="data", under="image; the mask is never opened")
    f.box(440, 14, 140, 150, "val.txt", fill="student", under="image + mask")
    f.box(606, 14, 140, 150, "test.txt", fill="sam", under="image + mask")
    f.text(210, 188, "training", kind="strong")
    f.text(210, 206, "supervised terms from the labelled part,\nthe other terms from both", kind="small")
    f.text(510, 188, "while training", kind="strong")
    f.text(510, 206, "chooses best.pt", kind="small")
    f.text(676, 188, "after training", kind="strong")
    f.text(676, 206, "what you report", kind="small")
    return f


def temperature() -> Figure:
    """What dividing the logits by T does to SAM's distribution at one pixel."""
    f = Figure("temperature", 760, 232)
    logits = torch.tensor([1.0, 9.0, 5.0, -2.0])
    student = torch.tensor([4.0, 6.0, 1.0, 0.0])
    names = ("background", "class 1", "class 2", "class 3")
    for i, t in enumerate((1.0, 4.0, 10.0)):
        x = 30 + 246 * i
        teacher_probs, student_probs = (logits / t).softmax(0), (student / t).softmax(0)
        loss = sam_distillation_loss(student.view(1, 4, 1), logits.view(1, 4, 1), temperature=t).item()
        f.rect(x, 34, 216, 130, "fill:var(--panel);stroke:var(--line)")
        f.text(x + 108, 24, f"T = {t:g}", kind="strong")
        for k in range(4):
            for offset, probs, colour in ((0, teacher_probs, "sam-line"), (19, student_probs, "student-line")):
                height = 122 * float(probs[k])
                f.rect(x + 12 + 52 * k + offset, 164 - height, 17, height, f"fill:var(--{colour})")
            f.text(x + 30 + 52 * k, 180, names[k].replace("background", "backgr."), kind="small")
        f.text(x + 108, 200, f"T² KL = {loss:.2f}", kind="small")
    f.rect(250, 214, 12, 12, "fill:var(--sam-line)")
    f.text(268, 225, "SAM", anchor="start", kind="small")
    f.rect(320, 214, 12, 12, "fill:var(--student-line)")
    f.text(338, 225, "student, one pixel with K = 4", anchor="start", kind="small")
    return f


FIGURES = (method, streams, mixing, schedules, splits, temperature)


def main() -> None:
    """Write every figure."""
    for draw in FIGURES:
        figure = draw()
        (HERE / f"{figure.name}.svg").write_text(str(figure), encoding="utf-8")
        print(f"{figure.name}.svg")


if __name__ == "__main__":
    main()

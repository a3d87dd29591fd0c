"""Pages of hand-made runs, and what a browser would find on them."""

import json
from html.parser import HTMLParser

import numpy as np

from knowsam.cli.reading import reader
from knowsam.report.page.overlays import Overlay
from knowsam.report.page.pictures import Pictures
from knowsam.report.page.record import read_records
from knowsam.report.page.write import main_outputs, page


class Page(HTMLParser):
    """Tables as rows of texts under their captions, all text, and everything that a browser would ask for."""

    VOID = ("meta", "br", "link", "img", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.asked, self.ids, self.text = [], [], [], ""
        self.tables, self.targets, self._rows, self._cell = {}, [], None, None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            if name in values and not values[name].startswith(("#", "data:")):
                self.asked.append((tag, values[name]))
        self.targets += [values[name][1:] for name in ("href", "xlink:href") if values.get(name, "").startswith("#")]
        self.ids += [values["id"]] if "id" in values else []
        if tag in ("link", "iframe", "object", "embed", "base"):
            self.asked.append((tag, ""))
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell = ""

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "caption":
            self._caption = self._cell
        elif tag in ("td", "th"):
            self._rows[-1].append(self._cell)
        elif tag == "table":
            self.tables[self._caption], self._rows = self._rows, None

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data
        if self._cell is not None:
            self._cell += data

    def table(self, title):
        """Rows of the one table whose caption holds the text."""
        (found,) = [rows for caption, rows in self.tables.items() if title in caption]
        return found


def log(folder, *records):
    """Write a ``metrics.jsonl``."""
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def training(folder, best=400, total=600):
    """What a KnowSAM run logs; the best validation is that of step ``best``."""
    records = []
    for step in range(100, total + 1, 100):
        losses = {"seg_unet": 0.5, "seg_vnet": 0.25, "skd_unet": 0.125 * step / 100, "sam": 0.5}
        values = {"loss": sum(losses.values()), **losses, "skd_weight": step / 600, "sam_confidence": 0.9}
        values |= {"lr_subnets": 0.01 / step, "lr_sam": 1e-4, "images_per_second": 10.0 + step / 100}
        records.append({"step": step, "kind": "train", **values})
        dice = 0.75 if step == best else 0.5
        records.append({"step": step, "kind": "val", "dice_fusion": dice, "dice_unet": 0.25})
    cost = {"seconds": 3725.0, "seconds_data": 25.0, "seconds_validation": 60.0, "seconds_checkpoints": 40.0}
    records.append({"step": total, "kind": "cost", **cost, "peak_host_mib": 2048.4, "peak_device_mib": 4096.6})
    log(folder, *records)
    return folder


def records_of(*arguments, split="test"):
    return read_records([str(argument) for argument in arguments], reader(split))


def shown(*arguments, output=None, split="test"):
    """The page of runs, without pictures."""
    records = records_of(*arguments, split=split)
    return Page(page(records, main_outputs(records, output), Pictures()))


def overlay(seed=0, classes=1, place=""):
    """A picture of noise, with a bar of each class in truth and prediction."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (40, 60, 3), np.uint8)
    truth, prediction = np.zeros((40, 60), np.uint8), np.zeros((40, 60), np.uint8)
    for label in range(1, classes + 1):
        truth[5 * label : 5 * label + 4, 5:20] = label
        prediction[5 * label : 5 * label + 4, 7:22] = label
    return Overlay(image, truth, prediction, place, None, {f"class {i}": 0.5 for i in range(classes)})

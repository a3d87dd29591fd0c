"""The figures that are kept are those that the script draws, and can be told apart in the light and in the dark."""

import importlib.util
import re

import pytest
from docs_blocks import DOCS

FOLDER = DOCS / "figures"


@pytest.fixture(scope="module")
def drawn():
    spec = importlib.util.spec_from_file_location("docs_figures_make", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        import sys

        patch.setattr(sys, "path", list(sys.path))
        spec.loader.exec_module(module)
    return module


def without_pictures(svg: str) -> str:
    """Pixels depend on the versions of Pillow and kornia; everything else is exact."""
    return re.sub(r'href="data:image/png;base64,[^"]+"', "", svg)


def test_the_files_are_what_the_script_draws(drawn):
    figures = [draw() for draw in drawn.FIGURES]
    assert {f"{figure.name}.svg" for figure in figures} == {path.name for path in FOLDER.glob("*.svg")}
    for figure in figures:
        kept = (FOLDER / f"{figure.name}.svg").read_text(encoding="utf-8")
        assert without_pictures(kept) == without_pictures(str(figure)), "run: python docs/figures/make.py"


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two colours ``#rrggbb``, 1..21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "page"), [("LIGHT", "#ffffff"), ("DARK", "#131416")])
def test_words_and_lines_stand_out(drawn, theme, page):
    colours = dict(re.findall(r"--([\w-]+):(#\w{6})", getattr(drawn, theme)))
    assert contrast(colours["ink"], page) > 7 and contrast(colours["muted"], page) > 4.5
    for fill in ("panel", "data", "student", "sam", "loss"):
        assert contrast(colours["ink"], colours[fill]) > 4.5, fill
        assert contrast(colours["muted"], colours[fill]) > 3.5, fill
    for line in ("line", "student-line", "sam-line", "loss-line", "hot"):
        assert contrast(colours[line], page) > 3, line
        assert contrast(colours[line], colours["panel"]) > 3, line


def test_every_colour_is_a_variable(drawn):
    for path in FOLDER.glob("*.svg"):
        body = without_pictures(path.read_text(encoding="utf-8")).partition("</style>")[2]
        assert not re.search(r"#[0-9a-f]{6}\b|\brgb\(|:(?:black|white)\b", body), path.name

"""The pages build without a warning and without the network, and hold what they should."""

import importlib
import json
import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from docs_blocks import DOCS

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")
pytest.importorskip("sphinx_copybutton")


class Page(HTMLParser):
    """Anchors, links, and what a browser would fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("index", "search", "next", "prev") and values.get("href"):
            self.fetched.append(values["href"])
        if tag in ("script", "img", "source", "iframe", "image"):
            self.fetched += [values[key] for key in ("src", "href") if values.get(key)]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the built pages; warnings are errors, and opening a connection is one too."""
    from sphinx.application import Sphinx

    top = tmp_path_factory.mktemp("docs")
    modules, path = set(sys.modules), list(sys.path)
    warnings = (top / "warnings.txt").open("w+", encoding="utf-8")

    def refuse(*_: object) -> None:
        raise AssertionError("the build opened a connection")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        app = Sphinx(str(DOCS), str(DOCS), str(top / "html"), str(top / "trees"), "html", status=None, warning=warnings)
        app.build()
    sys.path[:] = path
    for name in set(sys.modules) - modules:  # the extensions of docs/_ext have plain names
        if getattr(sys.modules[name], "__file__", None) and str(DOCS) in str(sys.modules[name].__file__):
            del sys.modules[name]
    warnings.seek(0)
    assert warnings.read() == ""
    assert app.statuscode == 0
    return top / "html"


def documents(built: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(built.rglob("*.html"))}


def test_local_links_lead_somewhere(built):
    pages = documents(built)
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.relative_to(built)} links {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors | {"top"}, f"{path.name} links {link}"


def test_a_browser_fetches_nothing_from_elsewhere(built):
    for path, page in documents(built).items():
        for address in page.fetched:
            parts = urlsplit(address)
            assert parts.scheme in ("", "data") and not parts.netloc, f"{path.name} fetches {address}"
            if not parts.scheme:
                assert (path.parent / unquote(parts.path)).resolve().is_file(), f"{path.name}: {address}"
    for sheet in built.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import[^;]*//|url\([\"']?(?:https?:)?//", text), f"{sheet.name} fetches something"


def test_every_page_is_reachable_from_the_first(built):
    pages = documents(built)
    reached, waiting = set(), [built / "index.html"]
    while waiting:
        path = waiting.pop()
        if path in reached or path not in pages:
            continue
        reached.add(path)
        waiting += [(path.parent / unquote(urlsplit(x).path)).resolve() for x in pages[path].links if "://" not in x]
    expected = {(built / page.relative_to(DOCS)).with_suffix(".html").resolve() for page in DOCS.rglob("*.md")}
    assert {page for page in expected if "_build" not in page.parts} <= {page.resolve() for page in reached}


def test_every_key_of_the_configuration_is_in_the_table(built):
    from dataclasses import fields, is_dataclass

    from knowsam import components
    from knowsam.config import schema

    text = (built / "config_reference.html").read_text(encoding="utf-8")
    tables = re.findall(r'<table class="config-keys.*?</table>', text, re.S)
    rows = [re.findall(r"<tr.*?</tr>", table, re.S) for table in tables]
    cells = [
        [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", row, re.S)] for t in rows for row in t
    ]
    keys = {row[0].strip(): row for row in cells if row}
    blocks = {f.name for f in fields(schema.Config) if f.default is None or f.name in ("data", "train", "evaluate")}
    for kind in (schema.Config, schema.DataConfig, schema.TrainConfig, schema.EvaluateConfig):
        for field in fields(kind):
            default = getattr(kind(), field.name)
            if not (is_dataclass(default) or isinstance(default, dict) or field.name in blocks - {"run"}):
                assert field.name in keys, field.name
    given = set().union(*components.OFFERED.values())
    targets = [components.SKD, components.SAM_GUIDE]
    tables = [
        getattr(components, name)
        for name in ("METHODS", "STUDENTS", "FUSION_HEADS", "SOURCES", "INTENSITIES", "OPTIMIZERS")
    ]
    tables += [components.AUGMENTERS, *(table for table, _ in components.SAM_PARTS.values())]
    for table in tables:
        targets += table.values()
        for component in table:
            assert f"name: {component}" in re.sub(r"<[^>]+>", "", text)
    for target in targets:
        for key in components.signature(target):
            assert key in keys or key in given, f"{key} of {target}"
    assert not {"students", "sam_guide", "formulas", "parameters"} & set(keys), "YAML may not set these"
    # Defaults and meanings come along.
    assert "0.9" in keys["entropy_weight"][1] and "entropy" in keys["entropy_weight"][2]
    assert "2.0" in keys["nsd_tolerance"][1] and "mm" in keys["nsd_tolerance"][2]


def test_every_key_has_a_meaning(monkeypatch):
    """What has none explains itself by its name and type."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    config_keys = importlib.import_module("config_keys")
    monkeypatch.delitem(sys.modules, "config_keys")
    found = [(block.place, key.name) for block in config_keys.blocks() for key in block.keys if not key.meaning]
    plain = {"name", "seed", "precision", "validate_outputs", "tensorboard"}
    assert [pair for pair in found if pair[1] not in plain and pair[0] != "optim.<group>"] == []
    keys = {(block.place, block.component, key.name): key for block in config_keys.blocks() for key in block.keys}
    assert keys["method", "knowsam", "mix.start"].default == "0.24"
    assert keys["sam.encoder", "vit_tiny", "out_channels"].default == "64"
    summaries = {block.component: block.summary for block in config_keys.blocks() if block.place == "method"}
    assert "students: {unet: {name: unet}}" in summaries["supervised"] and "name: ham" in summaries["knowsam"]
    assert keys["data.source", "image_folder", "root"].default == "required"
    assert keys["data", "", "classes"].default == "[background, lesion]"


def test_the_reference_documents_what_is_public_and_nothing_private(built):
    import knowsam

    package = Path(knowsam.__file__).parent
    text = {page.stem: page.read_text(encoding="utf-8") for page in (built / "api").glob("*.html")}
    for module, page in {"api": "python", "runs": "python", "errors": "python", "needs": "methods"}.items():
        assert f'id="module-knowsam.{module}"' in text[page], f"{module} is not in the reference"
    for room in ("losses", "models", "methods", "metrics", "data", "inference", "engine"):
        for file in (package / room).rglob("*.py"):
            names = [part for part in file.relative_to(package).with_suffix("").parts if part != "__init__"]
            if file.name == "__init__.py" or any(part.startswith("_") for part in names):
                continue
            module = ".".join(["knowsam", *names])
            assert f'id="module-{module}"' in text[room], f"{module} is not in the reference"
    assert 'id="knowsam.losses.distillation.sam_distillation_loss"' in text["losses"]
    assert 'id="knowsam.methods.knowsam.KnowSAM.forward"' in text["methods"]
    anchors = set().union(*(Page(page).anchors for page in text.values()))
    private = [a for a in anchors if a.startswith("knowsam.") and any(p.startswith("_") for p in a.split("."))]
    assert private == []
    losses = importlib.import_module("knowsam.losses")
    functions = [name for name in losses.__all__ if callable(getattr(losses, name))]
    assert len(functions) > 10 and "knowsam.losses.pixels.IGNORE" in anchors
    for name in functions:
        assert f"knowsam.losses.{getattr(losses, name).__module__.rpartition('.')[2]}.{name}" in anchors


def test_figures_are_in_the_page_and_formulas_need_no_script(built):
    text = (built / "concepts.html").read_text(encoding="utf-8")
    for figure in ("method", "streams", "mixing", "schedules", "splits", "temperature"):
        if f'id="{figure}-head"' in text:
            assert text.count(f'id="{figure}-head"') == 1
    assert text.count('<svg role="img" aria-label="') == 6
    assert text.count("<math") > 30 and not re.search(r"<script[^>]*mathjax", text, re.I)


def test_the_whole_notebook_is_shown_in_order(built):
    shown = Page((built / "notebook.html").read_text(encoding="utf-8"))
    words = re.sub(r"\s+", "", "".join(shown.words))
    cells = json.loads((DOCS / "notebooks" / "skd_quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    at = 0
    for cell in cells:
        lines = [line for line in "".join(cell["source"]).splitlines() if line and not line.startswith("# ")]
        for line in lines:
            plain = re.sub(r"[\s`*]+|^#+", "", line) if cell["cell_type"] == "markdown" else re.sub(r"\s+", "", line)
            found = words.find(plain, at)
            assert found >= at, f"not shown, or not in its place: {line}"
            at = found


def test_a_page_that_is_announced_may_be_absent(tmp_path):
    sys.path[:0] = [str(DOCS)]
    try:
        conf = importlib.import_module("conf")
        source = ["```{toctree}\n:glob:\nconcepts\nno_such_page*\nconcepts*\n```\n"]
        conf.leave_out_absent_pages(None, "index", source)
        assert source == ["```{toctree}\n:glob:\nconcepts\nconcepts*\n```\n"]
    finally:
        sys.path.remove(str(DOCS))
        sys.modules.pop("conf", None)

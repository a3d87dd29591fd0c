"""The two rooms of the report: arrows between them, and the templates that an installation needs."""

import ast
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "knowsam" / "report"
FILES = sorted(REPORT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(REPORT)) for path in FILES])
def test_the_rooms_know_nothing_of_each_other(path):
    """And what both share knows neither."""
    room = path.parent.name
    others = {"compare": ["page"], "page": ["compare"], "report": ["compare", "page"]}[room]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        f"{node.module}.{name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]
    found += [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    for module in found:
        assert not any(f"{module}.".startswith(f"knowsam.report.{other}.") for other in others), module


def test_every_template_is_installed():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    data = setup["options.package_data"]
    for template in REPORT.rglob("*.html"):
        package = ".".join(template.parent.relative_to(ROOT).parts)
        assert data.get(package) == "*.html", f"{template.name} is in no wheel"

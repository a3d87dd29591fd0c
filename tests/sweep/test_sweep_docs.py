"""The examples of docs/sweeps.md are sweep files that expand."""

import re
from pathlib import Path

import pytest

from knowsam.sweep.spec import load_sweep

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = re.findall(r"(?ms)^```yaml\n(.*?)^```", (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text", EXAMPLES, ids=[example.partition(":")[0] + str(i) for i, example in enumerate(EXAMPLES)]
)
def test_an_example_expands(text, tmp_path):
    if not text.startswith("base:"):
        text = "base: ../kvasir_10pct.yaml\n" + text
    (tmp_path / "example.yaml").write_text(text.replace("base: ..", f"base: {ROOT / 'experiments'}"))
    sweep = load_sweep(tmp_path / "example.yaml")
    assert sweep.trials or sweep.search
    assert sweep.warnings == [], "each condition of exclude drops something"

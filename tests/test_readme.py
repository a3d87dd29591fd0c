"""The README's examples are code that runs."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return [
        re.sub(r"(?m)^   ", "", text) if indent else text
        for indent, text in re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```", README)
    ]


def test_the_skd_example_trains_student_and_sam():
    code, _ = blocks("python")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["student"].parameters())
    assert all(p.grad is not None for p in names["guide"].parameters() if p.requires_grad)


def test_the_python_example_trains_and_predicts(tmp_path, monkeypatch):
    from PIL import Image

    _, code = blocks("python")
    small = "{'train.max_steps': 1, 'data.image_size': 32, 'data.source.val': 1, 'train.device': 'cpu'}"
    code = code.replace('"experiments/', f'"{ROOT}/experiments/').replace('{"train.max_steps": 100}', small)
    assert small in code
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30)).save("image.png")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["mask"].shape == (30, 40)


def test_the_own_data_experiment_loads(tmp_path):
    from knowsam.config import load_config

    (text,) = [block for block in blocks("yaml") if "my_study" in block]
    values = yaml.safe_load(text)
    values["inherits"] = str(ROOT / "experiments" / values["inherits"])
    (tmp_path / "my_study.yaml").write_text(yaml.safe_dump(values))
    assert load_config(tmp_path / "my_study.yaml").data.source["root"] == "my_study"


def test_every_file_that_the_documents_name_exists():
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([\w./]+\.md)", text):
            assert (document.parent / name).is_file(), f"{document.name} links {name}"
        for name in re.findall(r"`((?:tools|experiments|docs|tests|data_splits)/[\w./]+\.(?:py|yaml|md))`", text):
            if "my_study" not in name:
                assert (ROOT / name).is_file(), f"{document.name} names {name}"

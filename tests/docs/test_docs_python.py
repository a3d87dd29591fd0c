"""The page on the Python face: its code runs, on a smaller experiment."""

import pytest
from docs_blocks import DOCS, ROOT, blocks
from PIL import Image


def test_train_load_and_predict(tmp_path, monkeypatch, capsys):
    code = [block.text for block in blocks(DOCS / "api" / "python.md") if block.language == "python"]
    short = {
        "train.max_steps": 2,
        "train.validate_every": 2,
        "train.device": "cpu",
        "data.source.val": 2,
        "data.image_size": 32,
    }
    text = (
        "\n".join(code)
        .replace('"experiments/', f'"{ROOT}/experiments/')
        .replace('{"train.max_steps": 100}', str(short))
    )
    assert str(short) in text
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 40)).save("image.png")
    names: dict = {}
    exec(compile(text, "python.md", "exec"), names)
    assert names["mask"].shape == (120, 90) and names["mask"].dtype == "uint8"
    assert names["found"].probabilities.shape == (2, 40, 50) and names["found"].uncertainty.shape == (40, 50)
    assert names["name"] == "teacher" and names["run"].outputs == ("teacher", "unet")
    # Again, a finished run is loaded.
    capsys.readouterr()
    exec(compile(text, "python.md", "exec"), names)
    assert "already complete" in capsys.readouterr().out


def test_an_error_is_an_exception():
    import knowsam
    from knowsam.errors import ConfigError, NotFoundError

    with pytest.raises(NotFoundError, match="no experiment file"):
        knowsam.train("no_such_experiment.yaml")
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        knowsam.train(ROOT / "experiments" / "quickstart.yaml", {"train.max_stps": 1})


def test_a_folder_is_predicted_with_any_network(tmp_path, monkeypatch):
    import torch

    [code] = [
        block.text
        for block in blocks(DOCS / "predict_export.md")
        if block.language == "python" and "predict_files(" in block.text
    ]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "hospital_b" / "day1"
    folder.mkdir(parents=True)
    Image.new("RGB", (50, 40), "white").save(folder / "x.png")
    names: dict = {"network": torch.nn.Conv2d(3, 2, 1)}
    exec(compile(code, "predict_export.md", "exec"), names)
    assert names["outcome"].done == 1 and not names["outcome"].failed
    assert Image.open("predictions/masks/day1/x.png").size == (50, 40)
    assert (tmp_path / "predictions/overlays/day1/x.png").is_file()

"""The Python face: train, load and predict, as a script or a notebook would."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import knowsam
from knowsam.errors import ConfigError, DataError, NotFoundError

OVERRIDES = {"method.name": "supervised", "optim.subnets.lr": 1e-5, "train.validate_every": 2}


@pytest.fixture(scope="module")
def run(lab, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api") / "run"
    return knowsam.train(lab.experiment, OVERRIDES, run=str(folder), train__max_steps=2)


def test_training_returns_the_finished_run(lab, run):
    assert run.step == 2 and run.config.optim["subnets"]["lr"] == 1e-5 and run.outputs[0] == "fusion"
    assert run.classes == tuple(run.config.data.classes) and run.path.name == "best.pt"


def test_training_goes_on_where_it_stopped_and_does_nothing_when_finished(lab, run, capsys):
    again = knowsam.train(lab.experiment, OVERRIDES, run=str(run.run), train__max_steps=2)
    assert again.step == 2 and "already complete" in capsys.readouterr().out


def test_a_file_an_array_and_a_volume_give_the_same_mask(run, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = run.predict(tmp_path / "image.png")
    assert mask.shape == (48, 40) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
    assert (run.predict(image) == mask).all()
    volume = run.predict(np.stack([image, image, image]))
    assert volume.shape == (3, 48, 40) and (volume == mask).all()
    grey = image[..., 0]
    assert (run.predict(grey) == run.predict(np.repeat(grey[..., None], 3, -1))).all()


def test_probabilities_uncertainty_and_outputs(run):
    image = np.random.default_rng(1).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    found = run.segment(image, output="unet", probabilities=True, uncertainty=True)
    assert found.probabilities.shape == (2, 32, 40) and found.uncertainty.shape == (32, 40)
    assert (found.probabilities.argmax(0) == found.labels).all()
    assert (found.labels == run.predict(image, output="unet")).all()


def test_predictions_are_those_of_the_command(run, tmp_path):
    from knowsam.cli.main import run_command

    image = np.random.default_rng(2).integers(0, 256, (50, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert run_command("predict", [str(run.run), str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 0
    written = np.asarray(Image.open(tmp_path / "out" / "masks" / "a.png"))
    assert (written == run.predict(tmp_path / "a.png")).all()


def test_mistakes_raise_what_the_command_line_would_say(lab, run, tmp_path):
    with pytest.raises(DataError, match=r"allowed are \(H, W\)"):
        run.predict(np.zeros((2, 2, 2, 2, 2), np.uint8))
    with pytest.raises(ConfigError, match="no deployed output 'sam'"):
        run.predict(np.zeros((32, 32), np.uint8), output="sam")
    with pytest.raises(NotFoundError):
        knowsam.load_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="allowed: 'best', 'last'"):
        knowsam.load_run(run.run.path, "first")
    with pytest.raises(ConfigError, match="did you mean 'knowsam'"):
        knowsam.train(lab.experiment, method={"name": "knowsan"}, run=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_importing_knowsam_imports_nothing_big():
    code = "import sys, knowsam; print(sorted({'torch', 'numpy', 'monai'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

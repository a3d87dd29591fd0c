"""Pictures beyond the usual limit of pixels are refused from their header, and read where that is asked for."""

import warnings

import numpy as np
import pytest
from PIL import Image

from knowsam import io
from knowsam.errors import ConfigError, DataError


@pytest.mark.parametrize("name", ["large.png", "large.tif", "large.bmp"])
def test_the_limit_is_an_option(tmp_path, monkeypatch, name):
    picture = np.arange(60 * 50, dtype=np.uint32).astype(np.uint8).reshape(60, 50)
    Image.fromarray(picture).save(tmp_path / name)
    small = io.Reading(max_pixels=2_999)
    for ask in (io.read_image, io.read_mask, io.header):
        with pytest.raises(DataError, match="50 x 60 pixels; at most 2,999 are read") as caught:
            ask(tmp_path / name, small)
        assert "data.reading.max_pixels" in caught.value.hint
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow refuses what has twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = io.read_image(tmp_path / name, io.Reading(max_pixels=3_000))
    np.testing.assert_array_equal(stored.array[0], picture)
    assert Image.MAX_IMAGE_PIXELS == 1000, "the limit of others stays"


def test_a_limit_without_sense():
    for wrong in (0, "many", 1.5):
        with pytest.raises(ConfigError, match="max_pixels"):
            io.Reading(max_pixels=wrong)

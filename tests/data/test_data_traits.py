import numpy as np
import pytest
from PIL import Image

from knowsam.data.traits import Traits, depth_note, file_traits, orientation_note, palette_note, turned_mask_note

BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


def saved(path, array, *, mode=None, palette=None, orientation=None):
    picture = Image.fromarray(array, mode) if mode else Image.fromarray(array)
    if palette is not None:
        picture.putpalette([part for colour in palette for part in colour])
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


def test_of_files(tmp_path):
    plain = np.arange(48, dtype=np.uint8).reshape(6, 8)
    assert file_traits(saved(tmp_path / "plain.png", plain)) == Traits()
    assert file_traits(saved(tmp_path / "turned.jpg", plain, orientation=6)).orientation == 6
    assert file_traits(saved(tmp_path / "turned.png", plain, orientation=3)).orientation == 3
    assert file_traits(saved(tmp_path / "turned.tif", plain, orientation=8)).orientation == 8
    assert file_traits(saved(tmp_path / "nonsense.jpg", plain, orientation=77)).orientation == 1
    assert file_traits(saved(tmp_path / "deep.png", plain.astype(np.uint16))).deep
    coloured = file_traits(saved(tmp_path / "palette.png", plain % 2, palette=[WHITE, RED]))
    assert coloured.palette[:2] == (WHITE, RED) and not coloured.deep
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert file_traits(tmp_path / "broken.png") == file_traits(tmp_path / "none.png") == Traits()


def test_orientations_are_counted_and_the_rule_is_said():
    images = {"a": Traits(3), "b": Traits(6), "c": Traits(6), "d": Traits()}
    assert orientation_note({"d": Traits()}, {"d": Traits()}) is None
    text = orientation_note(images, {"a": Traits(3), "b": Traits(6), "d": Traits()})
    assert "3 of 4 images have an EXIF orientation: 1 turned by 180 degrees (tag 3), 2 turned by 90" in text
    assert "2 of 3 masks have an EXIF orientation" in text and "Image and mask are turned" in text
    assert "Neither image nor mask is turned" in orientation_note(images, {}, "stored")
    assert "no such tag" not in text
    assert "2 masks have no such tag" in orientation_note(images, dict.fromkeys("abd", Traits()))


def test_a_mask_that_would_fit_the_turned_image():
    assert "EXIF orientation 6" in turned_mask_note(Traits(6), Traits())
    assert turned_mask_note(Traits(3), Traits()) == turned_mask_note(Traits(6), Traits(6)) == ""


@pytest.mark.parametrize(
    ("palettes", "used", "says"),
    [
        ([(BLACK, RED), (BLACK, RED)], [0, 1], None),
        ([(BLACK, RED), (BLACK, WHITE, RED)], [0, 1], "index 1 is [255, 0, 0] in 1 (m0); white in 1 (m1)"),
        ([(BLACK, WHITE, RED), (BLACK, WHITE, WHITE)], [0, 1], None),  # an index that no pixel has
        ([(BLACK, WHITE, RED), (BLACK, WHITE, WHITE)], [0, 2], "index 2 is [255, 0, 0] in 1"),
        ([None, (BLACK, RED)], [0, 1], None),
    ],
)
def test_palettes(palettes, used, says):
    masks = {f"m{n}": Traits(palette=palette) for n, palette in enumerate(palettes)}
    note = palette_note(masks, dict.fromkeys(masks, used))
    assert note is says is None or says in note


def test_palettes_of_which_some_are_read_by_index_and_some_by_grey_level():
    red, grey = Traits(palette=(BLACK, RED)), Traits(palette=(BLACK, WHITE), by="colour")
    assert palette_note({"a": grey, "b": grey}, {}) is None
    text = palette_note({"a": red, "b": grey, "c": grey}, {"a": [0, 1]})
    assert "1 are read by index (a), 2 by colour or grey level (b, c)" in text
    assert palette_note({"a": red, "b": grey}, {"a": [0]}) is None  # black all over


def test_deep_images_that_come_out_black():
    traits = {"a": Traits(deep=True), "b": Traits(deep=True), "c": Traits()}
    text = depth_note({"a": 15, "b": 200, "c": 3}, traits)
    assert "1 of 3 images hold more than 8 bits" in text and "at most 15 of 255" in text and "percentile" in text
    assert depth_note({"b": 200, "c": 3}, traits) is None

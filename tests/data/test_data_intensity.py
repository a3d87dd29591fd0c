"""Stored values to levels: every rule, every scope, what is refused, and that a run keeps what it fitted."""

import numpy as np
import pytest

from knowsam.data.case import Case
from knowsam.data.intensity import (
    AsIs,
    MinMax,
    Percentile,
    Preparation,
    Window,
    ZScore,
    as_picture,
    same_levels,
)
from knowsam.data.levels import as_tensor, to_unit
from knowsam.errors import ConfigError, DataError

RNG = np.random.default_rng(0)
CT = RNG.integers(-1024, 2000, (1, 4, 8, 8)).astype(np.int16)


def levels(rule, image, **of):
    return to_unit(as_tensor(rule(Case(image, **of)))).numpy()


def test_eight_bits_come_out_untouched():
    picture = RNG.integers(0, 256, (3, 5, 6), np.uint8)
    assert AsIs()(Case(picture)) is picture
    assert (AsIs()(Case(picture > 9)) == (picture > 9) * 255).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_deeper_files_keep_their_bits(dtype):
    white = np.iinfo(dtype).max
    image = np.array([[[0, 1000, white // 2, white]]], dtype)
    expected = np.array([0, 1000 / white, 0.5, 1])
    np.testing.assert_allclose(levels(AsIs(), image)[0, 0], expected, atol=1 / 65535)


def test_black_and_white_of_the_format_come_first():
    image = np.array([[[0, 2048, 4095]]], np.uint16)
    np.testing.assert_allclose(levels(AsIs(), image, full_range=(0, 4095))[0, 0], [0, 2048 / 4095, 1], atol=1e-4)
    np.testing.assert_allclose(levels(AsIs(white=4095), image)[0, 0], [0, 2048 / 4095, 1], atol=1e-4)
    hounsfield = np.array([[[-1000, -160, 40, 240, 900]]], np.int16)
    np.testing.assert_allclose(levels(AsIs(), hounsfield, full_range=(-160, 240))[0, 0], [0, 0, 0.5, 1, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.array([[[0, 4095]]], np.uint16), "reach only 4095 of 65535"),
        (np.array([[[-5, 4]]], np.int16), "signed numbers have no black and white"),
        (np.array([[[0.0, 7.0]]], np.float32), "float pixels run from 0 to 7"),
        (np.array([[[0.0, np.nan]]], np.float32), "1 pixels are NaN or infinite"),
        (np.array([[["a"]]]), "needed are numbers"),
    ],
)
def test_what_has_no_black_and_white_is_refused_with_the_way_out(image, says):
    with pytest.raises(DataError, match=says) as caught:
        AsIs()(Case(image), "scan.tif")
    assert "scan.tif" in str(caught.value)
    if "needed" not in says and "NaN" not in says:
        assert "minmax" in caught.value.hint


def test_forty_hounsfield_units_are_the_same_grey_in_every_slice_and_scope():
    ct = CT.copy()
    ct[:, :, 0, 0] = 40
    shown = levels(Window(low=-160, high=240), ct)
    assert np.unique(shown[:, :, 0, 0]).tolist() == pytest.approx([0.5], abs=1e-4)
    slice_by_slice = [levels(Window(centre=40, width=400), ct[:, z])[0, 0, 0] for z in range(4)]
    assert slice_by_slice == pytest.approx([0.5] * 4, abs=1e-4)


@pytest.mark.parametrize("rule", [MinMax, Percentile, ZScore])
def test_scopes(rule):
    cases = [Case(CT + 100 * n) for n in range(3)]
    by_slice, by_case, by_set = rule(scope="slice"), rule(scope="case"), rule(scope="dataset")
    assert not np.array_equal(by_slice(cases[0]), by_case(cases[0]))
    np.testing.assert_array_equal(by_slice(cases[0])[:, 2], rule(scope="case")(Case(CT[:, 2])))
    np.testing.assert_allclose(
        to_unit(as_tensor(by_case(cases[0]))).numpy(), to_unit(as_tensor(by_case(cases[2]))).numpy(), atol=2 / 65535
    )
    with pytest.raises(ConfigError, match="was not fitted"):
        by_set(cases[0])
    by_set.fit(iter(cases))
    shown = [to_unit(as_tensor(by_set(case))).numpy().mean() for case in cases]
    assert shown[0] < shown[1] < shown[2], "over the data set, brighter cases stay brighter"
    np.testing.assert_array_equal(by_set(cases[1])[:, 2], by_set(Case(cases[1].image[:, 2])))


def test_fits_are_those_of_all_values():
    cases = [Case(CT), Case(CT[:, :2] * 2)]
    everything = np.concatenate([case.image.ravel() for case in cases]).astype(float)
    fitted = {}
    for rule in (MinMax(scope="dataset"), ZScore(scope="dataset", clip=2)):
        rule.fit(iter(cases))
        fitted[type(rule)] = rule.fitted["windows"][0]
    assert fitted[MinMax] == [everything.min(), everything.max()]
    # the two extremes of each case stand twice among the samples
    assert fitted[ZScore] == pytest.approx(
        [everything.mean() - 2 * everything.std(), everything.mean() + 2 * everything.std()], rel=0.1
    )


def test_channels_apart_or_together():
    image = np.stack([np.arange(16.0), 10 * np.arange(16.0)]).reshape(2, 4, 4)
    together, apart = levels(MinMax(), image), levels(MinMax(per_channel=True), image)
    assert together[0].max() == pytest.approx(0.1, abs=1e-4) and apart[0].max() == apart[1].max() == 1


def test_zscore_heeds_what_is_not_background():
    image = np.zeros((1, 10, 10))
    image[0, :2] = np.linspace(100, 120, 20).reshape(2, 10)
    shown = levels(ZScore(nonzero=True, clip=3), image)
    assert shown[0, :2].mean() == pytest.approx(0.5, abs=1e-3) and shown[0, 5, 5] == 0


def test_a_constant_image_is_black_not_an_error():
    for rule in (MinMax(), Percentile(), ZScore()):
        assert (rule(Case(np.full((1, 4, 4), 7.0))) == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(),
        lambda: Window(low=3, high=3),
        lambda: Window(low=0, high=1, centre=3, width=1),
        lambda: Percentile(low=60, high=40),
        lambda: ZScore(clip=0),
        lambda: MinMax(scope="volume"),
        lambda: AsIs(white=-1),
    ],
)
def test_settings_without_sense(make):
    with pytest.raises(ConfigError, match="intensity"):
        make()


def test_channels_of_an_experiment():
    grey, colour, four = (np.zeros((c, 4, 5), np.uint8) for c in (1, 3, 4))
    assert Preparation()(Case(grey)).shape == Preparation()(Case(colour)).shape == (4, 5, 3)
    assert Preparation(channels=1)(Case(grey)).shape == (4, 5, 1)
    assert Preparation(channels=4)(Case(four)).shape == (4, 5, 4)
    for channels, image in ((3, four), (1, colour), (4, grey)):
        with pytest.raises(DataError, match="channels; this experiment takes") as caught:
            Preparation(channels=channels)(Case(image))
        assert f"data.channels={len(image)}" in caught.value.hint


def test_a_run_keeps_what_it_fitted_and_refuses_another_rule():
    first = Preparation(Percentile(scope="dataset"))
    first.intensity.fit([Case(CT)])
    again = Preparation(Percentile(scope="dataset"))
    again.load_state(first.state())
    np.testing.assert_array_equal(again(Case(CT)), first(Case(CT)))
    assert again.key() == first.key()
    for other in (Percentile(scope="dataset", low=1), MinMax(scope="dataset"), Percentile(scope="case")):
        with pytest.raises(ConfigError, match="the run prepared its images by"):
            Preparation(other).load_state(first.state())


def test_a_rule_of_one_s_own_may_have_options_that_json_changes():
    class Between(Window):
        def options(self):
            return {"range": (self.low, self.high)}

    rule = Preparation(Between(low=0, high=9))
    Preparation(Between(low=0, high=9)).load_state(rule.state())
    with pytest.raises(ConfigError, match="the run prepared its images by"):
        Preparation(Between(low=0, high=8)).load_state(rule.state())


def test_levels_of_two_depths_mean_the_same():
    shallow = np.arange(256, dtype=np.uint8)
    both = same_levels([shallow, np.zeros(256, np.uint16)])
    np.testing.assert_allclose(to_unit(as_tensor(both[0])).numpy(), to_unit(as_tensor(shallow)).numpy(), atol=1e-7)
    np.testing.assert_array_equal(as_picture(np.stack([both[0]] * 3, -1))[:, 0], shallow)
    assert as_picture(np.zeros((4, 5, 6, 2), np.uint16)).shape == (4, 5, 6, 3)

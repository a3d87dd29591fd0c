"""Images of any size through networks of one: resized, in windows, slice by slice."""

import itertools

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from knowsam.data.patches import patch_start, read_patch
from knowsam.inference import inferers
from knowsam.inference.inferers import SliceBySlice, SlidingWindow

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
CASES = [((24, 32), (61, 47)), ((8, 16, 12), (19, 33, 20)), ((16, 16, 16), (9, 40, 21)), ((16, 16), (16, 50))]


def network(dims, outputs=1, classes=3, channels=1, kernel=3, seed=0):
    """Logits by name, each of its own number of classes."""
    torch.manual_seed(seed)
    nets = {
        f"out{n}": CONV[dims](channels, classes + n, kernel, padding=kernel // 2, padding_mode="zeros")
        for n in range(outputs)
    }
    return lambda x: {name: net(x) for name, net in nets.items()}


def image(shape, channels=1, seed=0):
    return torch.rand(channels, *shape, generator=torch.Generator().manual_seed(seed))


def firsts(side, length, overlap=0.5):
    """By hand: steps of a share of the window, the last one moved back to end with the image."""
    if side <= length:
        return [0]
    step = max(1, int(length * (1 - overlap)))
    found = list(range(0, side - length, step))
    return [*found, side - length]


def gaussian(length):
    place = torch.arange(length).double() - (length - 1) / 2
    return torch.exp(-(place**2) / (2 * (0.125 * length) ** 2)).clamp(min=1e-3)


def by_hand(predict, picture, roi, weights=gaussian, overlap=0.5):
    """All windows one after the other, in float64."""
    shape = picture.shape[1:]
    assert all(side >= length for side, length in zip(shape, roi, strict=True))
    total, weight = 0, torch.zeros(shape).double()
    window = weights(roi[0])
    for length in roi[1:]:
        window = window[..., None] * weights(length)
    for place in itertools.product(*(firsts(s, r, overlap) for s, r in zip(shape, roi, strict=True))):
        at = tuple(slice(p, p + r) for p, r in zip(place, roi, strict=True))
        with torch.no_grad():
            logits = predict(picture[(slice(None), *at)][None])["out0"][0].double()
        here = torch.zeros(len(logits), *shape).double()
        here[(slice(None), *at)] = logits * window
        total = total + here
        weight[at] += window
    return total / weight


# ---------------------------------------------------------------- sliding window


@pytest.mark.parametrize("roi", [(24, 32), (8, 16, 12)])
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_an_image_of_the_window_s_size_is_the_network_s_own(roi, mode):
    predict, picture = network(len(roi), outputs=2), image(roi)
    found = SlidingWindow(roi, mode=mode)(predict, picture)
    with torch.no_grad():
        wanted = predict(picture[None])
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name][0]) for name in wanted)
    assert not any(x.requires_grad for x in found.values())


@pytest.mark.parametrize("roi, shape", CASES[:2])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.8])
def test_windows_are_averaged_by_gaussian_weights(roi, shape, overlap):
    predict, picture = network(len(roi)), image(shape)
    found = SlidingWindow(roi, overlap)(predict, picture)["out0"]
    torch.testing.assert_close(
        found.double(), by_hand(predict, picture, roi, overlap=overlap), atol=1e-5, rtol=0, check_dtype=False
    )


@pytest.mark.parametrize("roi, shape", CASES)
def test_windows_of_equal_weights_are_monai_s(roi, shape):
    predict, picture = network(len(roi), outputs=2), image(shape)
    found = SlidingWindow(roi, 0.4, "constant", 3)(predict, picture)
    with torch.no_grad():
        wanted = sliding_window_inference(picture[None], roi, 1, predict, overlap=0.4, mode="constant")
    for name, logits in wanted.items():
        torch.testing.assert_close(found[name], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("roi, shape", CASES)
def test_how_many_windows_at_a_time_changes_nothing(roi, shape):
    predict, picture = network(len(roi), outputs=2), image(shape)
    one, five, many = (SlidingWindow(roi, batch_size=n)(predict, picture) for n in (1, 5, 99))
    for name, logits in one.items():
        torch.testing.assert_close(logits, five[name], atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, many[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("roi, shape", CASES)
@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_constant_networks_give_constant_maps(roi, shape, mode):
    values = torch.tensor([3.5, -2.0, 0.25])

    def predict(x):
        return {"a": values.view(1, 3, *(1,) * len(roi)).expand(len(x), 3, *x.shape[2:])}

    found = SlidingWindow(roi, mode=mode, batch_size=2)(predict, image(shape))["a"]
    assert found.shape == (3, *shape)
    torch.testing.assert_close(found, values.view(3, *(1,) * len(roi)).expand_as(found), atol=1e-5, rtol=0)


@pytest.mark.parametrize("roi, shape", CASES[:2])
def test_seams_do_not_show(roi, shape):
    """A convolution of 3 pixels sees what lies outside of a window as black, within one pixel of its border alone."""
    predict, picture = network(len(roi)), image(shape)
    with torch.no_grad():
        whole = predict(picture[None])["out0"][0]
    found = SlidingWindow(roi)(predict, picture)["out0"]
    inner = torch.ones(shape, dtype=torch.bool)
    for axis, (side, length) in enumerate(zip(shape, roi, strict=True)):
        for first in firsts(side, length):
            for border in (first, first + length - 1):
                if border not in (0, side - 1):
                    inner.select(axis, border).zero_()
    assert 0.3 < inner.double().mean() < 1
    torch.testing.assert_close(found[:, inner], whole[:, inner], atol=1e-5, rtol=0)
    error = {mode: (SlidingWindow(roi, mode=mode)(predict, picture)["out0"] - whole).abs().mean() for mode in MODES}
    assert error["gaussian"] < 0.35 * error["constant"]  # weights all but leave out a window's border


MODES = ("gaussian", "constant")


@pytest.mark.parametrize("roi, shape", [((16, 24), (9, 13)), ((16, 16, 8), (11, 40, 5)), ((8, 8, 8), (3, 8, 7))])
def test_an_image_smaller_than_the_window_is_padded_as_in_training(roi, shape):
    seen = []
    predict = network(len(roi))

    def watched(x):
        seen.append(x)
        return predict(x)

    picture = image(shape)
    found = SlidingWindow(roi)(watched, picture)["out0"]
    assert found.shape == (3, *shape) and all(x.shape[2:] == roi for x in seen)
    if all(side <= length for side, length in zip(shape, roi, strict=True)):
        start = patch_start(shape, roi, np.random.default_rng(0))
        padded = torch.from_numpy(read_patch(picture.numpy(), start, roi))
        assert len(seen) == 1 and torch.equal(seen[0][0], padded)
        at = tuple(slice(-s, -s + side) for s, side in zip(start, shape, strict=True))
        with torch.no_grad():
            assert torch.equal(found, predict(padded[None])["out0"][(0, slice(None), *at)])


@pytest.mark.parametrize("roi, shape", CASES)
@pytest.mark.parametrize("piece", [1, 10_000, 2**24])
def test_parts_are_slabs_that_cover_the_image_once(roi, shape, piece, monkeypatch):
    monkeypatch.setattr(inferers, "PIECE", piece)
    predict, picture = network(len(roi), outputs=2), image(shape)
    inferer = SlidingWindow(roi, 0.6)
    whole, count = inferer(predict, picture), torch.zeros(shape, dtype=torch.int64)
    for place, logits in inferer.parts(predict, picture):
        sides = [part.stop - part.start for part in place]
        assert sum(side != full for side, full in zip(sides, shape, strict=True)) <= 1
        assert any(side <= length for side, length in zip(sides, roi, strict=True))
        assert sum(x.numel() for x in logits.values()) <= piece or 1 in sides
        assert all(x.untyped_storage().nbytes() == 4 * 7 * x[0].numel() for x in logits.values())  # no view of more
        count[place] += 1
        for name, x in logits.items():
            assert x.dtype == torch.float32 and torch.equal(x, whole[name][(slice(None), *place)])
    assert (count == 1).all()


@pytest.mark.parametrize("roi, shape", CASES)
def test_several_images_at_once(roi, shape):
    predict, pictures = network(len(roi), channels=2), torch.stack([image(shape, 2, seed) for seed in range(3)])
    inferer = SlidingWindow(roi, batch_size=4)
    together = inferer.batch(predict, pictures)["out0"]
    for row, picture in enumerate(pictures):
        torch.testing.assert_close(together[row], inferer(predict, picture)["out0"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype, white", [(torch.uint8, 255), (torch.uint16, 65535), (torch.int32, 65535)])
@pytest.mark.parametrize("inferer, shape", [(SlidingWindow((8, 16, 12)), (19, 20, 20))])
def test_levels_are_what_their_floats_are(inferer, shape, dtype, white):
    predict, levels = network(3), (image(shape) * white).round().to(dtype)
    found = inferer(predict, levels)["out0"]
    torch.testing.assert_close(found, inferer(predict, levels.float() / white)["out0"], atol=1e-6, rtol=0)


def test_coarse_logits_are_brought_to_the_window_s_size():
    def predict(x):
        return {"coarse": nn.functional.avg_pool2d(x, 4).expand(-1, 2, -1, -1), "fine": x.expand(-1, 2, -1, -1)}

    ramp = torch.linspace(0, 1, 64).expand(1, 48, 64).contiguous()
    found = SlidingWindow((32, 32))(predict, ramp)
    assert found["coarse"].shape == found["fine"].shape == (2, 48, 64)
    torch.testing.assert_close(found["coarse"][..., 3:-3], found["fine"][..., 3:-3], atol=0.02, rtol=0)


def test_logits_of_autocast_are_summed_in_full_precision():
    def predict(x):
        return {"a": torch.full((len(x), 2, *x.shape[2:]), 1.0, dtype=torch.bfloat16)}

    found = SlidingWindow((16, 16), 0.9)(predict, image((40, 40)))["a"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.ones_like(found), atol=1e-5, rtol=0)


def test_an_image_may_be_one_channel_shown_thrice():
    """Grey as three channels, without the memory of three."""
    predict = network(3, channels=3)
    grey = image((19, 20, 20))
    thrice, copied = grey.expand(3, -1, -1, -1), grey.repeat(3, 1, 1, 1)
    inferer = SlidingWindow((8, 16, 12), batch_size=2)
    assert torch.equal(inferer(predict, thrice)["out0"], inferer(predict, copied)["out0"])


# ---------------------------------------------------------------- resize


# ---------------------------------------------------------------- slices


def test_slices_in_windows():
    predict, volume = network(2), image((5, 40, 30))
    window = SlidingWindow((16, 16), batch_size=3)
    found = SliceBySlice(window, 2)(predict, volume)["out0"]
    assert found.shape == (3, 5, 40, 30)
    for depth in range(5):
        torch.testing.assert_close(found[:, depth], window(predict, volume[:, depth])["out0"], atol=1e-5, rtol=0)
    parts = list(SliceBySlice(window, 2).parts(predict, volume))
    assert [(place[0].start, place[0].stop) for place, _ in parts] == [(0, 2), (2, 4), (4, 5)]
    torch.testing.assert_close(
        SliceBySlice(window)(predict, volume[:, 1])["out0"], window(predict, volume[:, 1])["out0"]
    )
    both = SliceBySlice(window, 2).batch(predict, torch.stack([volume, volume.flip(1)]))["out0"]
    torch.testing.assert_close(both[1].flip(1), both[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: SlidingWindow((16,)), r"roi_size is \(16,\); allowed are 2 or 3 sides"),
        (lambda: SlidingWindow((16, 0)), "roi_size"),
        (lambda: SlidingWindow((16, 16), 1.0), "overlap is 1.0"),
        (lambda: SlidingWindow((16, 16), mode="mean"), "mode is 'mean'; allowed: 'gaussian', 'constant'"),
        (lambda: SlidingWindow((16, 16), batch_size=0), "batch_size is 0"),
        (lambda: SliceBySlice(SlidingWindow((8, 8)), 0), "batch_size is 0"),
        (lambda: SlidingWindow((8, 8, 8))(network(3), image((9, 9))), r"the window is \(8, 8, 8\)"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()

"""Probabilities, uncertainty, flips, and work beside the network: none of it changes an answer."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from knowsam.errors import DataError, NumericError
from knowsam.inference.predict import predict_case, segment, with_flips


def resize(image, size):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


SETTINGS = {"image_size": 32, "batch_size": 4, "device": "cpu"}


def net(seed=0, classes=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, classes, 3, padding=1)).eval()


def predictor(classes=3):
    network = net(classes=classes)
    return lambda x: {"fusion": network(x)}


def images(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"b": (33, 47), "a": (64, 31), "vol": (5, 21, 19), "c": (17, 90), "d": (32, 32), "big": (9, 40, 40)}
    return {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in sizes.items()}


def named(pictures):
    return [(name, lambda name=name: pictures[name]) for name in pictures]


def everything(name, image, answers):
    return answers["fusion"]


@pytest.mark.parametrize("name", ["b", "d", "vol"])
def test_probabilities_and_uncertainty_agree_with_the_labels(name):
    picture = images()[name]
    asked = {"probabilities": True, "uncertainty": True, "then": everything}
    [(_, answer)] = segment(predictor(), [(name, lambda: picture)], **SETTINGS, **asked)
    labels = predict_case(predictor(), picture, **SETTINGS)["fusion"]
    assert (answer.labels == labels).all()
    p = answer.probabilities
    assert p.shape == (3, *labels.shape) and p.dtype == np.float32
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-5)
    assert (p.argmax(0) == labels).all()
    entropy = -(p.astype(np.float64) * np.log(p)).sum(0) / np.log(3)
    assert answer.uncertainty.shape == labels.shape and answer.uncertainty.dtype == np.float32
    np.testing.assert_allclose(answer.uncertainty, entropy, atol=1e-5)


def test_what_is_not_asked_for_is_not_computed():
    [(_, answer)] = segment(predictor(), [("d", lambda: images()["d"])], **SETTINGS, then=everything)
    assert answer.probabilities is None and answer.uncertainty is None


def test_images_are_kept_only_when_asked():
    pictures = images()
    for keep in (False, True):
        seen = {}
        then = lambda name, image, answers, seen=seen: seen.setdefault(name, image)  # noqa: E731
        list(segment(predictor(), named(pictures), **SETTINGS, then=then, keep_images=keep))
        assert all((seen[name] is pictures[name]) if keep else seen[name] is None for name in pictures)


@pytest.mark.parametrize("finish_behind", [0, 1, 3, 99])
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(finish_behind, threads):
    pictures = images()
    asked = {"probabilities": True, "uncertainty": True, "then": everything}
    alone = dict(segment(predictor(), named(pictures), **SETTINGS, **asked, read_ahead=0))
    beside = {"read_ahead": 3, "readers": threads, "finish_behind": finish_behind, "finishers": threads}
    got = list(segment(predictor(), named(pictures), **SETTINGS, **asked, **beside))
    assert [name for name, _ in got] == list(pictures)
    for name, answer in got:
        for field in ("labels", "probabilities", "uncertainty"):
            assert np.array_equal(getattr(answer, field), getattr(alone[name], field)), (name, field)


def test_finishing_happens_in_other_threads_and_they_end():
    before, seen = threading.active_count(), set()
    then = lambda *_: seen.add(threading.current_thread().name)  # noqa: E731
    cases = segment(predictor(), named(images()), **SETTINGS, then=then, finish_behind=2)
    next(cases)
    cases.close()
    assert threading.active_count() == before
    assert seen and all(name.startswith("knowsam-finish") for name in seen)


def test_what_waits_is_bounded():
    """A writer that is slower than the network holds the reader back."""
    read, finished, most = [], [], []
    picture = images()["d"]

    def get():
        read.append(1)
        return picture

    def then(*_):
        time.sleep(0.002)
        finished.append(1)
        most.append(len(read) - len(finished))

    named_images = ((str(n), get) for n in range(60))
    beside = {"read_ahead": 3, "finish_behind": 5, "finishers": 1}
    assert len(list(segment(predictor(), named_images, **SETTINGS, then=then, **beside))) == 60
    # read ahead, one batch that fills, what may wait to be finished, and one of each in hand
    assert max(most) <= 3 + SETTINGS["batch_size"] + 5 + SETTINGS["batch_size"] + 2


def test_an_error_of_one_case_takes_its_place():
    pictures = images()

    def broken():
        raise DataError("torn")

    def then(name, image, answers):
        if name == "c":
            raise NumericError("odd")
        return name

    for behind in (0, 2):
        cases = named({name: pictures[name] for name in "bcd"})
        cases.insert(1, ("x", broken))
        tolerant = {"tolerate": (DataError, NumericError), "then": then, "finish_behind": behind}
        got = list(segment(predictor(), cases, **SETTINGS, **tolerant))
        assert [(name, str(result)) for name, result in got] == [("b", "b"), ("x", "torn"), ("c", "odd"), ("d", "d")]
        with pytest.raises(DataError, match="torn"):
            list(segment(predictor(), cases, **SETTINGS, finish_behind=behind))
        with pytest.raises(NumericError, match="odd"):
            list(segment(predictor(), cases, **SETTINGS, tolerate=(DataError,), then=then, finish_behind=behind))


def test_all_cases_broken():
    def broken():
        raise DataError("torn")

    got = list(segment(predictor(), [("x", broken)] * 3, **SETTINGS, tolerate=(DataError,)))
    assert [name for name, _ in got] == ["x"] * 3 and all(isinstance(result, DataError) for _, result in got)


def test_nan_of_one_slice_is_its_volume_s_alone():
    pictures = {name: images()[name] for name in ("vol", "b")}
    pictures["vol"][2] = 255
    network = net()

    def predict(x):
        return {"fusion": network(x) * torch.where((x.amin((1, 2, 3)) > 0.99), torch.nan, 1.0)[:, None, None, None]}

    got = dict(segment(predict, named(pictures), **SETTINGS, tolerate=(NumericError,), finish_behind=2))
    assert isinstance(got["vol"], NumericError) and "case 'vol'" in str(got["vol"])
    assert got["b"]["fusion"].shape == (33, 47)


# ---------------------------------------------------------------- flips


def test_flips_average_the_probabilities_of_four_views():
    network, x = net(), torch.rand(2, 3, 32, 48)
    wanted = 0
    for axes in ((), (3,), (2,), (2, 3)):
        wanted = wanted + network(x.flip(axes)).softmax(1).flip(axes) / 4
    with torch.no_grad():
        got = with_flips(lambda image: {"fusion": network(image)})(x)["fusion"]
    torch.testing.assert_close(got.softmax(1), wanted.detach())
    torch.testing.assert_close(got.exp().sum(1), torch.ones(2, 32, 48))


def test_flips_make_the_answer_mirror_with_the_image():
    picture = images()["d"]
    predict = with_flips(predictor())
    straight = predict_case(predict, picture, **SETTINGS)["fusion"]
    mirrored = predict_case(predict, picture[:, ::-1].copy(), **SETTINGS)["fusion"]
    assert (straight == mirrored[:, ::-1]).all()
    single = predict_case(predictor(), picture, **SETTINGS)["fusion"]
    assert (single != predict_case(predictor(), picture[:, ::-1].copy(), **SETTINGS)["fusion"][:, ::-1]).any()


def test_flips_of_a_very_sure_network_stay_finite():
    got = with_flips(lambda x: {"fusion": torch.cat([x[:, :1] * 1e6, -x[:, :1] * 1e6], 1)})(torch.rand(1, 3, 16, 16))
    assert torch.isfinite(got["fusion"]).all()


def test_a_module_behind_flips_is_put_into_eval_mode():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.modes = nn.Conv2d(3, 2, 1), []

        def predict(self, x):
            self.modes.append(self.training)
            return {"fusion": self.network(x)}

        def forward(self, x):
            return self.predict(x)

    method = Method()
    for fn in (method.predict, method):
        predict_case(with_flips(fn), images()["d"], **SETTINGS)
    assert method.modes == [False] * 8 and method.training

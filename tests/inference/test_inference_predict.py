"""Label maps at native size, from networks of a line."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from knowsam.errors import DataError, NumericError
from knowsam.inference.predict import predict_case, predict_cases


def resize(image, size):
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def bright(x):
    """K = 3 by brightness of the red channel: background, middle, bright; and its complement."""
    red = x[:, :1]
    logits = torch.cat([0.5 - red, torch.full_like(red, 0.0), red - 0.5], 1)
    return {"fusion": logits, "unet": logits.flip(1)}


SETTINGS = {"image_size": 32, "batch_size": 4, "device": "cpu"}


class Images:
    """A source that counts, and knows no masks."""

    def __init__(self, images):
        self.images, self.read, self.threads = images, [], set()

    def image(self, case_id):
        self.read.append(case_id)
        self.threads.add(threading.get_ident())
        return self.images[case_id]


def random_images(seed=0):
    rng = np.random.default_rng(seed)
    sizes = {"b": (33, 47), "a": (64, 31), "vol": (5, 21, 19), "c": (17, 90), "d": (32, 32)}
    return {name: np.kron(rng.integers(0, 256, (*s, 1)), np.ones(3)).astype(np.uint8) for name, s in sizes.items()}


@pytest.mark.parametrize("shape", [(37, 53), (32, 32), (1, 7), (101, 20), (3, 37, 53), (1, 30, 31), (9, 16, 17)])
def test_native_size_comes_back(shape):
    labels = predict_case(bright, np.zeros((*shape, 3), np.uint8), **SETTINGS)
    assert list(labels) == ["fusion", "unet"]
    for one, value in zip(labels.values(), (0, 2), strict=True):
        assert one.shape == shape and one.dtype == np.uint8 and (one == value).all()


def test_a_bright_square_lands_where_it_was():
    image = np.zeros((61, 83, 3), np.uint8)
    image[10:40, 50:70] = 255
    labels = predict_case(bright, image, **(SETTINGS | {"image_size": 64}))["fusion"]
    found = np.argwhere(labels == 2)
    assert np.abs(found.min(0) - (10, 50)).max() <= 1 and np.abs(found.max(0) - (39, 69)).max() <= 1


def test_logits_are_enlarged_before_the_argmax():
    """A ramp of logits crosses 0 in the middle of the image, whatever the size the network answers in."""

    def ramp(x):
        line = torch.tensor([-3.0, 1.0]).view(1, 1, 1, 2).expand(len(x), 1, 2, 2)
        return {"out": torch.cat([torch.zeros_like(line), line], 1)}

    labels = predict_case(ramp, np.zeros((8, 80, 3), np.uint8), **SETTINGS)["out"]
    # Centres of the two columns lie at 19.5 and 59.5; the line through (-3, 1) is 0 at 49.5. Labels enlarged after
    # the argmax would change at 40.
    assert (labels == (np.arange(80) > 49.5)).all()


def test_the_network_sees_training_s_preprocessing():
    seen = []

    def spy(x):
        seen.append(x)
        return bright(x)

    image = next(iter(random_images().values()))
    predict_case(spy, image, **SETTINGS)
    wanted = torch.from_numpy(resize(image, 32).copy()).permute(2, 0, 1)[None].float() / 255
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], wanted)


def test_a_volume_is_its_slices():
    volume = random_images()["vol"]
    whole = predict_case(bright, volume, **SETTINGS)
    for i, image in enumerate(volume):
        one = predict_case(bright, image, **SETTINGS)
        assert all((whole[name][i] == one[name]).all() for name in one)


@pytest.mark.parametrize("read_ahead", [0, 1, 3, 99])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_batching_and_reading_ahead_change_nothing(batch_size, read_ahead):
    source = Images(random_images())
    order = ["c", "vol", "b", "a", "d"]
    got = list(predict_cases(bright, source, order, **(SETTINGS | {"batch_size": batch_size}), read_ahead=read_ahead))
    assert [case_id for case_id, _ in got] == order == source.read
    for case_id, labels in got:
        alone = predict_case(bright, source.images[case_id], **(SETTINGS | {"batch_size": 1}))
        assert all((labels[name] == alone[name]).all() and labels[name].shape == alone[name].shape for name in alone)


def test_slices_and_images_share_batches():
    sizes = []

    def spy(x):
        sizes.append(len(x))
        return bright(x)

    list(predict_cases(spy, Images(random_images()), ["b", "a", "vol", "c", "d"], **SETTINGS))
    assert sizes == [4, 4, 1]


def test_reading_happens_in_one_other_thread():
    source = Images(random_images())
    list(predict_cases(bright, source, ["b", "a", "c"], **SETTINGS))
    assert len(source.threads) == 1 and threading.get_ident() not in source.threads


def test_stopping_early_ends_the_reader():
    before = threading.active_count()
    source = Images(random_images())
    cases = predict_cases(bright, source, ["a", "b"] * 50, **(SETTINGS | {"batch_size": 1}))
    next(cases)
    cases.close()
    assert threading.active_count() == before and len(source.read) < 20


def test_an_unreadable_image_is_told_when_its_turn_comes():
    images = random_images()
    images["a"] = images["a"].astype(np.float32)
    cases = predict_cases(bright, Images(images), ["b", "a"], **(SETTINGS | {"batch_size": 1}))
    with pytest.raises(DataError, match="image 'a' is float32"):
        list(cases)


class Tiny(nn.Module):
    """A method whose teacher is in eval mode at all times, and whose answer depends on the mode."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)
        self.teacher.eval()
        self.modes = []

    def predict(self, images):
        self.modes.append((self.training, self.student.training, torch.is_grad_enabled()))
        return {"student": self.student(images), "teacher": self.teacher(images)}

    def forward(self, images):
        return self.predict(images)


@pytest.mark.parametrize("call", [lambda m: m, lambda m: m.predict])
def test_eval_mode_and_no_grad_meanwhile_and_all_as_before_after(call):
    method = Tiny()
    predict_case(call(method), random_images()["b"], **SETTINGS)
    assert method.modes == [(False, False, False)]
    assert (method.training, method.student.training, method.teacher.training) == (True, True, False)


def test_the_mode_comes_back_after_an_error():
    method = Tiny()
    with pytest.raises(DataError):
        predict_case(method.predict, np.zeros((4, 4), np.uint8), **SETTINGS)
    assert method.training and not method.teacher.training and torch.is_grad_enabled()


def test_outputs_are_chosen_and_ordered():
    image = random_images()["b"]
    assert list(predict_case(bright, image, outputs=["unet"], **SETTINGS)) == ["unet"]
    assert list(predict_case(bright, image, outputs=["unet", "fusion"], **SETTINGS)) == ["unet", "fusion"]
    with pytest.raises(ValueError, match="no output 'sam'; allowed: 'fusion', 'unet'"):
        predict_case(bright, image, outputs=["sam"], **SETTINGS)


def test_autocast_reaches_the_network_and_labels_stay():
    method, seen = nn.Conv2d(3, 2, 1), []

    def predict(x):
        seen.append(method(x))
        return {"out": seen[-1]}

    labels = predict_case(predict, random_images()["b"], autocast=torch.bfloat16, **SETTINGS)
    assert seen[0].dtype == torch.bfloat16 and labels["out"].dtype == np.uint8


def test_nan_is_no_label():
    with pytest.raises(NumericError, match="'out' of case 'image'"):
        predict_case(lambda x: {"out": x[:, :2] * float("nan")}, random_images()["b"], **SETTINGS)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 32, 32), (2, 2, 32, 32)])
def test_logits_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="K from 2 to 256"):
        predict_case(lambda x: {"out": torch.zeros(shape)}, random_images()["b"], **SETTINGS)


def test_logits_of_other_classes():
    with pytest.raises(ValueError, match="K 4 with the background"):
        predict_case(bright, random_images()["b"], num_classes=4, **SETTINGS)


def test_batch_size_0():
    with pytest.raises(ValueError, match="batch_size is 0"):
        predict_case(bright, random_images()["b"], **(SETTINGS | {"batch_size": 0}))

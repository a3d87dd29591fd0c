"""Names of settings: short, different, nothing unsaid."""

import pytest

from knowsam.errors import ConfigError
from knowsam.report.compare.naming import differing_keys, name_settings, telling_keys


def names(*settings, folders=None):
    return name_settings([(None, item, (folders or "abcdefgh")[i]) for i, item in enumerate(settings)])


def test_keys_that_differ_name_the_settings():
    a = {"method.name": "knowsam", "data.labelled": "all", "train.max_steps": 5}
    assert names(a, a | {"method.name": "supervised"}) == ["method.name=knowsam", "method.name=supervised"]
    assert names(a, a) == ["knowsam", "knowsam"]
    assert names(a, a | {"method.name": "x", "data.labelled": "few"})[1] == "method.name=x, data.labelled=few"
    assert differing_keys([a, a | {"train.max_steps": 6, "new": 1}]) == ["train.max_steps", "new"]


def test_options_of_another_component_are_not_repeated():
    a = {"method.name": "knowsam", "method.weight": 0.1}
    b = {"method.name": "supervised"}
    assert names(a, b) == ["method.name=knowsam", "method.name=supervised"]
    c = {"method.name": "knowsam", "method.weight": 0.2}
    assert names(a, b, c) == [
        "method.name=knowsam, method.weight=0.1",
        "method.name=supervised",
        "method.name=knowsam, method.weight=0.2",
    ]


def test_networks_that_a_method_brings_are_not_repeated():
    pair = {"students.unet.name": "unet", "students.vnet.name": "vnet", "fusion.name": "ham"}
    a = {"method.name": "knowsam", **pair, "optim.subnets.lr": 0.1}
    b = {"method.name": "supervised", "students.unet.name": "unet", "fusion": None, "optim.subnets.lr": 0.1}
    c = {**b, "method.name": "dan", "optim.discriminator.name": "adam", "optim.discriminator.lr": 1e-4}
    assert names(a, b, c) == ["method.name=knowsam", "method.name=supervised", "method.name=dan"]
    assert telling_keys([a, b]) == ["method.name"] and len(differing_keys([a, b])) == 4
    # What the user chose beside the method is said: other networks for one method, another rate for all groups.
    d = {**b, "students.unet.name": "segresnet"}
    assert names(a, b, d) == [
        "method.name=knowsam, students.unet.name=unet",
        "method.name=supervised, students.unet.name=unet",
        "method.name=supervised, students.unet.name=segresnet",
    ]
    assert names(a, {**b, "optim.subnets.lr": 0.2})[1] == "method.name=supervised, optim.subnets.lr=0.2"


def test_null_and_absent_blocks():
    a, b = {"skd": None, "x": 1}, {"skd.weight": 1.0, "x": 1}
    assert names(a, b) == ["skd=null", "skd.weight=1.0"]


def test_a_long_name_is_shortened_then_the_folder_serves():
    keys = [f"some.very.long.prefix.of.a.key.{i}" for i in "pq"]
    a, b = dict.fromkeys(keys, 1), dict.fromkeys(keys, 2)
    assert names(a, b) == ["p=1, q=1", "p=2, q=2"]
    many = [{f"group.key_number_{i}": n for i in range(9)} for n in range(3)]
    assert names(*many, folders=["one_seed0", "two", "two"]) == ["one", "two (2)", "two (3)"]


def test_names_of_the_user():
    a, b = {"x": 1}, {"x": 2}
    assert name_settings([("mine", a, "f"), (None, a, "g"), (None, b, "h")]) == ["mine", "mine", "x=2"]
    assert name_settings([("one", a, "f"), ("two", a, "g")]) == ["one", "two"]
    with pytest.raises(ConfigError, match=r"run h has no name.*'one' and 'two'"):
        name_settings([("one", a, "f"), ("two", a, "g"), (None, a, "h")])

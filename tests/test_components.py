"""What a constructor is given: what is offered and it asks for, and options, whose mistakes are said in plain words."""

from dataclasses import dataclass

import pytest

from knowsam.components import WrongArguments, call


@dataclass
class Ramp:
    length: float = 0.4
    weight: float = 1.0


def network(num_classes: int, width: int = 8, *, dropout: float = 0.0, ramp: Ramp | None = None):
    return num_classes, width, dropout, ramp


def test_offered_values_go_to_whoever_asks_for_them():
    assert call(network, {"num_classes": 3, "image_size": 64}, {"dropout": 0.5}) == (3, 8, 0.5, None)


def test_a_mapping_becomes_the_dataclass_of_the_annotation():
    assert call(network, {"num_classes": 2}, {"ramp": {"length": 0.1}})[3] == Ramp(0.1, 1.0)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"widht": 4}, "network: it has no parameter 'widht'; did you mean 'width'?"),
        ({"droput": 0.1, "zzz": 1}, "'droput'; did you mean 'dropout'?; it has no parameter 'zzz'"),
        ({"ramp": {"lenght": 0.1}}, "Ramp: it has no parameter 'lenght'; did you mean 'length'?"),
        ({"num_class": 4}, "network: it has no parameter 'num_class'"),
    ],
)
def test_a_misspelt_option_is_told_its_neighbour(options, says):
    with pytest.raises(WrongArguments) as caught:
        call(network, {"num_classes": 2}, options)
    assert says in str(caught.value)
    # What is handed in anyway is no option, and so no advice.
    assert "did you mean 'num_classes'" not in str(caught.value)


def test_what_is_lacking_is_named():
    with pytest.raises(WrongArguments, match="network: it needs 'num_classes'"):
        call(network, {}, {})


def test_whoever_takes_anything_is_given_anything():
    assert call(lambda **options: options, {"num_classes": 2}, {"depth": 3}) == {"depth": 3}

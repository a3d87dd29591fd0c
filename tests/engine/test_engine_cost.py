"""Seconds and memory of a training: told apart by part, and counted on when a run is resumed."""

import pytest
import torch

from knowsam.engine.cost import PARTS, Cost

CPU = torch.device("cpu")


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_and_total():
    clock = Clock()
    cost = Cost(CPU, clock=clock)
    clock.now += 3
    with cost.part("validation"):
        clock.now += 2
    with pytest.raises(RuntimeError), cost.part("checkpoints"):
        clock.now += 1
        raise RuntimeError
    with cost.part("validation"):
        clock.now += 4
    values = cost.values()
    assert values["seconds"] == 10 and values["seconds_validation"] == 6 and values["seconds_checkpoints"] == 1
    assert values["seconds_data"] == 0 and {f"seconds_{part}" for part in PARTS} < set(values)
    assert 10 < values["peak_host_mib"] < 1e6 and "peak_device_mib" not in values


def test_a_resumed_run_goes_on_counting():
    records = [
        {"step": 2, "kind": "cost", "seconds": 1.0},
        {"step": 4, "kind": "cost", "seconds": 50.0, "seconds_validation": 7.0, "peak_host_mib": 1e9},
        {"step": 4, "kind": "val", "seconds": 1e6},
    ]
    clock = Clock()
    cost = Cost(CPU, records, clock=clock)
    with cost.part("validation"):
        clock.now += 5
    values = cost.values()
    assert values["seconds"] == 55 and values["seconds_validation"] == 12 and values["seconds_data"] == 0
    assert values["peak_host_mib"] == 1e9


def test_a_record_without_numbers_counts_nothing():
    values = Cost(CPU, [{"step": 1, "kind": "cost", "seconds": None, "peak_host_mib": "much"}], clock=Clock()).values()
    assert values["seconds"] == 0 and values["peak_host_mib"] < 1e6

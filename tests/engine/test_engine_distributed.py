"""Collectives without a group, and between two gloo processes on the CPU."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing, nn

from knowsam.engine import distributed
from knowsam.errors import ConfigError, DataError, KnowsamError


def test_without_a_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.setup("cpu") == distributed.Rank(0, 1, 0, torch.device("cpu"))
    assert distributed.is_main() and distributed.rank() == 0 and distributed.world_size() == 1
    assert distributed.all_reduce_mean({"a": 1.5}) == {"a": 1.5}
    assert distributed.all_reduce_min_(torch.tensor([1.0, 0.0])).tolist() == [1, 0]
    assert distributed.broadcast_object("x") == "x"
    assert distributed.call_on_main(max, 1, 2) == 2
    assert distributed.replicas_equal(nn.Linear(1, 1)) == []
    with pytest.raises(ValueError, match="own"):
        distributed.call_on_main(_fail, ValueError("own"))
    distributed.barrier()
    distributed.teardown()


@pytest.mark.parametrize(
    ("choice", "devices", "processes", "text"),
    [
        ("gpu", 1, 1, "unknown device 'gpu'"),
        ("cuda:x", 1, 1, "unknown device"),
        ("cuda", 0, 1, "no CUDA device"),
        ("cuda:2", 2, 1, "cuda:0 to cuda:1"),
        ("cuda:0", 2, 2, "names one device, but 2 processes"),
        ("auto", 2, 4, "4 processes on this machine, but only 2 CUDA devices"),
        ("mps", 0, 1, "unknown device 'mps'"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, choice, devices, processes, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=text):
        distributed.setup(choice)


def _fail(error: Exception) -> None:
    raise error


def _two(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}  # the parent's store
    me = distributed.setup("cpu", timeout=30)
    assert (me.rank, me.world_size, distributed.is_main()) == (rank, 2, rank == 0)

    values = {"a": 1.0, "b": 10.0} if rank == 0 else {"b": 20.0, "a": 2.0}
    assert distributed.all_reduce_mean(values) == {"a": 1.5, "b": 15.0}
    assert list(distributed.all_reduce_mean(values)) == list(values)
    assert distributed.all_reduce_min_(torch.tensor([1.0, float(rank == 0)])).tolist() == [1, 0]
    assert distributed.broadcast_object({"from": rank}) == {"from": 0}
    assert distributed.broadcast_object({"from": rank}, source=1) == {"from": 1}

    assert distributed.call_on_main(lambda: rank + 5) == 5
    with pytest.raises(DataError, match="bad list") as caught:
        distributed.call_on_main(_fail, DataError("bad list", hint="mend it"))
    assert caught.value.hint == "mend it" and caught.value.reported_by_main == (rank == 1)
    with pytest.raises(ZeroDivisionError if rank == 0 else KnowsamError, match="division"):
        distributed.call_on_main(lambda: 1 // 0)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).to(torch.bfloat16)
    assert distributed.replicas_equal(model, buffers=True) == []
    model[1].running_mean += rank
    assert distributed.replicas_equal(model) == []
    assert distributed.replicas_equal(model, buffers=True) == ["1.running_mean"]
    with torch.no_grad():
        model[0].weight[0, 0] += rank
    assert distributed.replicas_equal(model) == ["0.weight"]
    distributed.barrier()
    distributed.teardown()
    distributed.teardown()


def test_two_processes():
    # A port that is taken here and now: one that was only looked up may be another test's a moment later.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    multiprocessing.spawn(_two, args=(store.port,), nprocs=2)

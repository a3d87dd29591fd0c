"""Dropout from plain bits is dropout."""

import pytest
import torch
import torch._dynamo
from torch import nn

from knowsam.models.dropout import Dropout
from knowsam.models.unet import UNet


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((61, 59), torch.contiguous_format),
        ((61, 59), torch.channels_last),
        ((7, 23, 21), torch.contiguous_format),
        ((7, 23, 21), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_what_is_kept_and_how_it_is_scaled(dtype, size, layout, rate):
    torch.manual_seed(0)
    x = torch.rand(4, 6, *size).add(0.5).to(dtype).to(memory_format=layout).requires_grad_()
    y = Dropout(rate)(x)
    assert y.dtype == dtype and y.stride() == x.stride()
    kept = y != 0
    count = x.numel()
    sd = (rate * (1 - rate) / count) ** 0.5
    assert abs((~kept).float().mean().item() - rate) < 5 * sd
    # As nn.Dropout scales, to the precision of the dtype and of the rate.
    tolerance = {"rtol": 2e-5, "atol": 0} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 0}
    torch.testing.assert_close(y[kept], (x[kept].double() / (1 - rate)).to(dtype), **tolerance)
    gradient = torch.rand_like(y)
    y.backward(gradient)
    assert x.grad.stride() == x.stride()
    torch.testing.assert_close(x.grad, (gradient.double() * kept / (1 - rate)).to(dtype), **tolerance)


def test_neighbours_and_channels_are_dropped_independently():
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(2, 64, 64, 64)) != 0).double()
    bound = 5 * 0.25 / kept[..., 1:].numel() ** 0.5
    for offset in (1, 2, 3, 4):  # four elements share a drawn number
        for dim in (0, 1, 2, 3):
            if kept.shape[dim] > offset:
                one, other = (
                    kept.narrow(dim, 0, kept.shape[dim] - offset),
                    kept.narrow(dim, offset, kept.shape[dim] - offset),
                )
                assert abs(((one - 0.5) * (other - 0.5)).mean().item()) < 2 * bound, (dim, offset)


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (0, 4), ()])
def test_any_shape(shape):
    x = torch.ones(shape)
    assert Dropout(0.5)(x).shape == x.shape


def test_tensors_with_gaps():
    x = torch.ones(8, 6)[:, ::2]
    y = Dropout(0.5)(x)
    assert y.shape == x.shape and set(y.unique().tolist()) <= {0.0, 2.0}
    assert Dropout(0.5)(torch.ones(1).expand(4, 5)).shape == (4, 5)


def test_the_seed_decides():
    def draw(seed):
        torch.manual_seed(seed)
        return Dropout(0.3)(torch.ones(1000))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_where_it_is_torchs_own():
    x = torch.rand(50)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(50))


def test_compiled_it_is_torchs_own_without_a_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(Dropout(0.5), backend="aot_eager", fullgraph=True)
    x = torch.rand(3, 50) + 0.5
    torch.manual_seed(0)
    dropped = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(dropped, nn.Dropout(0.5)(x)) and 0 < (dropped == 0).sum() < 150


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_unet_drops_with_it(spatial_dims):
    rates = [module.p for module in UNet(3, spatial_dims=spatial_dims).modules() if isinstance(module, Dropout)]
    assert rates[:5] == [0.05, 0.1, 0.2, 0.3, 0.5] and not any(rates[5:])

"""Concatenation whose gradients are dense."""

import pytest
import torch
import torch._dynamo

from knowsam.models.concatenation import concatenate


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        ((6, 5), torch.channels_last),
        ((6, 5), torch.contiguous_format),
        ((3, 6, 5), torch.channels_last_3d),
        ((3, 6, 5), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_cat_and_so_are_its_gradients(size, layout, dtype):
    torch.manual_seed(0)
    parts = [torch.randn(2, c, *size).to(dtype, memory_format=layout).requires_grad_() for c in (3, 4, 1)]
    weight = torch.randn(2, 8, *size).to(dtype, memory_format=layout)
    expected = torch.cat(parts, 1)
    assert concatenate(parts).equal(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), parts)
    seen = []
    for part in parts:
        part.register_hook(seen.append)
    (concatenate(parts) * weight).sum().backward()
    for part, gradient in zip(parts, wanted, strict=True):
        assert part.grad.equal(gradient)
    if layout is not torch.contiguous_format:
        assert all(gradient.is_contiguous(memory_format=layout) for gradient in seen)


def test_parts_of_two_types_become_the_wider_one():
    parts = [torch.randn(1, 2, 4, 4, requires_grad=True), torch.randn(1, 2, 4, 4, dtype=torch.float64)]
    assert concatenate(parts).dtype == torch.float64
    concatenate(parts).sum().backward()
    assert parts[0].grad.dtype == torch.float32


@pytest.mark.parametrize("size", [(4, 4), (2, 4, 4)])
def test_compiled_without_a_graph_break(size):
    torch._dynamo.reset()
    compiled = torch.compile(concatenate, backend="aot_eager", fullgraph=True)
    parts = [torch.randn(2, c, *size, requires_grad=True) for c in (3, 2)]
    joined = compiled(parts)
    assert joined.equal(torch.cat(parts, 1))
    joined.square().sum().backward()
    assert all(torch.equal(part.grad, 2 * part.detach()) for part in parts)

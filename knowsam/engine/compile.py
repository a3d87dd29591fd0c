"""``torch.compile`` for the networks of a method."""

from torch import nn

from knowsam.errors import ConfigError

OPTIONS = {("inductor", "cpu"): {"cpp.simdlen": 256}}
"""Inductor of torch 2.13 makes NaN when it transposes 32 x 32 tiles of bfloat16, as it does in SAM, with AVX-512."""


def compile_parts(parts: list[nn.Module], backend: str, device: str) -> None:
    """Compile the forward pass of each part, in place: names of parameters, and so checkpoints, stay as they are.

    The first steps take longer, by minutes with ``inductor`` on a CPU.

    Args:
        parts: of ``SSLMethod.compilable``.
        backend: of ``torch.compile``, such as ``inductor``; empty for none.
        device: type of the device that they run on.
    Raises:
        ConfigError: torch has no such backend here.
    """
    if not backend:
        return
    import torch._dynamo

    known = torch._dynamo.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"train.compile is {backend!r}; this torch has {', '.join(known)}")
    for part in parts:
        part.compile(backend=backend, options=OPTIONS.get((backend, device)))

"""segment-anything's modules, importable without a working torchvision, and typed.

The package's ``__init__`` also imports its predictor and automatic mask generator, and these import torchvision. We
need neither. Everybody in this project takes segment-anything's classes from here. It has no type annotations that a
checker may use: what we use of it is declared below, for checkers only.
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from torch import Tensor, nn


def register_without_init(name: str) -> None:
    """Put package ``name`` into ``sys.modules`` without running its ``__init__``; then its submodules can be imported.

    The parent has to stay there, or pickling a class of a submodule fails.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)  # finds a top-level package, does not run it
    if spec is None:
        raise ModuleNotFoundError(f"{name} is not installed; it is a requirement of knowsam: pip install {name}==1.0")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    # An earlier, failed import leaves the submodules that it finished in sys.modules, but no longer bound to a parent.
    for key, module in list(sys.modules.items()):
        parent, _, child = key.rpartition(".")
        if parent == name:
            setattr(package, child, module)


def import_segment_anything() -> None:
    """Import segment_anything normally if that works, else without its ``__init__``."""
    try:
        importlib.import_module("segment_anything")
    # No torchvision is an ImportError; one built for another torch raises RuntimeError, AttributeError or OSError,
    # depending on the pair. If segment-anything itself is at fault, the imports below say so.
    except Exception:
        register_without_init("segment_anything")


if TYPE_CHECKING:

    class LayerNorm2d(nn.Module):
        """Norm over channels (B, C, H, W)."""

        def __init__(self, num_channels: int, eps: float = 1e-6) -> None: ...

    class MLPBlock(nn.Module):
        """Linear, activation, linear."""

        lin1: nn.Linear
        lin2: nn.Linear

    class Attention(nn.Module):
        """Attention of the encoder."""

        num_heads: int
        scale: float
        qkv: nn.Linear
        proj: nn.Linear
        use_rel_pos: bool
        rel_pos_h: nn.Parameter
        rel_pos_w: nn.Parameter

        def __init__(
            self,
            dim: int,
            num_heads: int = 8,
            qkv_bias: bool = True,
            use_rel_pos: bool = False,
            rel_pos_zero_init: bool = True,
            input_size: tuple[int, int] | None = None,
        ) -> None: ...

    class Block(nn.Module):
        """Block of the encoder."""

        norm1: nn.Module
        attn: nn.Module
        norm2: nn.Module
        mlp: MLPBlock
        window_size: int

        def __init__(self, dim: int, num_heads: int, **options: object) -> None: ...

    class ImageEncoderViT(nn.Module):
        """The encoder."""

        patch_embed: nn.Module
        pos_embed: nn.Parameter
        blocks: nn.ModuleList
        neck: nn.Sequential

        def __init__(self, **options: object) -> None: ...

    class PositionEmbeddingRandom(nn.Module):
        """Fourier features of places."""

        def _pe_encoding(self, coords: Tensor) -> Tensor: ...

    class PromptEncoder(nn.Module):
        """Points, boxes and masks to embeddings."""

        embed_dim: int
        input_image_size: tuple[int, int]
        image_embedding_size: tuple[int, int]
        mask_input_size: tuple[int, int]
        pe_layer: PositionEmbeddingRandom
        point_embeddings: nn.ModuleList
        not_a_point_embed: nn.Embedding
        no_mask_embed: nn.Embedding
        mask_downscaling: nn.Sequential

        def __init__(
            self,
            embed_dim: int,
            image_embedding_size: tuple[int, int],
            input_image_size: tuple[int, int],
            mask_in_chans: int,
        ) -> None: ...

        def get_dense_pe(self) -> Tensor: ...

    class TwoWayAttentionBlock(nn.Module):
        """Block of the decoder's transformer."""

        self_attn: nn.Module
        norm1: nn.LayerNorm
        cross_attn_token_to_image: nn.Module
        norm2: nn.LayerNorm
        mlp: MLPBlock
        norm3: nn.LayerNorm
        norm4: nn.LayerNorm
        cross_attn_image_to_token: nn.Module
        skip_first_layer_pe: bool

        def __init__(
            self, embedding_dim: int, num_heads: int, mlp_dim: int = 2048, *, skip_first_layer_pe: bool = False
        ) -> None: ...

    class TwoWayTransformer(nn.Module):
        """The decoder's transformer."""

        depth: int
        layers: nn.ModuleList
        final_attn_token_to_image: nn.Module
        norm_final_attn: nn.LayerNorm

        def __init__(self, depth: int, embedding_dim: int, num_heads: int, mlp_dim: int) -> None: ...

    class MaskDecoder(nn.Module):
        """The mask decoder."""

        transformer_dim: int
        transformer: nn.Module
        num_mask_tokens: int
        iou_token: nn.Embedding
        mask_tokens: nn.Embedding
        output_upscaling: nn.Sequential
        output_hypernetworks_mlps: nn.ModuleList
        iou_prediction_head: nn.Module

        def __init__(self, *, transformer_dim: int, transformer: nn.Module, iou_head_hidden_dim: int = 256) -> None: ...

    def window_partition(x: Tensor, window_size: int) -> tuple[Tensor, tuple[int, int]]:
        """Grid to padded windows, and the padded size."""

    def window_unpartition(windows: Tensor, window_size: int, pad_hw: tuple[int, int], hw: tuple[int, int]) -> Tensor:
        """And back."""

else:
    import_segment_anything()

    from segment_anything.modeling.common import LayerNorm2d, MLPBlock
    from segment_anything.modeling.image_encoder import (
        Attention,
        Block,
        ImageEncoderViT,
        window_partition,
        window_unpartition,
    )
    from segment_anything.modeling.mask_decoder import MaskDecoder
    from segment_anything.modeling.prompt_encoder import PromptEncoder
    from segment_anything.modeling.transformer import TwoWayAttentionBlock, TwoWayTransformer

__all__ = [
    "Attention",
    "Block",
    "ImageEncoderViT",
    "LayerNorm2d",
    "MLPBlock",
    "MaskDecoder",
    "PromptEncoder",
    "TwoWayAttentionBlock",
    "TwoWayTransformer",
    "window_partition",
    "window_unpartition",
]

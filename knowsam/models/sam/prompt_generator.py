"""Prompts made from the image embedding, one set per class (KnowSAM's learnable prompt strategy)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knowsam.models.sam.official import LayerNorm2d
from knowsam.models.sam.prompts import Prompts


class PromptGenerator(nn.Module):
    """Sparse tokens and a dense prompt for every class, from the image embedding.

    The sparse tokens take the place of SAM's box corners and enter the decoder as they are. The dense prompt is added
    to the mask embedding; its last layer starts at zero, so a loaded SAM is not disturbed. A part that is switched off
    is not created.

    Args:
        num_classes: K, background included.
        embed_dim: C, channels of the embedding; 256 in every SAM. All widths follow from it.
        tokens: sparse tokens per class.
        sparse: make sparse tokens.
        dense: make a dense prompt.
        dropout: rate inside the feed-forward part of the sparse heads.
        dense_width: hidden channels of the dense head; C / 4 if None.
    Raises:
        ValueError: num_classes, tokens or dense_width below 1, dropout outside [0, 1).
    Source:
        arXiv:2412.13742 (sparse part, and the dense part in words); the design of the dense part is ours.
    """

    new_parameters = ("",)

    def __init__(
        self,
        num_classes: int,
        *,
        embed_dim: int = 256,
        tokens: int = 2,
        sparse: bool = True,
        dense: bool = True,
        dropout: float = 0.1,
        dense_width: int | None = None,
    ) -> None:
        super().__init__()
        dense_width = max(1, embed_dim // 4) if dense_width is None else dense_width
        if num_classes < 1 or tokens < 1 or dense_width < 1:
            raise ValueError(
                f"num_classes is {num_classes}, tokens {tokens}, dense_width {dense_width}; all must be at least 1 "
                "(sparse=False leaves the tokens out)"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.tokens = tokens
        self.sparse = sparse
        self.dense = dense
        self.sparse_heads = nn.ModuleList(
            SparseHead(embed_dim, tokens, dropout) for _ in range(num_classes if sparse else 0)
        )
        self.dense_head = dense_head(embed_dim, dense_width, num_classes) if dense else None

    def forward(self, image_embedding: Tensor) -> Prompts:
        """Prompts of all classes.

        Args:
            image_embedding: (B, C, E, E), E >= 2.
        Returns:
            ``sparse`` (B, K, n, C), n = 0 when switched off; ``dense`` (B, K, C, E, E), None when switched off.
        """
        if self.sparse:
            sparse = torch.stack([head(image_embedding) for head in self.sparse_heads], dim=1)
        else:
            sparse = image_embedding.new_zeros(image_embedding.shape[0], self.num_classes, 0, self.embed_dim)
        dense = None
        if self.dense_head is not None:
            dense = torch.unflatten(self.dense_head(image_embedding), 1, (self.num_classes, self.embed_dim))
        return Prompts(sparse=sparse, dense=dense)


class SparseHead(nn.Module):
    """Tokens of one class: four double convolutions with two poolings, global average, feed-forward.

    (B, C, E, E) -> (B, tokens, C). At E = 16 the maps are 16, 8, 8 and 4 wide.
    """

    def __init__(self, channels: int = 256, tokens: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens = tokens
        self.convs = nn.ModuleList(double_conv(channels) for _ in range(4))
        self.project = nn.Conv2d(channels, channels, kernel_size=1)
        self.ffn = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, tokens * channels),
        )

    def forward(self, image_embedding: Tensor) -> Tensor:
        """(B, C, E, E) -> (B, tokens, C)."""
        x = self.convs[0](image_embedding)
        x = self.convs[1](halve(x))
        x = self.convs[2](x)
        x = self.convs[3](halve(x))
        x = self.project(x).mean(dim=(2, 3))  # (B, C)
        return torch.unflatten(self.ffn(x), 1, (self.tokens, -1))


def halve(x: Tensor) -> Tensor:
    """2x2 max-pooling; maps below 4x4 stay, for BatchNorm cannot train on the single pixel of a single image."""
    return F.max_pool2d(x, 2) if min(x.shape[-2:]) >= 4 else x


def double_conv(channels: int) -> nn.Sequential:
    """Twice 3x3 convolution with bias, BatchNorm, LeakyReLU 0.01."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers)


def dense_head(channels: int, hidden: int, num_classes: int) -> nn.Sequential:
    """Light convolutions (B, C, E, E) -> (B, K C, E, E); classes share all but the last layer, which starts at zero."""
    last = nn.Conv2d(hidden, num_classes * channels, kernel_size=1)
    for parameter in last.parameters():
        nn.init.zeros_(parameter)
    return nn.Sequential(
        nn.Conv2d(channels, hidden, kernel_size=1),
        LayerNorm2d(hidden),
        nn.GELU(),
        nn.Conv2d(hidden, hidden, kernel_size=3, padding=1),
        LayerNorm2d(hidden),
        nn.GELU(),
        last,
    )

"""SAM's ViT by size: segment-anything's three, and two small ones for tests and short runs.

Every function takes what :class:`SamImageEncoder` takes beside the size, and ``encoder_type``, a subclass of it.
"""

from collections.abc import Sequence

from knowsam.models.sam.encoder import SamImageEncoder


def vit_b(
    *,
    image_size: int = 256,
    out_channels: int = 256,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """segment-anything's ViT-B: 768 wide, 12 blocks, 90 M parameters."""
    return encoder_type(
        image_size=image_size,
        width=768,
        depth=12,
        heads=12,
        global_blocks=(2, 5, 8, 11),
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )


def vit_l(
    *,
    image_size: int = 256,
    out_channels: int = 256,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """segment-anything's ViT-L: 1024 wide, 24 blocks, 308 M parameters."""
    return encoder_type(
        image_size=image_size,
        width=1024,
        depth=24,
        heads=16,
        global_blocks=(5, 11, 17, 23),
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )


def vit_h(
    *,
    image_size: int = 256,
    out_channels: int = 256,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """segment-anything's ViT-H: 1280 wide, 32 blocks, 637 M parameters."""
    return encoder_type(
        image_size=image_size,
        width=1280,
        depth=32,
        heads=16,
        global_blocks=(7, 15, 23, 31),
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )


def vit_tiny(
    *,
    image_size: int = 256,
    out_channels: int = 64,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """96 wide, 4 blocks, an embedding of 64 channels, which keeps decoder and prompts small. No official weights."""
    return encoder_type(
        image_size=image_size,
        width=96,
        depth=4,
        heads=3,
        global_blocks=(1, 3),
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )


def vit_small(
    *,
    image_size: int = 256,
    out_channels: int = 96,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """192 wide, 4 blocks, and an embedding of 96 channels. No official weights."""
    return encoder_type(
        image_size=image_size,
        width=192,
        depth=4,
        heads=3,
        global_blocks=(1, 3),
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )


def sam_vit(
    *,
    image_size: int = 256,
    width: int = 768,
    depth: int = 12,
    heads: int = 12,
    global_blocks: Sequence[int] = (2, 5, 8, 11),
    window: int = 14,
    out_channels: int = 256,
    use_rel_pos: bool = True,
    checkpointing: bool = False,
    taps: Sequence[int] = (),
    encoder_type: type[SamImageEncoder] = SamImageEncoder,
) -> SamImageEncoder:
    """SAM's ViT of any size; arguments as of :class:`SamImageEncoder`."""
    return encoder_type(
        image_size=image_size,
        width=width,
        depth=depth,
        heads=heads,
        global_blocks=global_blocks,
        window=window,
        out_channels=out_channels,
        use_rel_pos=use_rel_pos,
        checkpointing=checkpointing,
        taps=taps,
    )

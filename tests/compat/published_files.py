"""Files as the published code writes them, with random weights: the names are facts, spelled out here once more."""

from pathlib import Path

import torch
from compat_lab import keyed

from knowsam.compat.checkpoint import SAM_FILE, STUDENTS_FILE


def published_shapes(num_classes: int, width: int = 96, depth: int = 4) -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes of the two files' tensors, ``subnets`` and ``sam``."""
    k, subnets, sam = num_classes, {}, {}

    def layer(into, name, *shape, bias=True):
        into[f"{name}.weight"] = shape
        if bias:
            into[f"{name}.bias"] = (
                shape[1:2] if name.endswith((".up", "_up.conv.0", "upscaling.0", "upscaling.3")) else shape[:1]
            )

    def norm(into, name, channels):
        layer(into, name, channels)
        into |= {f"{name}.running_mean": (channels,), f"{name}.running_var": (channels,)}
        into[f"{name}.num_batches_tracked"] = ()

    def double_conv(into, name, i, o):
        for first, channels in ((0, i), (4, o)):
            layer(into, f"{name}.{first}", o, channels, 3, 3)
            norm(into, f"{name}.{first + 1}", o)

    widths = (16, 32, 64, 128, 256)
    double_conv(subnets, "UNet.in_conv.conv_conv", 3, 16)
    for level in range(1, 5):
        double_conv(subnets, f"UNet.down{level}.maxpool_conv.1.conv_conv", widths[level - 1], widths[level])
        i, o = widths[5 - level], widths[4 - level]
        layer(subnets, f"UNet.up{level}.up", i, o, 2, 2)
        double_conv(subnets, f"UNet.up{level}.conv.conv_conv", i, o)
    layer(subnets, "UNet.out_conv", k, 16, 3, 3)

    names, depths = (
        ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
        (1, 2, 3, 3, 3, 3, 3, 2, 1),
    )
    for level, (name, units) in enumerate(zip(names, depths, strict=True)):
        channels = widths[min(level, 8 - level)]
        for unit in range(units):
            layer(subnets, f"VNet.block_{name}.conv.{2 * unit}", channels, 3 if level == 0 else channels, 3, 3)
        if level < 4:
            layer(subnets, f"VNet.block_{name}_dw.conv.0", 2 * channels, channels, 2, 2)
        elif level < 8:
            layer(subnets, f"VNet.block_{name}_up.conv.0", channels, channels // 2, 2, 2)
    layer(subnets, "VNet.out_conv", k, 16, 1, 1)
    for branch, i, o in (("ambiguous", k, 16), ("entmap", 2, 16), ("logits", 2 * k, 32)):
        layer(subnets, f"Discriminator.{branch}_conv.0", 16, i, 3, 3, bias=False)
        norm(subnets, f"Discriminator.{branch}_conv.1", 16)
        layer(subnets, f"Discriminator.{branch}_conv.3", o, 16, 1, 1, bias=False)
        norm(subnets, f"Discriminator.{branch}_conv.4", o)
    for first, o in ((0, 64), (3, k)):
        layer(subnets, f"Discriminator.final_conv.{first}", o, 64, 3, 3, bias=False)
        norm(subnets, f"Discriminator.final_conv.{first + 1}", o)

    def adapter(name, d):
        layer(sam, f"{name}.D_fc1", d // 4, d)
        layer(sam, f"{name}.D_fc2", d, d // 4)

    def attention(name, inner):
        for part in ("q_proj", "k_proj", "v_proj"):
            layer(sam, f"{name}.{part}", inner, 256)
        layer(sam, f"{name}.out_proj", 256, inner)

    encoder = "image_encoder"
    sam[f"{encoder}.pos_embed"] = (1, 64, 64, width)
    layer(sam, f"{encoder}.patch_embed.proj", width, 3, 16, 16)
    for block in (f"{encoder}.blocks.{i}" for i in range(depth)):
        layer(sam, f"{block}.attn.qkv", 3 * width, width)
        layer(sam, f"{block}.attn.proj", width, width)
        layer(sam, f"{block}.mlp.lin1", 4 * width, width)
        layer(sam, f"{block}.mlp.lin2", width, 4 * width)
        for name in ("norm1", "norm2"):
            layer(sam, f"{block}.{name}", width)
        for name in ("MLP", "Space", "Depth"):
            adapter(f"{block}.{name}_Adapter", width)
    layer(sam, f"{encoder}.neck.0", 256, width, 1, 1, bias=False)
    layer(sam, f"{encoder}.neck.1", 256)
    layer(sam, f"{encoder}.neck.2", 256, 256, 3, 3, bias=False)
    layer(sam, f"{encoder}.neck.3", 256)
    prompt = "prompt_encoder"
    sam[f"{prompt}.pe_layer.positional_encoding_gaussian_matrix"] = (2, 128)
    for name in (*(f"point_embeddings.{i}" for i in range(4)), "not_a_point_embed", "no_mask_embed"):
        layer(sam, f"{prompt}.{name}", 1, 256, bias=False)
    for index, shape in ((0, (4, 1, 2, 2)), (1, (4,)), (3, (16, 4, 2, 2)), (4, (16,)), (6, (256, 16, 1, 1))):
        layer(sam, f"{prompt}.mask_downscaling.{index}", *shape)
    decoder, transformer = "mask_decoder", "mask_decoder.transformer"
    for block in (f"{transformer}.layers.{i}" for i in range(2)):
        attention(f"{block}.self_attn", 256)
        attention(f"{block}.cross_attn_token_to_image", 128)
        attention(f"{block}.cross_attn_image_to_token", 128)
        layer(sam, f"{block}.mlp.layers.0.0", 2048, 256)
        layer(sam, f"{block}.mlp.fc", 256, 2048)
        for i in range(1, 5):
            layer(sam, f"{block}.norm{i}", 256)
    for owner in (f"{transformer}.layers.0", f"{transformer}.layers.1", transformer):
        adapter(f"{owner}.MLP_Adapter", 256)
        adapter(f"{owner}.Space_Adapter", 256)
    attention(f"{transformer}.final_attn_token_to_image", 128)
    layer(sam, f"{transformer}.norm_final_attn", 256)
    layer(sam, f"{decoder}.iou_token", 1, 256, bias=False)
    layer(sam, f"{decoder}.mask_tokens", 4, 256, bias=False)
    layer(sam, f"{decoder}.output_upscaling.0", 256, 64, 2, 2)
    layer(sam, f"{decoder}.output_upscaling.1", 64)
    layer(sam, f"{decoder}.output_upscaling.3", 64, 32, 2, 2)
    for head, last in (*((f"output_hypernetworks_mlps.{i}", 32) for i in range(4)), ("iou_prediction_head", 4)):
        for i, o in enumerate((256, 256, last)):
            layer(sam, f"{decoder}.{head}.layers.{i}", o, 256)
    for head in (f"super_prompt.box_decoder.{i}" for i in range(k)):
        for name in ("conv_1", "down_1.maxpool_conv.1", "conv_2", "down_2.maxpool_conv.1"):
            double_conv(sam, f"{head}.{name}.conv_conv", 256, 256)
        layer(sam, f"{head}.conv_3", 256, 256, 1, 1)
        layer(sam, f"{head}.ffn.0", 1024, 256)
        layer(sam, f"{head}.ffn.3", 512, 1024)
    return {"subnets": subnets, "sam": sam}


def published_weights(num_classes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Random state dicts of both files, by name."""

    def tensor(key, shape):
        return torch.tensor(0) if key.endswith("num_batches_tracked") else keyed(key, torch.empty(shape))

    return {
        part: {key: tensor(key, shape) for key, shape in keys.items()}
        for part, keys in published_shapes(num_classes).items()
    }


def save_published(folder: Path, weights: dict[str, dict[str, torch.Tensor]]) -> tuple[Path, Path]:
    """Write the students' and SAM's file; their paths."""
    paths = folder / STUDENTS_FILE, folder / SAM_FILE
    for path, part in zip(paths, ("subnets", "sam"), strict=True):
        torch.save(weights[part], path)
    return paths

"""Ten-line networks and batches for the tests of methods, in 2-D and 3-D."""

from dataclasses import replace

import torch
from torch import nn

from knowsam import components
from knowsam.data.batch import Batch, Ids, Labelled
from knowsam.methods.sam_teacher import SkdOptions
from knowsam.methods.with_skd import WithSKD
from knowsam.models.fusion import FusionHead
from knowsam.models.sam import Embedding
from knowsam.models.students import Students

SIDE = 16
MAX_STEPS = 100

# What the formulas in the tests are written for; defaults may be tuned without touching them.
SKD = {"weight": 1.0, "temperature": 10.0, "rampup": 0.4, "confidence_threshold": 0.0}
PUBLISHED = {
    "supervised": {},
    "mean_teacher": {"consistency": "mse", "consistency_weight": 10.0, "rampup": 0.4},
    "knowsam": {
        "skd": {**SKD, "teacher_mode": "eval", "view": "weak"},
        "entropy_weight": 0.9,
        "consistency": {"weight": 1.0, "rampup": 1.0},  # 10 * 0.1
        "mix": {
            "start": 0.24,
            "grid": 4,
            "cells": 5,
            "pick": "most_uncertain",
            "confidence_threshold": 0.0,
        },
    },
}

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def net(num_classes, dropout=0.0, dims=2):
    layers = (
        CONV[dims](3, 6, 3, padding=1),
        NORM[dims](6),
        nn.ReLU(),
        nn.Dropout(dropout),
        CONV[dims](6, num_classes, 1),
    )
    return nn.Sequential(*layers)


class StubGuide(nn.Module):
    """Same interface as SamGuide, but it does *not* detach the mask prompt: whoever calls it must.

    Args:
        modes: give the encoder a batch norm, so that it computes otherwise in training than in eval mode.
    """

    def __init__(self, num_classes, dims=2, modes=False):
        super().__init__()
        norm = [NORM[dims](5)] if modes else []
        self.image_encoder = nn.Sequential(CONV[dims](3, 5, 3, padding=1), *norm)
        self.prompt = nn.Sequential(CONV[dims](5, 5, 1), NORM[dims](5), nn.Dropout(0.2))
        self.decoder = CONV[dims](5 + num_classes, num_classes, 1)
        self.encoded = 0

    def encode(self, images):
        self.encoded += 1
        return Embedding(self.image_encoder(images))

    def decode(self, embedding, coarse_logits=None, size=None, first=None):
        x = torch.cat([self.prompt(embedding.image), coarse_logits], 1)  # batch norm looks at all
        return self.decoder(x[:first])

    def forward(self, images, coarse_logits=None):
        return self.decode(self.encode(images), coarse_logits, images.shape[2:])


def make_students(num_classes, fusion=True, dropout=0.0, dims=2):
    subnets = {"unet": net(num_classes, dropout, dims), "vnet": net(num_classes, dropout, dims)}
    head = FusionHead(num_classes, spatial_dims=dims) if fusion else None
    return Students(subnets, head) if fusion else Students({"unet": subnets["unet"]})


def make_method(
    name, num_classes, *, skd=False, fusion=True, guide=None, seed=0, dropout=0.0, dims=2, skd_options=None, **options
):
    """A method by its name in the table, on stub networks; `skd` wraps it if True, and is its own option if a dict."""
    torch.manual_seed(seed)
    if isinstance(skd, dict):
        skd, options = False, options | {"skd": skd}
    guide = guide or StubGuide(num_classes, dims)
    offered = {
        "students": make_students(num_classes, fusion, dropout, dims),
        "sam_guide": guide,
        "max_steps": MAX_STEPS,
        "num_classes": num_classes,
        "spatial_dims": dims,
    }
    method = components.call(components.load(components.METHODS[name]), offered, options)
    return WithSKD(method, guide, MAX_STEPS, SkdOptions(**skd_options or {})) if skd else method


def make_batch(num_classes, labelled=2, unlabelled=3, side=SIDE, seed=1, dims=2, needs=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (side,) * dims
    images = torch.rand(labelled + 2 * unlabelled, 3, *shape, generator=generator)
    mask = torch.randint(num_classes, (labelled, *shape), generator=generator)
    weak, strong = images[labelled:].split(unlabelled)
    ids = Ids(tuple(f"l{i}" for i in range(labelled)), tuple(f"u{i}" for i in range(unlabelled)))
    batch = Batch(images[:labelled], mask, weak, (strong,), ids)
    if needs is not None:
        more = [torch.rand(unlabelled, 3, *shape, generator=generator) for _ in range(needs.strong_views)]
        second = Labelled(torch.rand(labelled, 3, *shape, generator=generator), mask.flip(0))
        batch = replace(
            batch,
            strong=tuple([strong, *more][: needs.strong_views]),
            plain=batch.labelled.clone() if needs.plain_labelled else None,
            second=second if needs.second_labelled else None,
        )
    return batch


def part_of(name):
    """unet, vnet, fusion_head, sam, teacher: the part that owns a parameter."""
    for word in name.split("."):
        if word in ("unet", "vnet", "fusion_head", "teacher"):
            return word
        if word == "sam_teacher":
            return "sam"
    raise AssertionError(f"{name} belongs to no part")


def reached(method, loss):
    """Parts in which ``loss`` has a non-zero gradient; every other parameter must have none or exactly 0."""
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return {part_of(n) for (n, _), g in pairs if g is not None and g.abs().sum() > 0}

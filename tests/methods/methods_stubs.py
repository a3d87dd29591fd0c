"""Ten-line networks and batches for the tests of methods."""

import torch
from torch import nn

from knowsam import components
from knowsam.data.batch import Batch
from knowsam.methods.with_skd import WithSKD
from knowsam.models.fusion import FusionHead
from knowsam.models.students import Students

SIDE = 16
MAX_STEPS = 100

# What the formulas in the tests are written for; defaults may be tuned without touching them.
SKD = {"weight": 1.0, "temperature": 10.0, "rampup": 0.4, "confidence_threshold": 0.0}
PUBLISHED = {
    "supervised": {},
    "mean_teacher": {"consistency": "mse", "consistency_weight": 10.0, "rampup": 0.4},
    "knowsam": {
        "skd_weight": 1.0,
        "skd_temperature": 10.0,
        "skd_rampup": 0.4,
        "skd_confidence_threshold": 0.0,
        "sam_teacher_mode": "eval",
        "sam_view": "weak",
        "entropy_weight": 0.9,
        "consistency_weight": 1.0,  # 10 * 0.1
        "consistency_rampup": 1.0,
        "mixing": True,
        "mix_start": 0.24,
        "mix_grid": 4,
        "mix_cells": 5,
        "mix_pick": "most_uncertain",
        "mix_confidence_threshold": 0.0,
    },
}


def net(num_classes, dropout=0.0):
    layers = (
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, num_classes, 1),
    )
    return nn.Sequential(*layers)


class StubGuide(nn.Module):
    """Same interface as SamGuide, but it does *not* detach the mask prompt: whoever calls it must."""

    def __init__(self, num_classes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5))
        self.prompt = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5), nn.Dropout(0.2))
        self.decoder = nn.Conv2d(5 + num_classes, num_classes, 1)

    def encode(self, images):
        return self.encoder(images)

    def decode(self, image_embedding, coarse_logits=None, size=None, first=None):
        x = torch.cat([self.prompt(image_embedding), coarse_logits], 1)  # batch norm looks at all
        return self.decoder(x[:first])

    def forward(self, images, coarse_logits=None):
        return self.decode(self.encode(images), coarse_logits, images.shape[-2:])


def make_students(num_classes, fusion=True, dropout=0.0):
    subnets = {"unet": net(num_classes, dropout), "vnet": net(num_classes, dropout)}
    return Students(subnets, FusionHead(num_classes)) if fusion else Students({"unet": subnets["unet"]})


def make_method(
    name, num_classes, *, skd=False, fusion=True, guide=None, seed=0, dropout=0.0, skd_options=None, **options
):
    """A method by its name in the table, on stub networks."""
    torch.manual_seed(seed)
    signature = components.signature(components.METHODS[name])
    guide = guide or StubGuide(num_classes)
    offered = {
        "students": make_students(num_classes, fusion, dropout),
        "sam_guide": guide,
        "max_steps": MAX_STEPS,
        "forward_unlabelled": skd,
    }
    provided = {key: value for key, value in offered.items() if key in signature}
    method = components.load(components.METHODS[name])(**provided, **options)
    return WithSKD(method, guide, MAX_STEPS, **skd_options or {}) if skd else method


def make_batch(num_classes, labelled=2, unlabelled=3, side=SIDE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(labelled + 2 * unlabelled, 3, side, side, generator=generator)
    mask = torch.randint(num_classes, (labelled, side, side), generator=generator)
    return Batch(images[:labelled], mask, *images[labelled:].split(unlabelled))


def part_of(name):
    """unet, vnet, fusion_head, sam, teacher: the part that owns a parameter."""
    for word in name.split("."):
        if word in ("unet", "vnet", "fusion_head", "teacher"):
            return word
        if word == "sam_guide":
            return "sam"
    raise AssertionError(f"{name} belongs to no part")


def reached(method, loss):
    """Parts in which ``loss`` has a non-zero gradient; every other parameter must have none or exactly 0."""
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return {part_of(n) for (n, _), g in pairs if g is not None and g.abs().sum() > 0}

"""CPC-SAM (arXiv:2407.05416): two decoders on one encoder; each, prompted by the other's prediction, teaches it."""

import copy

from torch import nn

from knowsam.losses import mse_consistency_loss
from knowsam.methods.base import Prediction, SSLMethod, StepOutput, Taught, supervised_loss, trained
from knowsam.models.sam import Sam, SamGuide, freeze_unreached
from knowsam.needs import Needs


class CPCSAM(SSLMethod):
    needs = Needs(strong_views=0, sam="promptable", spatial_dims=(2,), partial_labels=True)
    default_students = {}

    def __init__(
        self, sam_guide: SamGuide, num_classes: int, max_steps: int, *, weight: float = 0.4, start: float = 0.2
    ):
        super().__init__()
        sam = sam_guide.sam
        freeze_unreached(sam, points=False, boxes=False, masks=None, multimask=False, scores=False)
        other = Sam(sam.image_encoder, sam.prompt_encoder, copy.deepcopy(sam.mask_decoder))
        second = SamGuide(other, sam_guide.prompt_generator, num_classes, freeze=False)
        self.decoders = nn.ModuleDict({"first": sam_guide, "second": second})
        self.weight, self.from_step = weight, start * max_steps

    def trainable_groups(self):
        return {"sam": trained(self)}

    def networks(self):
        return dict(self.decoders)

    def forward(self, batch, step):
        joined = batch.join(batch.weak)
        size, weight = joined.images.shape[2:], self.weight if step >= self.from_step else 0.0
        embedding = self.decoders["first"].encode(joined.images)
        plain = {name: decoder.decode(embedding, None, size) for name, decoder in self.decoders.items()}
        losses = {f"seg_{name}": supervised_loss(x, batch) for name, x in plain.items()}
        for name, other in (("first", "second"), ("second", "first")):
            prompted = self.decoders[name].decode(embedding, plain[other], size)
            losses[f"prompted_{name}"] = supervised_loss(prompted, batch)
            losses[f"cross_{other}"] = weight * mse_consistency_loss(
                joined.unlabelled(plain[other]), joined.unlabelled(prompted)
            )
        predictions = {name: Prediction(joined.images, x, batch.mask) for name, x in plain.items()}
        return StepOutput(losses, predictions, {name: Taught(x) for name, x in plain.items()}, plain["first"].detach())

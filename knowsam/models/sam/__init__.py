"""SAM: its parts, the promptable network, the guide with prompts of its own, and official weights."""

from knowsam.models.sam.build import build_sam, build_sam_guide
from knowsam.models.sam.encoder import SamImageEncoder
from knowsam.models.sam.guide import SamGuide
from knowsam.models.sam.mask_decoder import Masks, SamMaskDecoder, SamTwoWayTransformer
from knowsam.models.sam.parameters import load_trained, trained_state
from knowsam.models.sam.prompt_generator import PromptGenerator
from knowsam.models.sam.prompts import Prompts, SamPromptEncoder
from knowsam.models.sam.sam import Decoded, Embedding, Sam, freeze_unreached
from knowsam.models.sam.slicewise import SliceWiseGuide
from knowsam.models.sam.weights import LoadReport, load_official

__all__ = [
    "Decoded",
    "Embedding",
    "LoadReport",
    "Masks",
    "PromptGenerator",
    "Prompts",
    "Sam",
    "SamGuide",
    "SamImageEncoder",
    "SamMaskDecoder",
    "SamPromptEncoder",
    "SamTwoWayTransformer",
    "SliceWiseGuide",
    "build_sam",
    "build_sam_guide",
    "freeze_unreached",
    "load_official",
    "load_trained",
    "trained_state",
]

"""SAM: encoder, mask decoder, prompt generator, the guide made of them, and official weights."""

from knowsam.models.sam.encoder import SamImageEncoder
from knowsam.models.sam.guide import SamGuide
from knowsam.models.sam.mask_decoder import SamMaskDecoder
from knowsam.models.sam.prompt_generator import PromptGenerator
from knowsam.models.sam.variants import (
    ENCODERS,
    MASK_DECODERS,
    PROMPT_GENERATORS,
    TUNINGS,
    VARIANTS,
    build_sam_guide,
)
from knowsam.models.sam.weights import LoadReport, load_official

__all__ = [
    "ENCODERS",
    "MASK_DECODERS",
    "PROMPT_GENERATORS",
    "TUNINGS",
    "VARIANTS",
    "LoadReport",
    "PromptGenerator",
    "SamGuide",
    "SamImageEncoder",
    "SamMaskDecoder",
    "build_sam_guide",
    "load_official",
]

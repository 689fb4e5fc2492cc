from .backbone import D2SwinTransformer
from .meta_arch import MaskFormerHead
from .pixel_decoder import MSDeformAttnPixelDecoder
from .transformer_decoder import MultiScaleMaskedTransformerDecoder

__all__ = [
    "D2SwinTransformer",
    "MSDeformAttnPixelDecoder",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
]

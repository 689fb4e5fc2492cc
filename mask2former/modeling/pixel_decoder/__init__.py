from .ms_deform_attn import MSDeformAttn, MSDeformAttnCore
from .msdeformattn import MSDeformAttnPixelDecoder

__all__ = ["MSDeformAttn", "MSDeformAttnCore", "MSDeformAttnPixelDecoder"]

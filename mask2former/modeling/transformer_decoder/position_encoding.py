"""Sine position encodings of feature maps."""

import functools
import math

import torch
from torch import Tensor, nn


@functools.lru_cache(maxsize=256)
def _axis_encoding(length: int, num_feats: int, temperature: float, device: torch.device) -> Tensor:
    """Encodings of the positions 1..length along one axis, normalised to (0, 2 pi]: (length, num_feats) float32."""
    # A tensor made in inference mode could not be saved for a later backward pass, and the cache outlives this call.
    with torch.inference_mode(False), torch.no_grad():
        position = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        position = position / (length + 1e-6) * (2 * math.pi)
        feature = torch.arange(num_feats, dtype=torch.float32, device=device)
        wavelength = temperature ** (2 * torch.div(feature, 2, rounding_mode="floor") / num_feats)
        angle = position[:, None] / wavelength  # (length, num_feats)
        return torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=2).flatten(1)


class PositionEmbeddingSine(nn.Module):
    """Two-dimensional sine encoding, normalised to the map's size.

    It depends on the map's height and width alone. The encoding is separable, so only the two one-dimensional parts
    are kept between calls.

    Source: DETR (Carion et al. 2020) as the Mask2Former release uses it, with normalize=True.
    """

    def __init__(self, num_pos_feats: int, temperature: float = 10000.0):
        super().__init__()
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        """Encoding of a feature map.

        Args:
            x: (B, C, H, W), read for its size and device only.

        Returns:
            (1, 2 * num_pos_feats, H, W) float32; the first half of the channels encodes y, the second x.
        """
        height, width = x.shape[-2:]
        y = _axis_encoding(int(height), self.num_pos_feats, self.temperature, x.device)
        x = _axis_encoding(int(width), self.num_pos_feats, self.temperature, x.device)
        y = y.t()[:, :, None].expand(-1, -1, width)  # (F, H, W)
        x = x.t()[:, None, :].expand(-1, height, -1)
        return torch.cat((y, x))[None]

    def extra_repr(self) -> str:
        return f"num_pos_feats={self.num_pos_feats}, temperature={self.temperature}"

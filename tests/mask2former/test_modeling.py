"""Parts of the model against plain versions of what they compute."""

import pytest
import torch
from torch.nn import functional as F

from mask2former.modeling import shape_ops
from mask2former.modeling.pixel_decoder import MSDeformAttnCore
from mask2former.modeling.pixel_decoder.msdeformattn import MSDeformAttnTransformerEncoderOnly
from mask2former.modeling.transformer_decoder import PositionEmbeddingSine, attention_core
from mask2former.modeling.transformer_decoder.attention import (
    MaskedCrossAttention,
    PixelMemory,
    SelfAttention,
    SelfAttentionLayer,
)
from mask2former.modeling.transformer_decoder.attention_core import attention_mask


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def with_random_biases(module: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.normal_(module.in_proj_bias)
    torch.nn.init.normal_(module.out_proj.bias)
    return module


def torchs_own(ours: torch.nn.Module) -> torch.nn.MultiheadAttention:
    channels = ours.in_proj_weight.shape[1]
    theirs = torch.nn.MultiheadAttention(channels, ours.num_heads, batch_first=True)
    theirs.load_state_dict(ours.state_dict())  # the same keys
    return theirs


def test_self_attention_equals_torch_multihead_attention():
    ours = with_random_biases(SelfAttention(16, 4))
    x, pos = torch.randn(2, 5, 16), torch.randn(1, 5, 16)
    expected = torchs_own(ours)(x + pos, x + pos, x)[0]
    torch.testing.assert_close(ours.out_proj(ours(x, pos)), expected)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_self_attention_layer_adds_the_projection_and_normalises(pre_norm):
    layer = SelfAttentionLayer(16, 4, pre_norm)
    with_random_biases(layer.self_attn)
    torch.nn.init.normal_(layer.norm.weight)
    x, pos = torch.randn(2, 5, 16), torch.randn(1, 5, 16)
    normed = layer.norm(x) if pre_norm else x
    expected = x + torchs_own(layer.self_attn)(normed + pos, normed + pos, normed)[0]
    torch.testing.assert_close(layer(x, pos), expected if pre_norm else layer.norm(expected))


def test_masked_attention_equals_torch_multihead_attention():
    layers = [with_random_biases(MaskedCrossAttention(16, 4)) for _ in range(3)]
    query, pos = torch.randn(2, 5, 16), torch.randn(1, 5, 16)
    pixels, position = torch.randn(2, 16, 3, 4), torch.randn(1, 16, 3, 4)
    level_embed, mask_embed = torch.randn(16), torch.randn(2, 5, 8)
    mask_features = torch.randn(2, 8, 6, 8)
    keys, values, level_mask_features = PixelMemory()(pixels, position, level_embed, mask_features, layers)
    resized = F.interpolate(mask_features, size=(3, 4), mode="bilinear", align_corners=False).flatten(2)
    torch.testing.assert_close(level_mask_features, resized.transpose(1, 2))
    blocked = attention_mask(mask_embed @ resized)
    value = pixels.flatten(2).transpose(1, 2) + level_embed
    key = value + position.flatten(2).transpose(1, 2)
    for part, layer in enumerate(layers):
        attended = layer(query, pos, keys, values, part, mask_embed, level_mask_features)
        mask = blocked.expand(-1, 4, -1, -1).flatten(0, 1)
        expected = torchs_own(layer)(query + pos, key, value, attn_mask=mask)[0]
        torch.testing.assert_close(layer.out_proj(attended), expected)


def test_no_gradient_flows_through_where_a_query_attends():
    q, memory = torch.randn(1, 3, 8, requires_grad=True), torch.randn(1, 6, 8, requires_grad=True)
    embed, features = (torch.randn(1, n, 4, requires_grad=True) for n in (3, 6))
    attention_core.masked_attention(q, q.detach()[:1], memory, memory, 0, embed, features, 2).sum().backward()
    assert q.grad is not None and memory.grad is not None
    assert embed.grad is None and features.grad is None


def test_row_masked_everywhere_attends_everywhere():
    logits = torch.tensor([[[-1.0, 1.0, 0.0], [-1.0, -2.0, -3.0]]])
    expected = [[[True, False, False], [False, False, False]]]
    assert attention_mask(logits).tolist() == [expected]


def test_masks_of_images_in_a_batch_are_independent():
    logits = torch.randn(3, 4, 6)
    logits[1] = -1.0
    masks = attention_mask(logits)
    assert torch.equal(masks[0, 0], logits[0] < 0) and not masks[1].any()


def test_resizing_commutes_with_the_mask_product():
    embed, features = torch.randn(2, 5, 8), torch.randn(2, 8, 12, 20)
    product = torch.einsum("bqc,bchw->bqhw", embed, features)
    after = F.interpolate(product, size=(5, 7), mode="bilinear", align_corners=False)
    before = F.interpolate(features, size=(5, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(torch.einsum("bqc,bchw->bqhw", embed, before), after)


def bilinear(level: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """(h, w, D) at the point (x, y) in pixels, pixel centres at 0.5, zero outside."""
    height, width = level.shape[:2]
    out = torch.zeros(level.shape[2], dtype=level.dtype)
    x, y = x - 0.5, y - 0.5
    x0, y0 = int(x // 1), int(y // 1)
    for yi in (y0, y0 + 1):
        for xi in (x0, x0 + 1):
            if 0 <= yi < height and 0 <= xi < width:
                out += (1 - abs(x - xi)) * (1 - abs(y - yi)) * level[yi, xi]
    return out


@pytest.mark.parametrize("batch", [1, 2])
def test_deformable_attention_equals_its_definition(batch):
    shapes, heads, points, dim = ((2, 3), (4, 5)), 2, 3, 4
    pixels = sum(h * w for h, w in shapes)
    value = torch.randn(batch, pixels, heads, dim, dtype=torch.float64)
    offsets = (
        torch.randn(batch, pixels, heads, len(shapes), points, 2, dtype=torch.float64) * 3
    )  # some fall outside
    logits = torch.randn(batch, pixels, heads, len(shapes) * points, dtype=torch.float64)
    actual = MSDeformAttnCore()(value, offsets, logits, shapes)

    weights = logits.softmax(-1).unflatten(3, (len(shapes), points))
    levels = value.split([h * w for h, w in shapes], dim=1)
    expected = torch.zeros(batch, pixels, heads, dim, dtype=torch.float64)
    places = [((x + 0.5) / w, (y + 0.5) / h) for h, w in shapes for y in range(h) for x in range(w)]
    for b in range(batch):
        for q, (cx, cy) in enumerate(places):
            for m in range(heads):
                for lvl, (h, w) in enumerate(shapes):
                    feature = levels[lvl][b, :, m].unflatten(0, (h, w))
                    for p in range(points):
                        dx, dy = offsets[b, q, m, lvl, p].tolist()
                        sample = bilinear(feature, cx * w + dx, cy * h + dy)
                        expected[b, q, m] += weights[b, q, m, lvl, p] * sample
    torch.testing.assert_close(actual, expected.flatten(2), rtol=1e-5, atol=1e-6)


def test_deformable_attention_refuses_levels_that_do_not_fit():
    value = torch.randn(1, 7, 1, 2)
    with pytest.raises(ValueError, match="7 pixels"):
        MSDeformAttnCore()(value, torch.zeros(1, 7, 1, 1, 1, 2), torch.zeros(1, 7, 1, 1), ((2, 3),))


def test_encoder_equals_its_definition_and_its_gradient():
    """Deformable DETR's encoder layer: only the queries have the positions added."""
    model = MSDeformAttnTransformerEncoderOnly(8, 2, 3, 16, 0.0, 2, 2).double()
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight)
    x = torch.randn(2, 26, 8, dtype=torch.float64, requires_grad=True)
    pos = torch.randn(1, 26, 8, dtype=torch.float64, requires_grad=True)
    shapes = ((2, 3), (4, 5))
    expected = x
    for layer in model.encoder.layers:
        expected = layer.norm1(expected + layer.self_attn(expected + pos, expected, shapes))
        expected = layer.norm2(expected + layer.linear2(F.relu(layer.linear1(expected))))
    actual = model.encoder(x, pos, shapes)
    assert torch.equal(actual, expected)
    inputs = (x, pos, *model.encoder.parameters())
    gradients = [torch.autograd.grad(out.square().sum(), inputs) for out in (actual, expected)]
    for a, e in zip(*gradients):
        torch.testing.assert_close(a, e)


def test_position_encoding_equals_its_definition():
    encoding = PositionEmbeddingSine(6)(torch.zeros(2, 3, 4, 5))
    assert encoding.shape == (1, 12, 4, 5)
    for y, x, channel in [(0, 0, 0), (3, 4, 1), (2, 1, 5), (1, 3, 4)]:
        wavelength = 10000 ** (2 * (channel // 2) / 6)
        function = torch.cos if channel % 2 else torch.sin
        for position, size, offset in [(y, 4, 0), (x, 5, 6)]:
            angle = torch.tensor((position + 1) / (size + 1e-6) * 2 * torch.pi / wavelength)
            torch.testing.assert_close(encoding[0, offset + channel, y, x], function(angle))


def test_windows_are_undone():
    x = torch.randn(2, 6, 9, 4)
    windows = shape_ops.window_partition(x, 3)
    assert windows.shape == (2, 6, 9, 4)
    assert torch.equal(windows[1, 4], x[1, 3:6, 3:6].reshape(9, 4))  # second row, second column
    assert torch.equal(shape_ops.window_reverse(windows, 3, x), x)


def test_shift_mask_parts_what_was_not_adjacent():
    """Pixels may attend to each other only where, before the shift, they lay in one contiguous window."""
    size, window, shift = 8, 4, 2
    mask = shape_ops.shifted_window_mask(torch.zeros(1, size, size, 1), window, shift)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    origin = torch.stack((y, x), -1).roll((-shift, -shift), (0, 1))[None].float()
    windows = shape_ops.window_partition(origin, window)[0]  # (windows, N, 2): where each pixel came from
    distance = (windows[:, :, None] - windows[:, None, :]).abs().amax(-1)
    assert torch.equal(mask == 0, distance < window)
    assert set(mask.unique().tolist()) == {-100.0, 0.0}

"""Random weights under which a network's outputs are like a trained one's, for tools/benchmark.py.

With weights as they are initialised all queries become nearly the same: no query, or every one, passes the threshold of the
panoptic task, all masks are one mask, and post-processing has next to nothing to do. Here some queries are sure of a class
and have a region of a picture each, the others are sure of "no object", and attention changes a query less than it would.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The picture whose regions the queries get, as benchmark_model draws it. Their masks are about as good at other sizes.
PICTURE = (320, 320)
# What is added to a query is scaled by this, so that queries stay apart from layer to layer.
_DAMPING = 0.1
# Class logits: a kept query's lie between the first two, the others' stay near 0; of "no object" for all.
_KEPT, _NO_OBJECT = (12.0, 16.0), 8.0
# A pixel is inside a mask from this share of a region's indicator on; logits are the indicator's, times _STEEPNESS.
_INSIDE, _STEEPNESS = 0.4, 8.0
# Of the ridge regressions, as a share of the mean variance.
_RIDGE = 0.1


def keep_queries(model: nn.Module, count: int, picture: Tensor) -> int:
    """Change a model's random weights so that some queries are kept, each with a region of its own.

    The same each time, as engines in the cache are found by their weights: what depends on a picture is computed on the
    CPU, in one thread, and rounded to eight bits. Another kind of CPU may differ in some.

    Args:
        model: MaskFormer of random weights.
        count: of queries that are to be kept; at most half of them are.
        picture: (3, H, W) in 0 to 255.

    Returns:
        how many are meant to be kept.
    """
    decoder = model.sem_seg_head.predictor
    generator = torch.Generator().manual_seed(0)
    queries = decoder.query_feat.weight.detach().cpu()
    queries = F.layer_norm(queries, queries.shape[1:])  # (Q, C)
    kept = torch.randperm(len(queries), generator=generator)[: min(count, len(queries) // 2)]
    with torch.no_grad():
        _damp(decoder)
        _set_classes(decoder.class_embed, queries[kept], generator)
        _draw_hidden_layers(decoder.mask_embed.layers[:-1], generator)
        with _one_thread():
            pixels, hidden = _features(copy.deepcopy(model).to("cpu").eval(), picture)
            constant, embeddings = _regions(pixels, len(kept))
        # Queries that are not kept have somebody's region, as those of trained models often do.
        owners = torch.randint(len(kept), (len(queries),), generator=generator)
        owners[kept] = torch.arange(len(kept))
        last = decoder.mask_embed.layers[-1]
        with _one_thread():
            weight, bias = _ridge(hidden, embeddings[owners], ridge=0.01 * _RIDGE)
        _copy(last.weight, weight)
        _copy(last.bias, bias)
        # Of the mask features, the first is 1 everywhere: it carries what a region's indicator has beside the features.
        conv = model.sem_seg_head.pixel_decoder.mask_features
        conv.weight[0] = 0
        conv.bias[0] = constant
    return len(kept)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums have an order that does not depend on how many threads there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _damp(decoder: nn.Module) -> None:
    layers = [layer.multihead_attn.out_proj for layer in decoder.transformer_cross_attention_layers]
    layers += [layer.self_attn.out_proj for layer in decoder.transformer_self_attention_layers]
    layers += [layer.linear2 for layer in decoder.transformer_ffn_layers]
    for layer in layers:
        layer.weight.mul_(_DAMPING)
        layer.bias.mul_(_DAMPING)


def _set_classes(class_embed: nn.Linear, queries: Tensor, generator: torch.Generator) -> None:
    """Another class for each of some queries (n, C), as long as there are classes, in seeded order."""
    classes = class_embed.out_features - 1
    order = torch.randperm(classes, generator=generator)
    low, high = _KEPT
    wanted = low + (high - low) * torch.rand(len(queries), generator=generator)
    weight = torch.zeros(class_embed.weight.shape)
    weight.index_add_(
        0, order[torch.arange(len(queries)) % classes], wanted[:, None] * queries / queries.shape[1]
    )
    class_embed.weight.copy_(weight)
    class_embed.bias.zero_()
    class_embed.bias[-1] = _NO_OBJECT


def _draw_hidden_layers(layers, generator: torch.Generator) -> None:
    """Weights that keep apart what comes in, which small weights beside large biases do not."""
    for layer in layers:
        weight = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.copy_(weight * (2 / layer.in_features) ** 0.5)
        layer.bias.zero_()


def _features(model: nn.Module, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Mask features of the pixels of a picture (P, mask_dim), and what mask embeddings are made of (Q, C)."""
    seen: dict[str, Tensor] = {}
    head = model.sem_seg_head
    head.pixel_decoder.mask_features.register_forward_hook(lambda *a: seen.update(pixels=a[-1]))
    head.predictor.mask_embed.layers[-1].register_forward_pre_hook(lambda _, a: seen.update(hidden=a[0]))
    model.core(model.preprocess([{"image": picture}])[0])
    return seen["pixels"][0].flatten(1).t(), seen["hidden"][-1]


def _regions(pixels: Tensor, count: int) -> tuple[float, Tensor]:
    """Mask embeddings of regions of pixels that are alike.

    Args:
        pixels: (P, C), of which the first is to be a constant.

    Returns:
        that constant, and (count, C): their product with a pixel is positive in its region, mostly.
    """
    pixels = pixels[:, 1:]
    scale = float(pixels.square().mean().sqrt())
    indicators = F.one_hot(_cluster(pixels, count), count).float()  # (P, count)
    weight, bias = _ridge(pixels, indicators, _RIDGE)
    constant = float(_rounded(torch.tensor(scale)))
    embeddings = _STEEPNESS * torch.cat(((bias - _INSIDE)[:, None] / constant, weight), dim=1)
    return constant, embeddings


def _cluster(points: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Which of some clusters each point (P, C) is in, by Lloyd's algorithm."""
    centres = points[torch.linspace(0, len(points) - 1, count).long()]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return nearest


def _ridge(inputs: Tensor, outputs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weight (O, I) and bias (O,) of the linear layer that turns inputs (N, I) into about the outputs (N, O)."""
    inputs, outputs = inputs.double(), outputs.double()
    middle, wanted = inputs.mean(0), outputs.mean(0)
    centred = inputs - middle
    covariance = centred.t() @ centred / len(inputs)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance, centred.t() @ (outputs - wanted) / len(inputs)).t()
    return weight.float(), (wanted - weight @ middle).float()


def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(_rounded(value))


def _rounded(value: Tensor) -> Tensor:
    """To eight significant bits: results that differ in their last bits become the same, but for a few."""
    return value.bfloat16().float()

"""Masks of whole models: initial scores, selection at exact sparsity, magnitude pruning, accounting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from csam.nn import MaskedLayer, masked_layers
from csam_kernels import binarize, checks, percentile_init
from csam_kernels.layout import reduce_to_mask
from csam_kernels.ops.binarize import SCOPES, kept


def group_norms(layer: MaskedLayer) -> Tensor:
    """L2 norm of the weights under each mask value (|theta| for granularity weight), in the mask's shape.

    Squares are summed in float64: in their own dtype those of halves, or of weights of 1e-24, are inf or 0.
    """
    weight = layer.weight.detach()
    if layer.granularity == "weight":
        return weight.abs()
    squares = reduce_to_mask(weight.double().square(), layer.mask.shape, layer.block_size or 0)
    return squares.sqrt().to(torch.promote_types(weight.dtype, torch.float32))


def initial_scores(layers: Sequence[MaskedLayer], tau: float = 0.9) -> list[Tensor]:
    """Percentile-scaled soft masks, per layer: C = clip(|theta| / Q(|theta|, tau), 0, 1) [P; tau = 0.9 E].

    For granularities above one weight, |theta| is the group's L2 norm [R].

    Raises:
        ValueError: tau outside (0, 1], NaN weights.
    """
    return percentile_init([_float(group_norms(layer)) for layer in layers], tau)


def select(layers: Sequence[MaskedLayer], sparsity: float, scope: str = "global") -> list[Tensor]:
    """Hard masks that keep the top ceil((1-s)N) of the layers' N soft mask values, all of equal weight.

    Soft masks pile up at 0 and 1, where the projection holds them. Where the cut goes through such a pile,
    the larger `relative_magnitudes` stay [R]: breaking those ties by index would empty the last layers.

    Args:
        layers: with soft masks C = `mask_score` in [0, 1].
        sparsity: share to remove, in [0, 1).
        scope: "global" (one budget) or "layer" (every layer its own).

    Raises:
        ValueError: sparsity outside [0, 1), NaN scores, unknown scope.
    """
    scores = _comparable([layer.mask_score.detach() for layer in layers])
    if _cut_meets_a_pile(scores, checks.sparsity(sparsity), scope):
        pairs = zip(scores, relative_magnitudes(layers), strict=True)
        scores = [_spread_piles(s, m.to(s.dtype)) for s, m in pairs]
    return _top(scores, sparsity, scope)


def relative_magnitudes(layers: Sequence[MaskedLayer]) -> list[Tensor]:
    """Group norms over their layer's root mean square: magnitudes that can be compared between layers."""
    norms = [_float(group_norms(layer)) for layer in layers]
    means = [n.double().square().mean().sqrt().to(n.dtype) for n in norms]
    return [n / mean.clamp_min(torch.finfo(n.dtype).tiny) for n, mean in zip(norms, means, strict=True)]


def global_magnitude(model: nn.Module, sparsity: float, scope: str = "global") -> None:
    """One-shot magnitude pruning: set every hard mask to keep the largest |theta| (group L2 norms otherwise).

    Keeps exactly ceil((1-s)N) of the N mask values: of the whole model ("global") or of each layer ("layer").

    Raises:
        ValueError: a model without masked layers, sparsity outside [0, 1), NaN weights, unknown scope.
    """
    layers = require_masked(model)
    norms = _comparable([group_norms(layer) for layer in layers.values()])
    for layer, mask in zip(layers.values(), _top(norms, sparsity, scope), strict=True):
        layer.set_mask(mask)


def count(model: nn.Module) -> tuple[int, int]:
    """(weights kept by the hard masks, prunable weights), group masks counted weight by weight.

    Raises:
        ValueError: a model without masked layers.
    """
    layers = require_masked(model).values()
    return sum(layer.kept() for layer in layers), sum(layer.weight.numel() for layer in layers)


def sparsity(model: nn.Module) -> float:
    """Exact share of the prunable weights that the hard masks remove.

    Raises:
        ValueError: a model without masked layers.
    """
    kept_weights, total = count(model)
    return 1 - kept_weights / total


def require_masked(model: nn.Module) -> dict[str, MaskedLayer]:
    """The model's masked layers by name.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    layers = masked_layers(model)
    if not layers:
        raise ValueError("model must hold masked layers, got none; csam.convert(model) makes them")
    return layers


def _cut_meets_a_pile(scores: Sequence[Tensor], sparsity: float, scope: str) -> bool:
    """Whether more values sit at 1 than are kept, or more at 0 than are cut."""
    sizes = [s.numel() for s in scores]
    ones = [int((s >= 1).sum()) for s in scores]
    zeros = [s.numel() - int(torch.count_nonzero(s)) for s in scores]
    if scope == "global":
        sizes, ones, zeros = [sum(sizes)], [sum(ones)], [sum(zeros)]
    keeps = [kept(sparsity, n) for n in sizes]
    return any(o > k or z > n - k for o, z, k, n in zip(ones, zeros, keeps, sizes, strict=True))


def _spread_piles(score: Tensor, magnitude: Tensor) -> Tensor:
    """The score with its values at 0 and 1 moved outside [0, 1], in the order of their magnitudes."""
    score = torch.where(score >= 1, 1 + magnitude, score)
    return torch.where(score <= 0, -1 / (1 + magnitude), score)


def _comparable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """All in float32, or in float64 if one is."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return [t.to(torch.float64 if wide else torch.float32) for t in tensors]


def _top(scores: Sequence[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """`binarize`; in float64, which it does not take, a sort."""
    if not any(s.dtype == torch.float64 for s in scores):
        return binarize(scores, sparsity, scope)
    sparsity = checks.sparsity(sparsity)
    if checks.choice("scope", scope, SCOPES) == "layer":
        return [_top([s], sparsity, "global")[0] for s in scores]
    flat = torch.cat([s.flatten() for s in scores])
    if flat.isnan().any():
        raise ValueError("scores must hold no NaN")
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.sort(descending=True, stable=True).indices[: kept(sparsity, flat.numel())]] = True
    return [part.view(s.shape) for part, s in zip(mask.split([s.numel() for s in scores]), scores, strict=True)]


def _float(t: Tensor) -> Tensor:
    return t if t.dtype in (torch.float32, torch.float64) else t.float()

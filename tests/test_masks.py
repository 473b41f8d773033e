"""Masks of whole models: exact counts, magnitude pruning, initial scores, the cut through piles of ties."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import assert_close
from csam import masks
from csam.nn import GRANULARITIES, MaskedLayer, convert, expand_mask, masked_layers


def model(granularity: str = "weight", **options: Any) -> nn.Module:
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 4))
    return convert(plain, granularity, **options)


def layers_of(m: nn.Module) -> list[MaskedLayer]:
    return list(masked_layers(m).values())


def values(m: nn.Module) -> tuple[int, int]:
    """(mask values kept, mask values)."""
    every = [layer.mask for layer in layers_of(m)]
    return sum(int(t.sum()) for t in every), sum(t.numel() for t in every)


def kept_of(sparsity: float, n: int) -> int:
    return math.ceil(round((1 - sparsity) * n, 9))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_group_norms_are_the_groups_l2_norms(granularity: str) -> None:
    for layer in layers_of(model(granularity, block_size=5)):
        norms = masks.group_norms(layer)
        assert norms.shape == layer.mask.shape
        full = expand_mask(norms, layer.weight.shape, layer.block_size or 0)
        member = expand_mask(torch.arange(norms.numel()).view(norms.shape), layer.weight.shape, layer.block_size or 0)
        for i in range(norms.numel()):
            group = layer.weight[member == i]
            assert_close(full[member == i][0], group.norm().detach())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_magnitude_pruning_keeps_the_largest_and_the_exact_count(granularity: str, scope: str, sparsity: float) -> None:
    m = model(granularity)
    masks.global_magnitude(m, sparsity, scope)
    parts = [[layer] for layer in layers_of(m)] if scope == "layer" else [layers_of(m)]
    for part in parts:
        norms = torch.cat([masks.group_norms(layer).flatten() for layer in part])
        mask = torch.cat([layer.mask.flatten() for layer in part])
        assert int(mask.sum()) == kept_of(sparsity, mask.numel())
        if not mask.all():
            assert norms[mask].min() >= norms[~mask].max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("dtype", "size"), [("float16", 1e-3), ("float16", 3e3), ("float32", 1e-24)])
def test_norms_whose_squares_do_not_fit_the_dtype(granularity: str, dtype: str, size: float) -> None:
    m = model(granularity)
    with torch.no_grad():
        for layer in layers_of(m):
            layer.weight.mul_(size)
    m = m.to(getattr(torch, dtype))
    twin = copy.deepcopy(m).double()
    for layer, same in zip(layers_of(m), layers_of(twin), strict=True):
        assert_close(masks.group_norms(layer).double() / size, masks.group_norms(same) / size, torch.float32)
    pairs = zip(masks.relative_magnitudes(layers_of(m)), masks.relative_magnitudes(layers_of(twin)), strict=True)
    for one, other in pairs:
        assert_close(one.double(), other, torch.float32)
    for either in (m, twin):
        masks.global_magnitude(either, 0.5)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(layers_of(m), layers_of(twin), strict=True))


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_float64_is_ranked_to_its_last_digits(scope: str) -> None:
    m = model().double()
    with torch.no_grad():
        for layer in layers_of(m):
            close = 1 + 1e-12 * torch.randperm(layer.weight.numel()).double().view(layer.weight.shape)
            layer.weight.copy_(close)
            layer.mask_score.copy_(close / 2)
    masks.global_magnitude(m, 0.7, scope)
    for part in [[layer] for layer in layers_of(m)] if scope == "layer" else [layers_of(m)]:
        weight = torch.cat([layer.weight.flatten() for layer in part])
        mask = torch.cat([layer.mask.flatten() for layer in part])
        assert int(mask.sum()) == kept_of(0.7, len(mask))
        assert weight[mask].min() >= weight[~mask].max()
    cut = masks.select(layers_of(m), 0.7, scope)
    assert all(torch.equal(layer.mask, one) for layer, one in zip(layers_of(m), cut, strict=True))
    with torch.no_grad():
        layers_of(m)[0].weight[0] = math.nan
    with pytest.raises(ValueError, match="no NaN"):
        masks.global_magnitude(m, 0.7, scope)


def test_accounting_is_exact_and_counts_weights() -> None:
    m = model("filter")
    layers_of(m)[0].set_mask(torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]).view(8, 1, 1, 1))
    total = 8 * 27 + 6 * 36 + 24
    assert masks.count(m) == (total - 2 * 27, total)
    assert masks.sparsity(m) == 1 - (total - 54) / total


def test_one_shot_pruning_at_a_sparsity_is_that_sparsity() -> None:
    m = model()
    masks.global_magnitude(m, 0.7)
    kept, total = masks.count(m)
    assert kept == kept_of(0.7, total)
    assert masks.sparsity(m) == 1 - kept / total


def test_models_without_masks_are_refused() -> None:
    for call in (masks.sparsity, masks.count, lambda m: masks.global_magnitude(m, 0.5)):
        with pytest.raises(ValueError, match=r"model must hold masked layers, got none; csam.convert"):
            call(nn.Linear(3, 3))
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            call("model")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan])
def test_bad_sparsity_is_refused_before_anything_changes(sparsity: float) -> None:
    m = model()
    with pytest.raises(ValueError, match="sparsity"):
        masks.global_magnitude(m, sparsity)
    with pytest.raises(ValueError, match="sparsity"):
        masks.select(layers_of(m), sparsity)
    assert masks.sparsity(m) == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_initial_scores_are_percentile_scaled(granularity: str) -> None:
    layers = layers_of(model(granularity))
    for layer, score in zip(layers, masks.initial_scores(layers, 0.9), strict=True):
        norms = masks.group_norms(layer)
        quantile = torch.quantile(norms.flatten(), 0.9)
        assert_close(score, (norms / quantile).clamp(0, 1))


def set_scores(m: nn.Module, fill: Any) -> None:
    with torch.no_grad():
        for layer in layers_of(m):
            layer.mask_score.copy_(fill(layer))


@given(sparsity=st.floats(0, 0.999), scope=st.sampled_from(["global", "layer"]), levels=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_select_keeps_the_top_and_the_exact_count(sparsity: float, scope: str, levels: int) -> None:
    """Scores on a few levels, 0 and 1 among them, so that the cut often meets a pile of ties."""
    torch.manual_seed(levels)
    m = model()
    set_scores(m, lambda layer: torch.randint(0, levels + 1, layer.mask.shape) / levels)
    cut = masks.select(layers_of(m), sparsity, scope)
    parts = [[i] for i in range(3)] if scope == "layer" else [[0, 1, 2]]
    for part in parts:
        scores = torch.cat([layers_of(m)[i].mask_score.flatten() for i in part])
        mask = torch.cat([cut[i].flatten() for i in part])
        assert mask.dtype == torch.bool
        n = mask.numel()
        assert int(mask.sum()) - (1 - sparsity) * n < 1 + 1e-6
        assert int(mask.sum()) >= (1 - sparsity) * n - 1e-6
        if mask.any() and not mask.all():
            assert scores[mask].min() >= scores[~mask].max()


@pytest.mark.parametrize("level", [0.0, 1.0], ids=["all-zero", "all-one"])
def test_a_cut_through_a_pile_keeps_the_relatively_largest_weights(level: float) -> None:
    m = model()
    set_scores(m, lambda layer: torch.full(layer.mask.shape, level))
    cut = torch.cat([t.flatten() for t in masks.select(layers_of(m), 0.9)])
    relative = torch.cat([t.flatten() for t in masks.relative_magnitudes(layers_of(m))])
    assert relative[cut].min() >= relative[~cut].max()
    assert all(bool(t.any()) for t in masks.select(layers_of(m), 0.9))


def test_select_away_from_piles_is_plain_top_k() -> None:
    m = model()
    set_scores(m, lambda layer: torch.rand(layer.mask.shape))
    cut = torch.cat([t.flatten() for t in masks.select(layers_of(m), 0.6)])
    flat = torch.cat([layer.mask_score.flatten() for layer in layers_of(m)])
    expected = torch.zeros_like(cut)
    expected[flat.topk(kept_of(0.6, flat.numel())).indices] = True
    assert torch.equal(cut, expected)


def test_nan_scores_are_refused() -> None:
    m = model()
    set_scores(m, lambda layer: torch.full(layer.mask.shape, torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        masks.select(layers_of(m), 0.5)

"""Scikit-learn's handwritten digits: 1,797 images of 1x8x8, the data set that needs no download."""

from __future__ import annotations

import numpy as np
import torch

from csam.data.dataset import Dataset, balanced_order

TEST_IMAGES = 360
SPLIT_SEED = 0


def load() -> Dataset:
    """1,437 training and 360 test images, stratified, always the same; pixel v of 0..16 becomes round(v*255/16).

    Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998), as scikit-learn ships it.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    y = torch.from_numpy(bunch.target.astype(np.int64))
    order = balanced_order(y, SPLIT_SEED)
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:].sort().values
    return Dataset("digits", [str(digit) for digit in range(10)], x[train], y[train], x[test], y[test])

"""What every loader returns, and how a part of it is chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Images as bytes, with their labels.

    `train_x`, `test_x`: uint8 [N, C, H, W]; `train_y`, `test_y`: int64 [N], indices into `classes`.
    """

    name: str
    classes: list[str]
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        return self.train_x.shape[1]

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> Dataset:
        """The first `train` and `test` images in `balanced_order`; None keeps a split as it is.

        Raises:
            ValueError: fewer than one image, or more than there are.
        """
        chosen_train = choose("train_subset", self.train_y, train, seed)
        chosen_test = choose("test_subset", self.test_y, test, seed)
        return replace(
            self,
            train_x=self.train_x[chosen_train],
            train_y=self.train_y[chosen_train],
            test_x=self.test_x[chosen_test],
            test_y=self.test_y[chosen_test],
        )


def to_unit(x: Tensor) -> Tensor:
    """x / 255: uint8 pixels of any shape -> float32 in [0, 1].

    Raises:
        TypeError: x is no tensor, or not uint8 (it may already be in [0, 1]).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of uint8 pixels, got {type(x).__name__}")
    if x.dtype != torch.uint8:
        raise TypeError(f"x must be uint8 pixels, got {x.dtype}")
    x = x.to(torch.float32)
    return x.div_(x.new_tensor(255))  # by a plain number CUDA would multiply with its reciprocal


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A permutation of range(N), int64 [N], of which every beginning is stratified.

    Each class is shuffled on its own; its j-th image of n goes to position (j + 1/2) / n of the whole. The first
    m images then hold a class of share p, of K classes, within (1 + p(K - 2)) / 2 images of p*m: less than one
    where the classes are of equal size.
    """
    generator = torch.Generator().manual_seed(seed)
    indices, positions = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        indices.append(members[torch.randperm(len(members), generator=generator)])
        positions.append((torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members))
    if not indices:
        return torch.empty(0, dtype=torch.int64)
    return torch.cat(indices)[torch.cat(positions).argsort(stable=True)]


def evenly_spaced(total: int, count: int | None) -> list[int]:
    """`count` indices spread evenly over range(total), beginning with 0; all of them for None.

    Raises ValueError if there are fewer.
    """
    if count is None:
        return list(range(total))
    if not 1 <= count <= total:
        raise ValueError(f"images must be in [1, {total}], the size of the test set, got {count}")
    return [i * total // count for i in range(count)]


def choose(argument: str, labels: Tensor, count: int | None, seed: int) -> Tensor:
    """Indices of the `count` images to keep, int64; all of them, in order, for None."""
    check_subset(argument, count)
    if count is None:
        return torch.arange(len(labels))
    if count > len(labels):
        raise ValueError(f"{argument} must be <= {len(labels)}, the images there are, got {count}")
    return balanced_order(labels, seed)[:count]


def check_subset(argument: str, count: int | None) -> None:
    if count is None:
        return
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{argument} must be an int or None, got {count!r}")
    if count < 1:
        raise ValueError(f"{argument} must be >= 1, got {count}")

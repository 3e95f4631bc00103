"""Which images a run trains, tests and verifies on: folds of classes, some of them held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .images import LabelledImages, split_images

FOLD_SEED = 0  # all runs of a study, whatever their seed, hold out the same classes
MOST_VERIFIED = 10_000  # images: their 50 million pairs take 4 GB


class ProtocolError(ValueError):
    """These images, losses and network can't be put through the experiment as asked."""


@dataclass(frozen=True)
class Split:
    """Which images a run trains, tests and verifies on: indices, and labels of its own.

    Attributes:
        num_classes: C, the classes trained on; their labels are 0 to C - 1.
        train, train_labels: images trained on.
        test, test_labels: other images of the same classes.
        held_out, held_out_labels: every image of the classes never trained on.
    """

    num_classes: int
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def deal_folds(data: LabelledImages, hold_out: str, count: int) -> list[list[int]]:
    """Deal the classes, or whole groups of them, into folds: class indices, ascending.

    Raises:
        ProtocolError: there are too few to fill the folds, or a fold can't be verified on.
    """
    units = data.classes if hold_out == "classes" else tuple(dict.fromkeys(data.groups))
    if len(units) < count:
        what = hold_out if len(units) > 1 else hold_out[:-1]
        raise ProtocolError(
            f"--folds {count} with {len(units)} {what} to deal: use fewer folds"
            + " or --hold-out classes" * (hold_out == "groups")
        )
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(FOLD_SEED))
    fold_of = {units[unit]: position % count for position, unit in enumerate(order.tolist())}
    keys = data.classes if hold_out == "classes" else data.groups
    folds = [[c for c, key in enumerate(keys) if fold_of[key] == fold] for fold in range(count)]
    images = data.labels.bincount(minlength=len(data.classes)).tolist()
    for fold in folds:
        if len(fold) < 2:
            raise ProtocolError(
                f"--folds {count}: {data.classes[fold[0]]!r} is alone in its fold, without a class"
                " to be told from; use fewer folds"
            )
        held_out = sum(images[c] for c in fold)
        if held_out > MOST_VERIFIED:
            raise ProtocolError(
                f"--folds {count}: a fold holds {held_out:,} images, and all pairs are compared, of"
                f" {MOST_VERIFIED:,} at most; use more folds, or fewer images"
            )
    return folds


def split_run(
    labels: Tensor, folds: Sequence[Sequence[int]], fold: int, test_share: float, seed: int
) -> Split:
    """Split the images for the run of a seed that holds out a fold.

    The seed decides which images of a class are left out of training, whatever the fold.
    """
    held_out = torch.zeros(int(labels.max()) + 1, dtype=torch.bool)
    held_out[list(folds[fold])] = True
    renumbered = torch.where(held_out, held_out.cumsum(0), (~held_out).cumsum(0)) - 1
    train, test = split_images(labels, test_share, seed)
    train, test = train[~held_out[labels[train]]], test[~held_out[labels[test]]]
    unseen = held_out[labels].nonzero()[:, 0]
    return Split(
        num_classes=int((~held_out).sum()),
        train=train,
        train_labels=renumbered[labels[train]],
        test=test,
        test_labels=renumbered[labels[test]],
        held_out=unseen,
        held_out_labels=renumbered[labels[unseen]],
    )

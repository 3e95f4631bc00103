"""Images of digits: scikit-learn's, and MNIST from its IDX files."""

from __future__ import annotations

import dataclasses
import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

NUM_CLASSES = 10


class DataError(ValueError):
    """The images can't be used: missing, damaged, or not what they should be."""


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1] as (count, 1, height, width) fp32, labels as (count,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def limited(self, count: int) -> Digits:
        """Keep the first `count` training images and the whole test set."""
        return dataclasses.replace(
            self, train_images=self.train_images[:count], train_labels=self.train_labels[:count]
        )

    def to(self, device: torch.device) -> Digits:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Digits(**{name: tensor.to(device) for name, tensor in fields.items()})


def load_scikit_learn_digits() -> Digits:
    """Load the 1,797 8x8 digits inside scikit-learn: a fixed, stratified 75 % / 25 % split."""
    from sklearn.datasets import load_digits  # MNIST does without scikit-learn
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16, (1797,)
    images = torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8)
    train, test = train_test_split(
        np.arange(len(images)), test_size=0.25, stratify=labels, random_state=0
    )
    targets = torch.from_numpy(labels).long()
    return Digits(images[train], targets[train], images[test], targets[test])


def load_mnist(root: Path) -> Digits:
    """Load MNIST from the IDX files in `root`, or in `root/MNIST/raw` where torchvision puts them.

    Raises:
        DataError: a file is missing, damaged or not MNIST. All four are located before any is read.
    """
    paths = locate_mnist(root)
    tensors = []
    for image_path, label_path in (paths[:2], paths[2:]):
        images, labels = read_idx(image_path, dimensions=3), read_idx(label_path, dimensions=1)
        if len(images) < 2 or images.shape[1:] != (28, 28):
            raise DataError(
                f"{image_path}: expected 2 or more images of 28 x 28, got {images.shape}"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{image_path} holds {len(images)} images but {label_path} {len(labels)} labels"
            )
        if labels.max() >= NUM_CLASSES:
            raise DataError(f"{label_path}: expected labels 0 to 9, got {labels.max()}")
        tensors.append(torch.from_numpy(images).float().div_(255).unsqueeze(1))
        tensors.append(torch.from_numpy(labels).long())
    return Digits(*tensors)


def locate_mnist(root: Path) -> list[Path]:
    """Find training images, training labels, test images and test labels, in this order."""
    stems = [
        f"{split}-{kind}"
        for split in ("train", "t10k")
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    ]
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the one that holds MNIST's four IDX files")
    folders = [root, root / "MNIST" / "raw"]
    found = {stem: find_idx(stem, folders) for stem in stems}
    missing = [stem for stem, path in found.items() if path is None]
    if missing:
        raise DataError(
            f"missing {', '.join(missing)} (also looked for with '.idx' in place of "
            f"'-idx', and each with '.gz') in {' and '.join(str(f.absolute()) for f in folders)}; "
            "point --root at the folder that holds MNIST's four IDX files"
        )
    return [path for path in found.values() if path is not None]


def find_idx(stem: str, folders: Sequence[Path]) -> Path | None:
    """Return the first file that holds `stem`: dashed or dotted, raw or gzip, folder by folder."""
    names = [
        name + suffix for name in (stem, stem.replace("-idx", ".idx")) for suffix in ("", ".gz")
    ]
    candidates = (folder / name for folder in folders for name in names)
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a raw or gzip IDX file of unsigned bytes and check its magic number and length.

    Raises:
        DataError: the file can't be read, or is not an intact IDX file of `dimensions` dimensions.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":  # by content: some download tools unpack but keep ".gz"
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: can't be read ({error})") from error
    header_size = 4 + 4 * dimensions
    if len(content) < header_size:
        raise DataError(f"{path}: {len(content)} bytes, too short for an IDX header")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header_size])
    expected_magic = 0x0800 + dimensions  # 0x08: unsigned bytes
    if magic != expected_magic:
        raise DataError(f"{path}: magic number 0x{magic:08x}, expected 0x{expected_magic:08x}")
    size, expected_size = len(content) - header_size, math.prod(shape)
    if size != expected_size:
        raise DataError(
            f"{path}: {size} bytes of data, but its header announces {expected_size} "
            f"({' x '.join(map(str, shape))}); download it again"
        )
    return np.frombuffer(bytearray(content), np.uint8, offset=header_size).reshape(shape)


def load_data(root: Path, limit: int | None, device: torch.device) -> Digits:
    """Load MNIST with pixels in [-1, 1], as the article has them.

    Raises:
        DataError: the files are missing, damaged or not MNIST's, or `limit` is above their number.
    """
    data = load_mnist(root)
    if limit is not None:
        if limit > len(data.train_images):
            raise DataError(
                f"--limit {limit}: there are only {len(data.train_images)} training images"
            )
        data = data.limited(limit)
    for images in (data.train_images, data.test_images):
        images.sub_(0.5).div_(0.5)
    return data.to(device)

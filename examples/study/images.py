"""Images in folders, one folder for each class, as tensors."""

from __future__ import annotations

import os
import re
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

try:
    from PIL import Image, ImageOps
    from tqdm import tqdm
except ImportError as missing:
    sys.exit(f"error: {missing}; the examples need the extra: pip install '.[examples]'")

SUFFIXES = (".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".bmp", ".webp", ".tif", ".tiff")
# By content, whatever the name says; Pillow has formats that start other programs.
FORMATS = ("PNG", "JPEG", "PPM", "BMP", "WEBP", "TIFF")
GREY_MODES = ("1", "L", "LA", "La")
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
# What Pillow's decoders raise for damaged files.
UNREADABLE = (
    OSError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """The images can't be used: missing, damaged, or too few to train and test on."""


@dataclass(frozen=True)
class LabelledImages:
    """Square images of known classes.

    Attributes:
        images: (count, channels, size, size) fp32 in [-1, 1], in the order of their classes.
        labels: (count,) int64, indices into `classes`.
        classes: path of each class's folder below the root, in natural order: s2 before s10.
        groups: path of the folder that holds each class's folder, "." for the root.
        files: where each image came from.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    files: tuple[Path, ...]


def load_folder(root: Path, size: int, *, show_progress: bool = False) -> LabelledImages:
    """Load every image of a folder that has a folder for each class.

    A class is a folder, at any depth below `root`, that directly holds images. Hidden files and
    folders, other files, and images in `root` itself are passed over; a folder that holds neither
    images nor folders is an error. Links are followed.

    Images are turned upright as their EXIF data says, put on white where they are transparent, and
    squeezed into a square, antialiased. They have one channel if every file is grey or
    black-and-white, else three.

    Args:
        root: the folder.
        size: height and width of the images returned.
        show_progress: show a progress bar.

    Raises:
        ImageError: there are no two classes with two images each, or a file can't be read.
    """
    files_of_class = find_classes(root)
    files = [file for files in files_of_class.values() for file in files]
    bar = tqdm(files, desc="reading", unit="image", disable=not show_progress)
    pixels = [read_image(file, size) for file in bar]
    channels = max(len(image) for image in pixels)
    images = torch.empty(len(files), channels, size, size)
    for row, image in zip(images, pixels, strict=True):
        row.copy_(torch.from_numpy(image))  # grey among colours: the same in each channel
    counts = torch.tensor([len(files) for files in files_of_class.values()])
    return LabelledImages(
        images=images.div_(127.5).sub_(1),
        labels=torch.arange(len(counts)).repeat_interleave(counts),
        classes=tuple(files_of_class),
        groups=tuple(Path(name).parent.as_posix() for name in files_of_class),
        files=tuple(files),
    )


def split_images(labels: Tensor, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draw the images to test on: a share of each class, at least one image and never all.

    Args:
        labels: (count,) int64, two or more images of each class.
        test_share: the share, rounded to whole images in each class.
        seed: of the draw.

    Returns:
        Indices of the images to train on and of those to test on, ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    counts = labels.bincount()
    for rows in labels.argsort(stable=True).split(counts[counts > 0].tolist()):
        count = min(max(round(test_share * len(rows)), 1), len(rows) - 1)
        is_test[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    return (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]


def find_classes(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, classes and files in natural order.

    Raises:
        ImageError: there is no such folder, it can't be listed, a folder in it is met twice or has
            no images, it holds no two classes, or a class has a single image.
    """
    if not root.exists():
        raise ImageError(f"{root}: no such folder")
    if not root.is_dir():
        raise ImageError(f"{root} is a file; name the folder that holds a folder for each class")
    found: dict[str, list[Path]] = {}
    seen: dict[str, str] = {}  # links can lead to a folder again, or round in a circle
    for folder, subfolders, names in os.walk(root, onerror=refuse_folder, followlinks=True):
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise ImageError(f"{folder} and {first} are the same folder; remove the link")
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        images = [name for name in names if is_image(name)]
        if not images and not subfolders and os.path.realpath(folder) != os.path.realpath(root):
            raise ImageError(
                f"{folder}: no {', '.join(SUFFIXES)} files; convert what is there to one of these, "
                "or remove the folder"
            )
        if images:
            name = Path(folder).relative_to(root).as_posix()
            found[name] = [Path(folder, image) for image in sorted(images, key=natural_key)]
    loose = found.pop(".", None)
    if not found:
        where = "all its images lie directly in it" if loose else f"no {', '.join(SUFFIXES)} files"
        raise ImageError(f"{root}: {where}; put the images of each class into a folder of its own")
    if len(found) == 1:
        raise ImageError(f"{root}: only one class, {next(iter(found))!r}; nothing to tell apart")
    single = [name for name, files in found.items() if len(files) < 2]
    if single:
        named = ", ".join(map(repr, sorted(single, key=natural_key)[:3]))
        more = f" and {len(single) - 3} more" * (len(single) > 3)
        raise ImageError(
            f"{root}: a single image in {named}{more}; a class needs one to train on and one to "
            "test on: add images, or remove the folder"
        )
    return {name: found[name] for name in sorted(found, key=natural_key)}


def refuse_folder(error: OSError) -> NoReturn:
    raise ImageError(f"{error.filename}: can't be listed ({error.strerror})") from error


def is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def natural_key(path: str) -> tuple[list[list[str | int]], str]:
    """Sort by folders, numbers by value; of s1 and s01 the order is fixed, too."""
    parts = [
        [int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", part)]
        for part in path.split("/")
    ]  # text and numbers take turns, so that like is compared with like
    return parts, path


def read_image(path: Path, size: int) -> np.ndarray:
    """Read an image as (1 or 3, size, size) bytes.

    Raises:
        ImageError: the file can't be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities that don't keep Pillow from reading
        try:
            with Image.open(path, formats=FORMATS) as image:
                return square_pixels(image, size)
        except UNREADABLE as error:
            raise ImageError(
                f"{path}: can't be read as an image ({error}); remove or replace it"
            ) from error


def square_pixels(opened: Image.Image, size: int) -> np.ndarray:
    image: Image.Image = ImageOps.exif_transpose(opened)
    # Pillow has a mode of its own for 16 bits of grey in some formats and takes 32 bits in others.
    sixteen_bits = image.mode in SIXTEEN_BIT_MODES or (
        image.mode == "I" and opened.format in ("PNG", "PPM")
    )
    if sixteen_bits:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"its {image.mode} pixels have no known range; 8 or 16 bits have")
    grey = image.mode in GREY_MODES
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("L" if grey else "RGB").resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image)  # a copy, for an array of Pillow's can't be written to
    return pixels[None] if grey else pixels.transpose(2, 0, 1)

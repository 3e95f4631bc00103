"""A folder of images is read as it is, or refused before anything is trained."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from study import images as study_images

load_folder, split_images = study_images.load_folder, study_images.split_images
ImageError = study_images.ImageError
SETTINGS = settings(max_examples=50, derandomize=True, deadline=None, database=None)


def write(path: Path, pixels: Any, **options: Any) -> Path:
    """Write an array, or a Pillow image, to a file in a folder made for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def flat(level: int | tuple[int, int, int], size: int = 8) -> np.ndarray:
    """An image of a single grey, or a single colour."""
    shape = (size, size) if isinstance(level, int) else (size, size, 3)
    return np.full(shape, level, np.uint8)


def fill(root: Path, *classes: str, count: int = 2) -> Path:
    """Write `count` grey images into each class, the k-th image of the i-th with level 10 i + k."""
    for i, name in enumerate(classes):
        for k in range(count):
            write(root / name / f"{k}.png", flat(10 * i + k))
    return root


def pixel(image: torch.Tensor) -> Any:
    """The first pixel as bytes: a number if grey, else red, green and blue."""
    values = ((image[:, 0, 0] + 1) * 127.5).round().int().tolist()
    return values[0] if len(values) == 1 else tuple(values)


def test_what_is_loaded(tmp_path: Path) -> None:
    fill(tmp_path, "b", "a", count=3)
    data = load_folder(tmp_path, 5)
    assert data.images.shape == (6, 1, 5, 5)
    assert data.images.dtype == torch.float32
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.labels.dtype == torch.int64
    assert data.classes == ("a", "b")
    assert data.groups == (".", ".")
    assert [pixel(image) for image in data.images] == [10, 11, 12, 0, 1, 2]
    assert data.files == tuple(tmp_path / name / f"{k}.png" for name in "ab" for k in range(3))


def test_black_is_minus_one_and_white_is_one(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    write(tmp_path / "b" / "0.png", flat(0))
    write(tmp_path / "b" / "1.png", flat(255))
    black, white = load_folder(tmp_path, 4).images[2:]
    assert black.eq(-1).all()
    assert white.eq(1).all()


def test_every_suffix_counts_in_any_case(tmp_path: Path) -> None:
    suffixes = ("png", "jpg", "JPEG", "pgm", "ppm", "BMP", "webp", "tif", "Tiff")
    fill(tmp_path, "z")
    for suffix in suffixes:
        options = {"format": "PPM"} if suffix in ("pgm", "ppm") else {}
        write(tmp_path / "a" / f"{suffix}.{suffix}", flat(90), **options)
    data = load_folder(tmp_path, 8)
    assert (data.labels == 0).sum() == len(suffixes)
    assert {file.suffix[1:] for file in data.files[: len(suffixes)]} == set(suffixes)
    for image in data.images[: len(suffixes)]:
        grey = pixel(image)
        assert all(abs(level - 90) <= 3 for level in grey)  # lossy formats among them; WebP is RGB


@pytest.mark.parametrize("position", [0, 3])
def test_one_colour_image_makes_all_rgb(tmp_path: Path, position: int) -> None:
    fill(tmp_path, "a", "b")
    assert load_folder(tmp_path, 8).images.shape == (4, 1, 8, 8)
    file = load_folder(tmp_path, 8).files[position]
    write(file, flat((200, 100, 50)))
    data = load_folder(tmp_path, 8)
    assert data.images.shape == (4, 3, 8, 8)
    expected: list[Any] = [(level, level, level) for level in (0, 1, 10, 11)]
    expected[position] = (200, 100, 50)
    assert [pixel(image) for image in data.images] == expected


def test_black_and_white_is_grey_and_antialiased(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    stripes = np.zeros((32, 32), bool)
    stripes[:, ::2] = True
    for k in range(2):
        path = write(tmp_path / "b" / f"{k}.png", Image.fromarray(stripes).convert("1"))
        with Image.open(path) as image:
            assert image.mode == "1"
    data = load_folder(tmp_path, 8)
    assert data.images.shape == (4, 1, 8, 8)
    # Without antialiasing a stripe is hit or missed: black or white, never the mean of both.
    assert data.images[2, 0, :, 1:-1].abs().max() < 0.15


def test_colours_and_axes_stay_in_place(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    picture = np.zeros((6, 6, 3), np.uint8)
    picture[0, :, 0] = 255  # red above
    picture[:, 0, 2] = 255  # blue at the left
    for k in range(2):
        write(tmp_path / "b" / f"{k}.png", picture)
    image = load_folder(tmp_path, 6).images[2]
    assert torch.equal(image, torch.from_numpy(picture).permute(2, 0, 1).float() / 127.5 - 1)


def test_oblong_images_become_squares(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    for k in range(2):
        write(tmp_path / "b" / f"{k}.png", np.full((10, 30), 70, np.uint8))
    assert pixel(load_folder(tmp_path, 12).images[3]) == 70


@pytest.mark.parametrize("suffix", ["png", "pgm", "tif"])
def test_sixteen_bits_of_grey_keep_their_range(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path, "a")
    for k, level in enumerate((0, 32768, 65535)):
        path = tmp_path / "b" / f"{k}.{suffix}"
        if suffix == "pgm":
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"P5 2 2 65535\n" + struct.pack(">4H", *[level] * 4))
        else:
            write(path, np.full((2, 2), level, np.uint16))
    data = load_folder(tmp_path, 4)
    assert data.images.shape[1] == 1
    assert [pixel(image) for image in data.images[2:]] == [0, 128, 255]


@pytest.mark.parametrize("grey", [False, True], ids=["rgba", "la"])
def test_transparent_is_white(tmp_path: Path, grey: bool) -> None:
    fill(tmp_path, "a")
    for k, opacity in enumerate((0, 255)):
        picture = np.zeros((4, 4, 2 if grey else 4), np.uint8)
        picture[..., -1] = opacity
        write(tmp_path / "b" / f"{k}.png", picture)
    data = load_folder(tmp_path, 4)
    assert data.images.shape[1] == (1 if grey else 3)
    assert data.images[2].eq(1).all()
    assert data.images[3].eq(-1).all()


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    fill(tmp_path, "a")
    picture = np.zeros((32, 32), np.uint8)
    picture[:16] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    for k in range(2):
        write(tmp_path / "b" / f"{k}.jpg", picture, exif=exif)
    image = load_folder(tmp_path, 32).images[2, 0]
    assert image[:12].mean() < -0.9
    assert image[20:].mean() > 0.9


def test_order_is_natural(tmp_path: Path) -> None:
    names = ["s1", "s2", "s10", "s10a", "t/2/x", "t/10/x", "t2/1", "t10/1"]
    fill(tmp_path, *reversed(names))
    for k in (10, 9):
        write(tmp_path / "s1" / f"{k}.png", flat(k))
    data = load_folder(tmp_path, 8)
    assert list(data.classes) == names
    assert [file.name for file in data.files[:4]] == ["0.png", "1.png", "9.png", "10.png"]


def test_equal_numbers_have_an_order(tmp_path: Path) -> None:
    fill(tmp_path, "s1", "s01", "s001")
    assert load_folder(tmp_path, 8).classes == ("s001", "s01", "s1")


def test_group_is_the_folder_above(tmp_path: Path) -> None:
    fill(tmp_path, "Greek/alpha", "Greek/beta", "deep/er/Latin/a", "loose")
    data = load_folder(tmp_path, 8)
    by_class = dict(zip(data.classes, data.groups, strict=True))
    assert by_class == {
        "Greek/alpha": "Greek", "Greek/beta": "Greek", "deep/er/Latin/a": "deep/er/Latin",
        "loose": ".",
    }  # fmt: skip


def test_a_class_may_lie_in_a_class(tmp_path: Path) -> None:
    fill(tmp_path, "a", "a/b")
    data = load_folder(tmp_path, 8)
    assert data.classes == ("a", "a/b")
    assert [pixel(image) for image in data.images] == [0, 1, 10, 11]


def test_relative_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a", "g/b")
    monkeypatch.chdir(tmp_path)
    data = load_folder(Path(), 8)
    assert data.classes == ("a", "g/b")
    assert data.groups == (".", "g")


def test_hidden_and_other_files_are_passed_over(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b", ".thumbnails", "b/.cache")
    write(tmp_path / "preview.png", flat(1))
    write(tmp_path / "a" / ".hidden.png", flat(1))
    (tmp_path / "a" / "._0.png").write_bytes(b"not an image")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "README").write_text("not an image")
    data = load_folder(tmp_path, 8)
    assert data.classes == ("a", "b")
    assert len(data.images) == 4


@pytest.mark.parametrize("names", [[], ["0.gif", "1.gif"]], ids=["empty", "other format"])
def test_a_folder_without_images_is_refused(tmp_path: Path, names: list[str]) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "c").mkdir()
    for name in names:
        (tmp_path / "c" / name).write_bytes(b"GIF89a")
    with pytest.raises(ImageError, match=r"c: no \.png, .* files; convert what is there"):
        load_folder(tmp_path, 8)


def test_links_are_followed(tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", "a", "b")
    root = tmp_path / "root"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert load_folder(root, 8).classes == ("linked/a", "linked/b")


@pytest.mark.parametrize("target", [".", "a"], ids=["circle", "twice"])
def test_a_folder_met_twice_is_refused(tmp_path: Path, target: str) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "b" / "link").symlink_to((tmp_path / target).resolve(), target_is_directory=True)
    with pytest.raises(ImageError, match="are the same folder; remove the link"):
        load_folder(tmp_path, 8)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere: no such folder$"):
        load_folder(tmp_path / "nowhere", 8)


def test_file_for_folder_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png", flat(0))
    with pytest.raises(ImageError, match=r"a\.png is a file; name the folder that holds"):
        load_folder(path, 8)


def test_no_images_are_refused_with_the_suffixes_that_count(tmp_path: Path) -> None:
    (tmp_path / "0.gif").write_bytes(b"GIF89a")
    with pytest.raises(
        ImageError, match=r": no \.png, \.jpg, \.jpeg, .*\.tiff files; put"
    ) as caught:
        load_folder(tmp_path, 8)
    assert str(tmp_path) in str(caught.value)


def test_images_without_folders_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, ".")
    with pytest.raises(ImageError, match="all its images lie directly in it; put the images of"):
        load_folder(tmp_path, 8)


def test_one_class_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "only")
    with pytest.raises(ImageError, match="only one class, 'only'"):
        load_folder(tmp_path, 8)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["s2"], "a single image in 's2'; a class needs"),
        (["s10", "s2", "s3"], "a single image in 's2', 's3', 's10'; a class"),
        (["s10", "s2", "s3", "s30", "s4"], "a single image in 's2', 's3', 's4' and 2 more; a"),
    ],
)
def test_single_images_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    fill(tmp_path, "a", "b")
    fill(tmp_path, *names, count=1)
    with pytest.raises(ImageError, match=message):
        load_folder(tmp_path, 8)


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid"), reason="needs POSIX permissions")
def test_folder_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "a", "b")
    scandir = os.scandir  # the superuser may list what is forbidden, so permissions don't do

    def forbidden(path: Any) -> Any:
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(ImageError, match=r"b: can't be listed \(Permission denied\)"):
        load_folder(tmp_path, 8)


def encoded(form: str, size: int = 40) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, form)
    return stream.getvalue()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def huge_png(side: int) -> bytes:
    """A PNG whose header announces side x side pixels, and which has none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


BROKEN = {
    "empty.png": b"",
    "text.png": b"this is text",
    "cut.png": encoded("PNG")[:-600],
    "cut.jpg": encoded("JPEG")[:-600],
    "cut.ppm": encoded("PPM")[:-600],
    "cut.bmp": encoded("BMP")[:-600],
    "cut.tif": encoded("TIFF")[:-600],
    "cut.webp": encoded("WEBP")[:-600],
    "checksum.png": encoded("PNG")[:60] + b"\xff\xff" + encoded("PNG")[62:],
    "header.pgm": b"P5 -3 nothing",
    "bomb.png": huge_png(60_000),
    "float.tif": b"",  # written below: pixels without a known range
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_broken_image_is_named(tmp_path: Path, name: str) -> None:
    fill(tmp_path, "a", "b")
    path = tmp_path / "b" / name
    path.write_bytes(BROKEN[name])
    if name == "float.tif":
        write(path, np.zeros((4, 4), np.float32))
    with pytest.raises(
        ImageError, match=r"can't be read as an image \(.+\); remove or rep"
    ) as caught:
        load_folder(tmp_path, 8)
    assert str(path) in str(caught.value)


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    fill(tmp_path, "a", "b")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match=r"gone\.png: can't be read as an image \(.*No such file"):
        load_folder(tmp_path, 8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "PPM", "BMP", "WEBP", "TIFF"])
def test_damage_is_an_image_error_or_harmless(tmp_path: Path, form: str) -> None:
    """Whatever bytes are hit, nothing else than ImageError comes out."""
    generator = np.random.default_rng(0)
    whole = np.frombuffer(encoded(form, 12), np.uint8)
    path, refused = tmp_path / "x.png", 0
    for _ in range(60):
        damaged = whole.copy()
        hit = generator.integers(0, min(len(whole), 200), 3)
        damaged[hit] = generator.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            assert study_images.read_image(path, 8).shape in ((3, 8, 8), (1, 8, 8))
        except ImageError:
            refused += 1
    assert refused > 0


def test_warnings_of_pillow_are_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice this many pixels are a DecompressionBombError, less than that is a warning."""
    fill(tmp_path, "a", "b")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(tmp_path / "a" / "0.png").close()
    assert len(load_folder(tmp_path, 8).images) == 4
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(ImageError, match="decompression bomb"):
        load_folder(tmp_path, 8)


def test_progress_is_shown_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(tmp_path, "a", "b")
    load_folder(tmp_path, 8)
    assert capsys.readouterr().err == ""
    load_folder(tmp_path, 8, show_progress=True)
    assert "4/4" in capsys.readouterr().err


@SETTINGS
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=8),
    share=st.floats(0.001, 0.9),
    seed=st.integers(0, 2**31),
    shuffled=st.booleans(),
)
def test_split_takes_a_share_of_each_class(
    counts: list[int], share: float, seed: int, shuffled: bool
) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if shuffled:
        labels = labels[torch.randperm(len(labels))]
    train, test = split_images(labels, share, seed)
    both = torch.cat([train, test])
    assert both.sort().values.equal(torch.arange(len(labels)))
    assert train.equal(train.sort().values)
    assert test.equal(test.sort().values)
    for label, count in enumerate(counts):
        tested = int((labels[test] == label).sum())
        assert 1 <= tested <= count - 1
        assert abs(tested - share * count) <= 1


def test_split_is_drawn_by_the_seed() -> None:
    labels = torch.arange(5).repeat_interleave(20)
    drawn = [split_images(labels, 0.25, seed)[1] for seed in (0, 0, 1)]
    assert drawn[0].equal(drawn[1])
    assert not drawn[0].equal(drawn[2])
    assert labels[drawn[0]].bincount().tolist() == [5] * 5
    # Not the same places in each class, nor the first ones.
    assert len({tuple(places) for places in (drawn[0] % 20).view(5, 5).tolist()}) == 5

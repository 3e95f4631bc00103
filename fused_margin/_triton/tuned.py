"""Tiles that were tuned on this machine: a JSON file in the user's cache directory.

Read once per process, written atomically. Without the file, or without an entry for a device,
operand type, dtypes and range of N and D, the defaults of `tiles` stand.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
import triton

from fused_margin import _warnings
from fused_margin._triton.tiles import AXES, LIMITS, Tile, Tiles

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

VERSION = 4  # of the file's layout


def cache_file() -> Path:
    """``tiles.json`` in FUSED_MARGIN_CACHE_DIR, else in the user's cache directory."""
    directory = os.environ.get("FUSED_MARGIN_CACHE_DIR")
    if directory:
        return Path(directory) / "tiles.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fused_margin" / "tiles.json"


def key(device: str, operands: str, x: torch.dtype, w: torch.dtype, num_rows: int, dim: int) -> str:
    """What an entry is for.

    Args:
        device: its name. operands: one of `tiles.OPERANDS`.
        x: dtype of the embeddings. w: dtype of the weights.
        num_rows: N, of which the range counts. dim: D, likewise.
    """
    x_name, w_name = (str(dtype).removeprefix("torch.") for dtype in (x, w))
    rows, columns = (max(16, triton.next_power_of_2(size)) for size in (num_rows, dim))
    return (
        f"{device}, triton {triton.__version__}, {operands}, x {x_name}, w {w_name},"
        f" N <= {rows}, D <= {columns}"
    )


class UnusableFileError(ValueError):
    """The cache file is there and can't be used."""


def _read() -> dict[str, Any]:
    """All entries.

    Raises:
        UnusableFileError: the file is another user's, unreadable, or not what `save` writes.
    """
    try:
        file = cache_file()
        owner, text = file.stat().st_uid, file.read_text()
    except FileNotFoundError:
        return {}
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise UnusableFileError(f"saved tiles can't be read ({error})") from error
    if hasattr(os, "getuid") and owner != os.getuid():
        raise UnusableFileError(f"{file} belongs to another user")
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            raise UnusableFileError(f"{file} was written by another version of fused_margin")
        entries = dict(content["entries"])
        for entry in entries.values():
            _tiles(entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UnusableFileError):
            raise
        raise UnusableFileError(
            f"{file} can't be read ({type(error).__name__}: {error})"
        ) from error
    return entries


@functools.cache
def _entries() -> dict[str, Any]:
    try:
        return _read()
    except UnusableFileError as error:
        _warnings.warn(
            f"{error}; the default tiles are used. Remove the file, or name a directory of your own"
            " in FUSED_MARGIN_CACHE_DIR"
        )
        return {}


def _tile(values: list[int]) -> Tile:
    tile = Tile(*values)
    sizes = (tile.n, tile.c, tile.d, tile.num_warps)
    if any(type(size) is not int or size < 1 or size & (size - 1) for size in sizes) or (
        min(sizes[:3]) < 16 or type(tile.num_stages) is not int or tile.num_stages < 1
    ):
        raise ValueError(f"not a tile: {values}")
    return tile


def _tiles(entry: dict[str, Any]) -> Tiles:
    fused = tuple((_tile(w), _tile(x)) for w, x in entry["fused"])
    tiles = {name: _tile(entry[name]) for name in AXES}
    limits = {name: int(entry[name]) for name in LIMITS}
    return Tiles(**tiles, fused=fused, eighths=bool(entry["eighths"]), **limits)


@functools.lru_cache(maxsize=256)  # by what `key` takes: every call of a kernel asks
def load(*call: Any) -> Tiles | None:
    """The tuned tiles for the arguments of `key`, or None."""
    entry = _entries().get(key(*call))
    return None if entry is None else _tiles(entry)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Keep other processes from saving meanwhile, where the system can."""
    if fcntl is None:
        yield
        return
    with open(file.with_suffix(".lock"), "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def save(key: str, tiles: Tiles, about: dict[str, Any]) -> Path:
    """Add an entry to the file, and to this process.

    Args:
        key: see `key`.
        tiles: the tiles.
        about: what else to write down, for people.

    Returns:
        The file.

    Raises:
        UnusableFileError: there is a file that can't be used; it is left alone.
    """
    entry: dict[str, Any] = {name: astuple(getattr(tiles, name)) for name in AXES}
    entry |= {name: getattr(tiles, name) for name in ("eighths", *LIMITS)}
    entry["fused"] = [[astuple(tile) for tile in pair] for pair in tiles.fused]
    file = cache_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(file):
        entries = _read() | {key: entry | {"about": about}}  # others' included
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump({"version": VERSION, "entries": entries}, stream, indent=1)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise
    forget()
    return file


def forget() -> None:
    """Read the file again on the next call."""
    _entries.cache_clear()
    load.cache_clear()

"""Tiles that were tuned on this machine: a JSON file in the user's cache directory.

Read once per process, written atomically. Without the file, or without an entry for a device,
operand type and range of D, the defaults of `configs` stand.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import warnings
from dataclasses import astuple
from pathlib import Path
from typing import Any

import triton

from fused_margin._triton import configs

VERSION = 1  # of the file's layout


def cache_file() -> Path:
    """``tiles.json`` in FUSED_MARGIN_CACHE_DIR, else in the user's cache directory."""
    directory = os.environ.get("FUSED_MARGIN_CACHE_DIR")
    if directory:
        return Path(directory) / "tiles.json"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fused_margin" / "tiles.json"


def key(device: str, operands: str, dim: int) -> str:
    """What an entry is for: device, Triton's version, operand type, range of D."""
    largest = max(16, triton.next_power_of_2(dim))
    return f"{device}, triton {triton.__version__}, {operands}, D <= {largest}"


def _read() -> dict[str, Any]:
    """All entries; a file that can't be used is named in a warning and left alone."""
    file = cache_file()
    try:
        owner, text = file.stat().st_uid, file.read_text()
    except FileNotFoundError:
        return {}
    if hasattr(os, "getuid") and owner != os.getuid():
        warnings.warn(
            f"{file} belongs to another user and is not used; set FUSED_MARGIN_CACHE_DIR to a"
            " directory of your own",
            stacklevel=2,
        )
        return {}
    try:
        content = json.loads(text)
        if content["version"] != VERSION:
            return {}
        entries = content["entries"]
        for entry in entries.values():
            _config(entry)
    except (ValueError, TypeError, KeyError) as error:
        warnings.warn(
            f"{file} can't be read ({type(error).__name__}: {error}) and the default tiles are"
            " used; remove it, and tune again",
            stacklevel=2,
        )
        return {}
    return entries


@functools.cache
def _entries() -> dict[str, Any]:
    return _read()


def _config(entry: dict[str, Any]) -> configs.Config:
    tiles = {
        name: configs.Tile(*entry[name]) for name in ("forward", "gradient", "weight", "embeddings")
    }
    fused = tuple((configs.Tile(*w), configs.Tile(*x)) for w, x in entry["fused"])
    return configs.Config(**tiles, fused=fused)


@functools.lru_cache(maxsize=256)
def load(device: str, operands: str, dim: int) -> configs.Config | None:
    """The tuned tiles, or None."""
    entry = _entries().get(key(device, operands, dim))
    return None if entry is None else _config(entry)


def save(device: str, operands: str, dim: int, config: configs.Config, about: dict) -> Path:
    """Add an entry to the file, and to this process.

    Args:
        device: its name.
        operands: one of `configs.OPERANDS`.
        dim: D.
        config: the tiles.
        about: what else to write down, for people.

    Returns:
        The file.
    """
    entry: dict[str, Any] = {
        name: astuple(getattr(config, name))
        for name in ("forward", "gradient", "weight", "embeddings")
    }
    entry["fused"] = [[astuple(tile) for tile in tiles] for tiles in config.fused]
    file = cache_file()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    entries = _read() | {key(device, operands, dim): entry | {"about": about}}  # others' included
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".part")
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

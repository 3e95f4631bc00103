"""The runs of a study, kept in one JSON file so that an interrupted study can go on."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .command import versions


class StoreError(ValueError):
    """A file of results can't be used: it exists, is damaged, or holds another study's runs."""


def write_text(path: Path, text: str) -> None:
    """Write a file that is replaced whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


DECISIVE = ("fused_margin", "torch")  # versions that all runs of a file must have been made with


class Runs:
    """Finished runs, each under a key such as loss, seed and fold; saved after every run.

    All runs of a file share its settings and versions: what they are compared by. The key says in
    what they differ, so that seeds or losses can be added later. One process writes a file at a
    time.

    Args:
        path: JSON file, or None to keep the runs in memory only.
        settings: JSON types, the same for all runs.
        resume: go on with the runs in `path`, if it exists; without it the file must not exist.

    Raises:
        StoreError: `path` exists and `resume` is False, or it doesn't hold runs of these settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.settings = dict(settings)
        self.versions = versions()
        self.runs: list[dict[str, Any]] = []
        if path is not None and path.exists():
            if not resume:
                raise StoreError(f"{path} exists; add --resume to go on with it, or remove it")
            self.runs = self._read(path)
        elif self.checkpoint_path is not None and not resume:
            self.checkpoint_path.unlink(missing_ok=True)  # of a study that was begun anew

    def _read(self, path: Path) -> list[dict[str, Any]]:
        content = read_study(path)
        for part, mine in (("settings", self.settings), ("versions", self.versions)):
            theirs = content[part]
            if part == "versions":  # of Python, NumPy and the system the first run's are kept
                theirs, mine = (
                    {name: found[name] for name in DECISIVE} for found in (theirs, mine)
                )
            different = [
                f"{name} {_brief(theirs.get(name))}, now {_brief(mine.get(name))}"
                for name in sorted({*theirs, *mine})
                if theirs.get(name) != mine.get(name)
            ]
            if different:
                raise StoreError(
                    f"{path} was begun with other {part} ({'; '.join(different)}): "
                    "use the same, or name another file"
                )
        self.versions = content["versions"]
        return content["runs"]

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the run with this key, or None if it isn't finished."""
        matches = (run for run in self.runs if all(run[name] == key[name] for name in key))
        return next(matches, None)

    def add(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Save a finished run; its checkpoint is no longer needed."""
        run = {**key, **result}
        self.runs.append(run)
        self.save()
        if self.checkpoint_path is not None:
            self.checkpoint_path.unlink(missing_ok=True)
        return run

    def save(self) -> None:
        if self.path is not None:
            content = {"settings": self.settings, "versions": self.versions}
            head = json.dumps(content, indent=2, allow_nan=False).removesuffix("\n}")
            lines = ",\n".join("    " + json.dumps(run, allow_nan=False) for run in self.runs)
            write_text(self.path, f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n')  # a line for each

    @property
    def checkpoint_path(self) -> Path | None:
        return self.path and self.path.with_name(f"{self.path.name}.checkpoint")

    def save_checkpoint(self, key: Mapping[str, Any], state: Any) -> None:
        """Keep the state of the run that is under way."""
        if self.checkpoint_path is not None:
            temporary = self.checkpoint_path.with_name(f".{self.checkpoint_path.name}.tmp")
            try:
                torch.save({"key": dict(key), "settings": self.settings, "state": state}, temporary)
                temporary.replace(self.checkpoint_path)
            finally:
                temporary.unlink(missing_ok=True)

    def load_checkpoint(self, key: Mapping[str, Any]) -> Any | None:
        """Return the state the run with this key was interrupted in, or None.

        Raises:
            StoreError: the file of the checkpoint is damaged.
        """
        path = self.checkpoint_path
        if path is None or not path.exists():
            return None
        try:
            saved = torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise StoreError(f"{path}: can't be read ({error}); remove it") from error
        same = saved["key"] == dict(key) and saved["settings"] == self.settings
        return saved["state"] if same else None


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"  # such as the names of all classes


def read_study(path: Path) -> dict[str, Any]:
    """Read the settings, versions and runs of a study.

    Raises:
        StoreError: the file can't be read or is not a study's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: can't be read ({error})") from error
    if not isinstance(content, dict) or not {"settings", "versions", "runs"} <= content.keys():
        raise StoreError(f"{path}: not the results of a study; name another file")
    return content

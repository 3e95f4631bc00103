"""The runs of a study, kept in one JSON file so that an interrupted study can go on."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .command import versions

DECISIVE = ("fused_margin", "torch")  # versions that all runs of a file must have been made with


# What reading values of another kind than expected can raise.
MISFITS = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class StoreError(ValueError):
    """A file of results can't be used: it exists, is damaged, or holds another study's runs."""


class Entry(dict[str, Any]):
    """An object in a file of results; it names the file if it lacks what is asked for."""

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.path = path

    def __missing__(self, name: str) -> Any:
        raise StoreError(
            f"{self.path}: not what its script writes, {name!r} is missing: name another file, or "
            "remove this one and run its script again"
        )


@contextlib.contextmanager
def reading(path: Path | None) -> Iterator[None]:
    """Turn what values of another kind raise into an error that names their file.

    Raises:
        StoreError: the block raised one of MISFITS.
    """
    try:
        yield
    except StoreError:
        raise
    except MISFITS as error:
        raise StoreError(
            f"{path}: not what its script writes ({reason(error)}): name another file, or remove "
            "this one and run its script again"
        ) from error


def reason(error: Exception) -> str:
    """The kind of an error and the first line it says; some say nothing."""
    return ": ".join([type(error).__name__, *str(error).splitlines()[:1]])


def write_text(path: Path, text: str) -> None:
    """Write a file that is replaced whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def digest(*tensors: Tensor) -> str:
    """SHA-256 of the values, to tell one set of data from another."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy(force=True).reshape(-1).view("uint8").data)
    return found.hexdigest()


class Runs:
    """Finished runs, each under a key such as loss, seed and fold; saved after every run.

    All runs of a file share its settings and versions: what they are compared by. The key says in
    what they differ, so that seeds or losses can be added later. The state of the run under way is
    in a checkpoint beside the file. One process writes a file at a time.

    Args:
        path: JSON file, or None to keep the runs in memory only.
        settings: JSON types, the same for all runs.
        resume: go on with the runs in `path` and its checkpoint; without it neither may exist.

    Raises:
        StoreError: a file is there and `resume` is False, none is there and it is True, or what is
            there isn't of these settings.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.settings = dict(settings)
        self.versions = versions()
        self.runs: list[dict[str, Any]] = []
        self._text: str | None = None  # of the file, as last read or written
        if path is None:
            return
        there = [
            file for file in (path, self.checkpoint_path) if file is not None and file.exists()
        ]
        if there and not resume:
            raise StoreError(f"{there[0]} exists; add --resume to go on with it, or remove it")
        if resume and not there:
            raise StoreError(
                f"--resume: there is neither {path} nor {self.checkpoint_path}; leave out --resume "
                "to begin"
            )
        if path.exists():
            self._text = _read_text(path)
            content = _parse(path, self._text)
            self._compare(path, content)
            self.versions, self.runs = content["versions"], content["runs"]

    @property
    def checkpoint_path(self) -> Path | None:
        return self.path and self.path.with_name(f"{self.path.name}.checkpoint")

    def _compare(self, path: Path, content: Mapping[str, Any]) -> None:
        """Refuse settings or decisive versions that are not this study's."""
        for part, mine in (("settings", self.settings), ("versions", self.versions)):
            theirs = content[part]
            names = DECISIVE if part == "versions" else sorted({*theirs, *mine})
            different = [
                f"{name} {_brief(theirs.get(name))}, now {_brief(mine.get(name))}"
                for name in names
                if theirs.get(name) != mine.get(name)
            ]
            if different:
                raise StoreError(
                    f"{path} was begun with other {part} ({'; '.join(different)}): "
                    "use the same, or name another file"
                )

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the run with this key, or None if it isn't finished."""
        matches = (run for run in self.runs if all(run.get(name) == key[name] for name in key))
        return next(matches, None)

    def add(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Save a finished run; its checkpoint is no longer needed.

        Raises:
            StoreError: the file can't be written, or another process has written it.
        """
        run = {**key, **result}
        self.runs.append(run)
        self._save()
        if self.checkpoint_path is not None:
            self.checkpoint_path.unlink(missing_ok=True)
        return run

    def _save(self) -> None:
        if self.path is None:
            return
        if (_read_text(self.path) if self.path.exists() else None) != self._text:
            raise StoreError(
                f"{self.path} was changed by another process, whose runs would be lost: this one "
                "is not saved; let one process at a time write a file"
            )
        content = {"settings": self.settings, "versions": self.versions}
        head = json.dumps(content, indent=2, allow_nan=False).removesuffix("\n}")
        lines = ",\n".join("    " + json.dumps(run, allow_nan=False) for run in self.runs)
        text = f'{head},\n  "runs": [\n{lines}\n  ]\n}}\n'  # a line for each run
        try:
            write_text(self.path, text)
        except OSError as error:
            raise StoreError(f"{self.path}: can't be written ({error})") from error
        self._text = text

    def save_checkpoint(self, key: Mapping[str, Any], state: Any) -> None:
        """Keep the state of the run that is under way.

        Raises:
            StoreError: it can't be written.
        """
        path = self.checkpoint_path
        if path is None:
            return
        saved = {
            "key": dict(key), "settings": self.settings, "versions": versions(), "state": state,
        }  # fmt: skip
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            torch.save(saved, temporary)
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch's own for a disk that is full
            raise StoreError(f"{path}: can't be written ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(self, key: Mapping[str, Any]) -> Any | None:
        """Return the state the run with this key was interrupted in, or None.

        Raises:
            StoreError: the checkpoint is damaged, or of other settings.
        """
        path = self.checkpoint_path
        if path is None or not path.exists():
            return None
        try:
            saved = torch.load(path, weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way
            raise StoreError(
                f"{path}: can't be read ({reason(error)}); remove it to train this run from its "
                "beginning"
            ) from error
        parts = ("key", "settings", "versions", "state")
        if not isinstance(saved, dict) or not all(isinstance(saved.get(p), dict) for p in parts):
            raise StoreError(
                f"{path}: not a checkpoint of a study; remove it to train this run from its "
                "beginning"
            )
        self._compare(path, saved)
        return saved["state"] if saved["key"] == dict(key) else None

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Turn what a state of another kind raises into an error that names the checkpoint.

        Raises:
            StoreError: the block raised one of MISFITS, or a RuntimeError.
        """
        try:
            yield
        except (*MISFITS, RuntimeError) as error:  # the latter by load_state_dict
            raise StoreError(
                f"{self.checkpoint_path}: not the state of this run ({reason(error)}); remove it "
                "to train this run from its beginning"
            ) from error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"  # such as the names of all classes


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> StoreError:
    return StoreError(
        f"{path}: can't be read ({reason(error)}); name another file, or remove this one and run "
        "its script again"
    )


def read_study(path: Path) -> dict[str, Any]:
    """Read the settings, versions and runs of a study.

    Raises:
        StoreError: the file can't be read or is not a study's.
    """
    return _parse(path, _read_text(path))


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text, object_hook=lambda found: Entry(path, found))
    except (ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    kinds = {"settings": dict, "versions": dict, "runs": list}
    if (
        not isinstance(content, dict)
        or not all(isinstance(content.get(name), kind) for name, kind in kinds.items())
        or not all(isinstance(run, dict) for run in content["runs"])
    ):
        raise StoreError(f"{path}: not the results of a study; name another file")
    return content

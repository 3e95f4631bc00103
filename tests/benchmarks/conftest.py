"""One run of `benchmarks.cpu`, which several files look at."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import pytest

from benchmarks import cpu


@pytest.fixture(scope="session")
def cpu_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What `benchmarks.cpu` writes and prints on a tiny shape."""
    path = tmp_path_factory.mktemp("new") / "folder" / "cpu.json"
    sizes = ["--n", "8", "--c", "200", "--d", "16", "--rounds", "3", "--threads", "1"]
    options = ["--no-compile", "--no-memory", "--json", str(path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        cpu.main([*sizes, *options])
    return path.read_text(), out.getvalue()


@pytest.fixture
def cpu_result(cpu_run: tuple[str, str]) -> tuple[dict[str, Any], str]:
    written, printed = cpu_run
    return json.loads(written), printed

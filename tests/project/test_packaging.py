"""What is built and shipped, what it requires, and how its description looks on a package index."""

from __future__ import annotations

import email
import email.message
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

RAW = "https://raw.githubusercontent.com/"


def test_optimised_python_is_refused_in_a_sentence() -> None:
    """Under -O an assertion checks nothing: every test would pass."""
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pytest", "--collect-only", "tests/package/test_imports.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    message = "ERROR: the tests are assertions, which python -O leaves out: run them without -O"
    assert done.stderr.startswith(message)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel, as `python -m build` makes them."""
    for module in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(module, reason=f"{module}, of the extra test, isn't installed")
    folder = tmp_path_factory.mktemp("dist")
    paths = []
    for kind, builder in (("sdist", "SdistBuilder"), ("wheel", "WheelBuilder")):
        module: Any = importlib.import_module(f"hatchling.builders.{kind}")
        builds = getattr(module, builder)(str(ROOT)).build(
            directory=str(folder), versions=["standard"]
        )
        paths += map(Path, builds)
    sdist, wheel = paths
    return sdist, wheel


def sdist_names(path: Path) -> set[str]:
    """Paths below the one folder that the archive holds."""
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()}


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> email.message.Message:
    _, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def tracked_files() -> set[str]:
    """Files of this checkout that git knows, and that are there."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, whose list of files would be compared")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_sdist_is_the_repository(built: tuple[Path, Path]) -> None:
    """The tests read documents, examples, results and settings: all of it is needed."""
    assert tracked_files() - sdist_names(built[0]) == set()


def test_wheel_is_the_package(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("fused_margin/**/*.py")}
    assert names == sources | {"fused_margin/py.typed"}


def requirements(metadata: email.message.Message, extra: str | None = None) -> set[str]:
    """Names that an extra asks for; without one, those that everybody gets."""
    mark = "extra ==" if extra is None else f"extra == '{extra}'"
    found = metadata.get_all("Requires-Dist", [])
    chosen = [line for line in found if (mark in line) is (extra is not None)]
    return {re.split(r"[^\w.-]", line)[0] for line in chosen}


def test_triton_is_asked_for_where_the_interpreter_is_needed(
    metadata: email.message.Message,
) -> None:
    """A CPU does without; a build of torch for a GPU has its own, which ROCm names otherwise."""
    assert requirements(metadata) == {"numpy", "torch", "typing-extensions"}
    assert requirements(metadata, "triton") == {"triton"}
    extras = metadata.get_all("Provides-Extra", [])
    with_triton = [extra for extra in extras if "triton" in requirements(metadata, extra)]
    assert sorted(with_triton) == ["dev", "test", "triton"]
    for extra in ("bench", "examples", "test-rocm"):
        bring_triton = {"cut-cross-entropy", "liger-kernel", "triton"}
        assert not requirements(metadata, extra) & bring_triton
    assert requirements(metadata, "test") == requirements(metadata, "test-rocm") | {"triton"}


def test_description_needs_no_repository(metadata: email.message.Message) -> None:
    """Every link is absolute, or to a heading, and leads to a file that the repository has."""
    description = str(metadata.get_payload())
    assert description.startswith("# fused-margin")
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    home = urls["Repository"]
    raw = home.replace("https://github.com/", RAW)
    assert all(url.startswith(home) for url in urls.values())
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)", description)
    assert len(links) == (ROOT / "README.md").read_text(encoding="utf-8").count("](")
    assert any(is_image for is_image, _ in links)
    for is_image, link in links:
        if link.startswith("#"):
            continue
        assert link.startswith("https://"), link
        for start in (f"{home}/blob/HEAD/", f"{raw}/HEAD/"):
            if link.startswith(start):
                assert (ROOT / link.removeprefix(start)).is_file(), link
        if is_image:
            assert link.startswith(raw), "a page on GitHub about a picture is no picture"
    relative = re.findall(r"\]\((?!https?:|#)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sum(link.startswith((home, RAW)) for _, link in links) == len(relative)

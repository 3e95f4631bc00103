"""The study's tables are what its results give, and its pictures are drawn from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import article_faces
import article_mnist
import numpy as np
import pytest
import scale_sweep
import study_report
import torch
from helpers import ROOT
from mnist_files import write_mnist
from PIL import Image

pytestmark = pytest.mark.usefixtures("one_thread")

MARK = re.compile(r"<!-- table (\w+) -->")


def write_people(root: Path) -> None:
    """Twelve people, four images each: bright rows for each person, and noise."""
    generator = np.random.default_rng(0)
    for person in range(12):
        folder = root / f"group{person % 2}" / f"person{person}"
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 120, (32, 32), dtype=np.uint8)
            pixels[2 * person + 2 : 2 * person + 5] = 255
            Image.fromarray(pixels).save(folder / f"{index}.png")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in miniature, by the scripts themselves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("study")
    write_mnist(root / "mnist")
    write_people(root / "people")
    folder = root / "results"
    folder.mkdir()
    common = ["--device", "cpu", "--epochs", "1", "--embedding-size", "12", "--quiet"]

    def keep(script: Any, name: str, *arguments: str) -> None:
        code = script.main([*common, "--json", str(folder / f"{name}.json"), *arguments])
        assert code == 0

    mnist = ["--root", str(root / "mnist")]
    losses = ["--losses", "arcface", "fixed_adacos"]
    keep(article_mnist, "mnist", *mnist, *losses, "--seeds", "0", "1")
    regularized = ["--losses", "fixed_adacos+center_invariant", "--seeds", "1", "2"]
    keep(article_mnist, "mnist-center-invariant", *mnist, *regularized)
    keep(article_mnist, "mnist-published", *mnist, "--as-published", "--seeds", "0", "1")
    keep(article_mnist, "mnist-3d", *mnist, *losses, "--seeds", "0", "--embedding-size", "3")
    people = ["--images", str(root / "people"), "--image-size", "32", "--folds", "2"]
    keep(article_faces, "faces", *people, "--seeds", "0", "1")
    keep(article_faces, "faces-published", *people, "--as-published", "--seeds", "0")
    keep(article_faces, "characters", *people, "--hold-out", "groups", "--seeds", "0")
    grid = ["--scales", "8", "64", "--margins", "0", "0.5", "--seeds", "0", "1"]
    grid += ["--confirm-seeds", "5", "6"]
    keep(scale_sweep, "sweep-10", "--data", "synthetic", "--classes", "10", *grid)
    some = ["--scales", "8", "--margins", "0", "--seeds", "0", "1", "--epochs", "2"]
    keep(scale_sweep, "sweep-10-longer", "--data", "synthetic", "--classes", "10", *some)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def miniature(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents with every table and picture, for the study in miniature."""
    monkeypatch.setattr(study_report, "RESULTS", results)
    monkeypatch.setattr(study_report, "SWEEPS", {10: "synthetic"})
    monkeypatch.setattr(study_report, "LONGER", (10,))
    monkeypatch.setattr(study_report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    tables = "".join(f"<!-- table {name} -->\nold\n<!-- end -->\n" for name in study_report.TABLES)
    pictures = "".join(f"![](images/{name})\n" for name in study_report.PICTURES)
    (tmp_path / "docs" / "study.md").write_text(f"Before.\n{tables}{pictures}After.\n")
    (tmp_path / "README.ja.md").write_text("<!-- table mnist -->\n<!-- end -->\n")
    return tmp_path


def runs_of(results: Path, name: str, loss: str) -> list[dict[str, Any]]:
    content = json.loads((results / f"{name}.json").read_text())
    return [run for run in content["runs"] if run["loss"] == loss]


def cells(text: str, name: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    block = text.split(f"<!-- table {name} -->\n")[1].split("\n<!-- end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines[2:]}


def test_every_table_and_picture(miniature: Path, results: Path) -> None:
    assert study_report.main(["--check"]) == 1
    assert "old" in (miniature / "docs" / "study.md").read_text()  # it only looked
    assert study_report.main([]) == 0
    assert study_report.main(["--check"]) == 0
    text = (miniature / "docs" / "study.md").read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    for name in study_report.PICTURES:
        with Image.open(miniature / "docs" / "images" / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").get_flattened_data())) > 20  # not blank

    adacos = runs_of(results, "mnist", "fixed_adacos")
    arcface = runs_of(results, "mnist", "arcface")
    row = cells(text, "mnist")["Fixed AdaCos"]
    assert row[1].startswith(f"{fmean(run['test_nearest'] for run in adacos):.2f} ± ")
    pairs = zip(adacos, arcface, strict=True)
    mean = fmean(ours["test_nearest"] - theirs["test_nearest"] for ours, theirs in pairs)
    assert row[2].startswith(f"{mean:+.2f} [")
    assert cells((miniature / "README.ja.md").read_text(), "mnist") == cells(text, "mnist")

    (row,) = cells(text, "mnist_center_invariant").values()
    (with_it,) = (
        run for run in runs_of(results, "mnist-center-invariant", "fixed_adacos+center_invariant")
        if run["seed"] == 1
    )  # fmt: skip
    (without,) = (run for run in adacos if run["seed"] == 1)  # the only seed of both
    assert row[:2] == [f"{run['test_nearest']:.2f}" for run in (without, with_it)]
    assert row[2] == f"{with_it['test_nearest'] - without['test_nearest']:+.2f}"

    row = cells(text, "mnist_published")["Fixed AdaCos"]
    mine = runs_of(results, "mnist-published", "fixed_adacos")
    assert row[2] == "98.09"  # as published
    assert row[3].startswith(f"{fmean(run['test_nearest_euclidean'] for run in mine):.2f} ± ")

    row = cells(text, "open_faces")["Fixed AdaCos"]
    eer = fmean(run["verification"]["eer"] for run in runs_of(results, "faces", "fixed_adacos"))
    assert row[1].startswith(f"{eer:.2f} ± ")
    row = cells(text, "faces")["Fixed AdaCos"]
    ours, theirs = (
        [fmean(run["test_nearest"] for run in runs if run["seed"] == seed) for seed in (0, 1)]
        for runs in (
            runs_of(results, "faces", loss) for loss in ("fixed_adacos", "arcface+regular_face")
        )
    )
    assert row[0] == "90.02"
    assert row[3:] == [study_report.spread(ours), study_report.difference(ours, theirs)]
    assert set(cells(text, "open_characters")) == set(cells(text, "open_faces"))

    (row,) = cells(text, "sweep").values()
    content = json.loads((results / "sweep-10.json").read_text())
    confirming = [run for run in content["runs"] if run["seed"] in (5, 6)]
    fixed, usual = (
        [run["nearest"] for run in confirming if (run["scale"], run["margin"]) == point]
        for point in ((3.1073, 0.0), (64.0, 0.5))
    )
    assert len(fixed) == len(usual) == 2
    assert row[:3] == ["synthetic", "2", f"3.11: {study_report.spread(fixed)}"]
    assert row[-2:] == [study_report.spread(usual), study_report.difference(fixed, usual)]
    (row,) = cells(text, "sweep_eer").values()
    eer = [run["eer"] for run in confirming if (run["scale"], run["margin"]) == (64.0, 0.5)]
    assert row[-2] == study_report.spread(eer)
    rows = text.split("<!-- table sweep_longer -->\n")[1].split("\n<!-- end -->")[0].split("\n")
    (row,) = [line.strip("| ").split(" | ") for line in rows if " 8, 0 " in line]
    long = json.loads((results / "sweep-10-longer.json").read_text())["runs"]
    assert {len(run["losses"]) for run in long} == {2}
    gains = [
        [run["nearest"] for run in runs if run["scale"] == 8 and run["margin"] == 0]
        for runs in (long, [run for run in content["runs"] if run not in confirming])
    ]
    more, fewer = map(study_report.spread, gains)
    assert row[2:] == [f"1: {fewer}", f"2: {more}", study_report.difference(*gains)]


def test_best_points_need_seeds_of_their_own(
    miniature: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((results / "sweep-10.json").read_text())
    monkeypatch.setattr(study_report, "RESULTS", miniature)
    path = miniature / "sweep-10.json"
    confirming = [run for run in content["runs"] if run.get("confirms")]
    others = [*confirming[:-1], {**confirming[-1], "seed": 9}]
    for left in (confirming[:-1], others, []):
        content["runs"] = [run for run in content["runs"] if not run.get("confirms")] + left
        path.write_text(json.dumps(content))
        with pytest.raises(study_report.ReportError, match=r"sweep-10: .*--confirm-seeds"):
            study_report.sweep("nearest")


def test_an_incomplete_seed_is_left_out(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_report, "RESULTS", tmp_path)
    for name in ("mnist", "faces", "sweep-10"):
        content = json.loads((results / f"{name}.json").read_text())
        content["runs"] = [run for run in content["runs"] if not run.get("confirms")]
        assert {run["seed"] for run in content["runs"]} == {0, 1}
        whole = [run for run in content["runs"] if run["seed"] == 0]
        content["runs"].pop()
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert study_report.load(name).runs == whole
    content["runs"] = [content["runs"][0], {**content["runs"][1], "seed": 1}]
    (tmp_path / "sweep-10.json").write_text(json.dumps(content))
    with pytest.raises(study_report.ReportError, match="no seed is complete"):
        study_report.load("sweep-10")


def test_the_same_results_give_the_same_pictures(miniature: Path) -> None:
    contents = []
    for _ in range(2):
        assert study_report.main([]) == 0
        images = miniature / "docs" / "images"
        contents.append({path.name: path.read_bytes() for path in images.iterdir()})
    assert contents[0] == contents[1]


def test_an_unknown_table_and_missing_results_are_errors(
    miniature: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study_report, "RESULTS", tmp_path)
    with pytest.raises(SystemExit):
        study_report.main([])
    assert "mnist-published.json: can't be read" in capsys.readouterr().err
    (miniature / "docs" / "study.md").write_text("<!-- table nothing -->\n<!-- end -->\n")
    with pytest.raises(SystemExit):
        study_report.main([])
    assert "no table 'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (None, "", "mnist.json: can't be read (JSONDecodeError"),
        ('"test_nearest":', '"other":', "mnist.json: not what its script writes, 'test_nearest'"),
        ('"experiment"', '"e"', "mnist.json: not what its script writes, 'experiment' is missing"),
        ('"test_nearest": ', '"test_nearest": "%", "": ', "error: table mnist: TypeError: "),
    ],
)
def test_results_of_another_kind_are_named(
    miniature: Path,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: str | None,
    after: str,
    message: str,
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(results, folder)
    path = folder / "mnist.json"
    path.write_text(after if before is None else path.read_text().replace(before, after))
    monkeypatch.setattr(study_report, "RESULTS", folder)
    (miniature / "docs" / "study.md").write_text("<!-- table mnist -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="2"):
        study_report.main([])
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert "run its script again" in error or "run that script again" in error


def test_tables_of_the_documents_are_what_the_committed_results_give() -> None:
    for name in study_report.DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8")
        used = MARK.findall(text)
        assert used  # a document without marks would always be right
        assert text.count("<!-- end -->") == len(used)
    assert study_report.main(["--check"]) == 0


def test_pictures_of_the_study_are_there_and_small() -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    used = re.findall(r"images/(study-[\w-]+\.png)", text)
    assert used
    for name in used:
        assert name in study_report.PICTURES
        assert (ROOT / "docs" / "images" / name).stat().st_size < 400_000

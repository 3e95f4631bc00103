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
import study_tables
import torch
from helpers import ROOT
from mnist_files import write_mnist
from PIL import Image
from study.comparisons import Comparison
from study.tables import spread

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
    losses = ["--losses", "arcface", "fixed_adacos", "adacos"]
    keep(article_mnist, "mnist", *mnist, *losses, "--seeds", "0", "1")
    regularized = ["--losses", "fixed_adacos+center_invariant", "--seeds", "1", "2"]
    keep(article_mnist, "mnist-center-invariant", *mnist, *regularized)
    keep(article_mnist, "mnist-published", *mnist, "--as-published", "--seeds", "0", "1")
    keep(article_mnist, "mnist-3d", *mnist, *losses, "--seeds", "0", "--embedding-size", "3")
    people = ["--images", str(root / "people"), "--image-size", "32", "--folds", "2"]
    mended = ["--losses", *article_faces.DEFAULT_LOSSES, "adacos", "subcenter_arcface"]
    keep(article_faces, "faces", *people, *mended, "--seeds", "0", "1")
    keep(article_faces, "faces-published", *people, "--as-published", "--seeds", "0")
    keep(article_faces, "characters", *people, *mended, "--hold-out", "groups", "--seeds", "0")
    grid = ["--scales", "8", "64", "--margins", "0", "0.5", "--seeds", "0", "1"]
    grid += ["--confirm-seeds", "5", "6"]
    keep(scale_sweep, "sweep-10", "--data", "synthetic", "--classes", "10", *grid)
    some = ["--scales", "8", "--margins", "0", "--seeds", "0", "1", "--epochs", "2"]
    keep(scale_sweep, "sweep-10-longer", "--data", "synthetic", "--classes", "10", *some)
    unseen = ["--data", "folder", "--root", str(root / "people"), "--image-size", "32"]
    unseen += ["--hold-out", "classes", "--folds", "2"]
    keep(scale_sweep, "sweep-open", *unseen, *grid, "--confirm-points", "16,0.25")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def miniature(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents with every table and picture, for the study in miniature."""
    monkeypatch.setattr(study_tables, "RESULTS", results)
    monkeypatch.setattr(study_tables, "SWEEPS", {10: "synthetic"})
    monkeypatch.setattr(study_tables, "LONGER", (10,))
    monkeypatch.setattr(study_tables, "MARGIN_SWEEP", 10)
    monkeypatch.setattr(study_tables, "OPEN_SWEEPS", {"sweep-open": "people"})
    monkeypatch.setattr(study_report, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    names = [*study_tables.TABLES, study_tables.COUNTS]
    tables = "".join(f"<!-- table {name} -->\nSTALE\n<!-- end -->\n" for name in names)
    pictures = "".join(f"![](images/{name})\n" for name in study_report.PICTURES)
    (tmp_path / "docs" / "study.md").write_text(f"Before.\n{tables}{pictures}After.\n")
    (tmp_path / "README.ja.md").write_text("<!-- table mnist -->\n<!-- end -->\n")
    return tmp_path


def unmarked(row: list[str]) -> list[str]:
    """The cells of a row, which may be bold."""
    return [cell.strip("*") for cell in row]


def runs_of(results: Path, name: str, loss: str) -> list[dict[str, Any]]:
    content = json.loads((results / f"{name}.json").read_text())
    return [run for run in content["runs"] if run["loss"] == loss]


def cells(text: str, name: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    block = text.split(f"<!-- table {name} -->\n")[1].split("\n<!-- end -->")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.split("\n")]
    assert len({len(line) for line in lines}) == 1
    return {line[0]: line[1:] for line in lines[2:]}


def table_lines(text: str, name: str) -> list[list[str]]:
    block = text.split(f"<!-- table {name} -->\n")[1].split("\n<!-- end -->")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in block.split("\n")[2:]]


def test_every_table_and_picture(miniature: Path, results: Path) -> None:
    assert study_report.main(["--check"]) == 1
    assert "STALE" in (miniature / "docs" / "study.md").read_text()  # it only looked
    assert study_report.main([]) == 0
    assert study_report.main(["--check"]) == 0
    text = (miniature / "docs" / "study.md").read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "STALE" not in text
    for name in study_report.PICTURES:
        with Image.open(miniature / "docs" / "images" / name) as picture:
            assert min(picture.size) > 300
            assert len(set(picture.convert("L").get_flattened_data())) > 20  # not blank

    adacos = runs_of(results, "mnist", "fixed_adacos")
    arcface = runs_of(results, "mnist", "arcface")
    row = cells(text, "mnist")["Fixed AdaCos"]
    assert row[1].startswith(f"{fmean(run['test_nearest'] for run in adacos):.2f} ± ")
    assert row[2] == ""
    row = unmarked(cells(text, "mnist")["ArcFace"])
    pairs = zip(adacos, arcface, strict=True)
    mean = fmean(ours["test_nearest"] - theirs["test_nearest"] for ours, theirs in pairs)
    assert row[2].startswith(f"{mean:+.2f} [")
    scales = [run["scale"] for run in runs_of(results, "mnist", "adacos")]
    assert cells(text, "mnist")["AdaCos"][0] == f"{min(scales):.2f} to {max(scales):.2f}"
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
    assert row[2].startswith(f"{eer:.2f} ± ")
    row = unmarked(cells(text, "open_faces")["CosFace"])
    for column, name in ((3, "seed"), (4, "fold")):
        ours, theirs = (
            [
                fmean(run["verification"]["eer"] for run in runs if run[name] == value)
                for value in (0, 1)
            ]
            for runs in (runs_of(results, "faces", loss) for loss in ("fixed_adacos", "cosface"))
        )
        assert row[column] == str(Comparison.between(ours, theirs))
    assert len(cells(text, "open_faces_published")) == 4
    for name, columns in (("mnist_published", (0, 2)), ("faces", (0,))):
        row = cells(text, name)["AdaCos"]
        assert [row[column] for column in columns] == ["–"] * len(columns)  # without a figure
    row = unmarked(cells(text, "faces")["ArcFace + RegularFace"])
    ours, theirs = (
        [fmean(run["test_nearest"] for run in runs if run["seed"] == seed) for seed in (0, 1)]
        for runs in (
            runs_of(results, "faces", loss) for loss in ("fixed_adacos", "arcface+regular_face")
        )
    )
    assert row[0] == "85.22"
    assert row[3:] == [spread(theirs), str(Comparison.between(ours, theirs))]
    assert set(cells(text, "open_characters")) == set(cells(text, "open_faces"))

    before, after = (
        [run["test_nearest"] for run in runs_of(results, name, loss)]
        for name, loss in (("mnist-published", "arcface+center_invariant"), ("mnist", "arcface"))
    )
    row = unmarked(cells(text, "mending")["MNIST: ArcFace"])
    assert row == [spread(before), spread(after), str(Comparison.between(after, before))]
    row = unmarked(cells(text, "mending")["MNIST: Fixed AdaCos minus ArcFace"])
    leads = [
        [run["test_nearest"] - other for run, other in zip(runs, others, strict=True)]
        for runs, others in (
            (runs_of(results, "mnist-published", "fixed_adacos"), before), (adacos, after)
        )
    ]  # fmt: skip
    assert row == [
        *(str(Comparison(tuple(one))) for one in leads),
        str(Comparison.between(leads[1], leads[0])),
    ]

    content = json.loads((results / "sweep-10.json").read_text())
    confirming = [run for run in content["runs"] if run["seed"] in (5, 6)]
    lines = {line[3]: line for line in table_lines(text, "sweep")}
    for column, metric in ((5, "nearest"), (8, "eer")):
        fixed, usual = (
            [run[metric] for run in confirming if (run["scale"], run["margin"]) == point]
            for point in ((3.1073, 0.0), (64.0, 0.5))
        )
        assert len(fixed) == len(usual) == 2
        assert lines["3.107, 0"][column] == spread(fixed)
        assert lines["64, 0.5"][column] == spread(usual)
        lead = lines["64, 0.5"][column + 1].strip("*")
        assert lead == str(Comparison.between(fixed, usual))
    assert "√2·ln(C−1)" in lines["3.107, 0"][4]
    assert "usual" in lines["64, 0.5"][4]
    assert lines["64, 0.5"][:3] == ["10", "synthetic", "2"]

    best = scale_sweep.Chosen.by(study_tables.load("sweep-10").runs, 3.1073).best
    for line in table_lines(text, "sweep_margin"):
        scale, margin = map(float, line[0].split(","))
        ours, theirs = (
            [r["eer"] for r in confirming if (f"{r['scale']:.4g}", r["margin"]) == point]
            for point in ((f"{best[0]:.4g}", best[1]), (f"{scale:.4g}", margin))
        )
        assert line[2].strip("*") == str(Comparison.between(ours, theirs))

    content = json.loads((results / "sweep-open.json").read_text())
    confirming = [run for run in content["runs"] if run["seed"] in (5, 6)]
    lines = {line[2]: line for line in study_tables.sweep_open().rows}
    assert lines["16, 0.25"][3] == ""  # trained because it was named
    ours, theirs = (
        [fmean(r["eer"] for r in runs if r["fold"] == fold) for fold in (0, 1)]
        for runs in (
            [run for run in confirming if run["fixed"] and run["margin"] == 0],
            [run for run in confirming if (run["scale"], run["margin"]) == (16.0, 0.25)],
        )
    )
    assert lines["16, 0.25"][-1] == Comparison.between(ours, theirs)

    (row,) = [line for line in table_lines(text, "sweep_longer") if line[3] == "8, 0"]
    long = json.loads((results / "sweep-10-longer.json").read_text())["runs"]
    short = json.loads((results / "sweep-10.json").read_text())["runs"]
    assert {len(run["losses"]) for run in long} == {2}
    gains = [
        [r["nearest"] for r in runs if (r["scale"], r["margin"]) == (8, 0) and r["seed"] in (0, 1)]
        for runs in (long, short)
    ]
    more, fewer = map(spread, gains)
    assert row[2] == "1 → 2"
    assert row[4] == f"{fewer} → {more}"
    assert row[5].strip("*") == str(Comparison.between(*gains))


def test_intervals_that_hold_for_all_tables_are_bold(
    miniature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certain = Comparison((5.0, 5.1, 5.2))
    alone = Comparison((1.0, 1.5, 0.8))  # p = 0.037
    nothing, single = Comparison((1.0, -1.0)), Comparison((3.0,))
    first = study_tables.Table(("a", "b"), [["x", certain], ["y", alone]])
    second = study_tables.Table(("a", "b", "c"), [["z", nothing, single], ["w", certain, "text"]])
    made = {"first": lambda: first, "second_one": lambda: second}
    monkeypatch.setattr(study_tables, "TABLES", made)
    tables = study_report.make_tables()
    assert f"| x | **{certain}** |\n| y | {alone} |" in tables["first"]
    assert f"| w | **{certain}** | text |" in tables["second_one"]
    assert tables["intervals"].splitlines()[2:] == [
        "| 1 | first | 2 | 2 | 1 |",
        "| 2 | second one | 2 | 1 | 1 |",
        "|  | all | 3 | 2 | 1 |",  # what stands in two tables is one comparison
    ]


def test_best_points_need_seeds_of_their_own(
    miniature: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((results / "sweep-10.json").read_text())
    monkeypatch.setattr(study_tables, "RESULTS", miniature)
    path = miniature / "sweep-10.json"
    confirming = [run for run in content["runs"] if run.get("confirms")]
    others = [*confirming[:-1], {**confirming[-1], "seed": 9}]
    for left in (confirming[:-1], others, []):
        content["runs"] = [run for run in content["runs"] if not run.get("confirms")] + left
        path.write_text(json.dumps(content))
        with pytest.raises(study_tables.ReportError, match=r"sweep-10: .*--confirm-seeds"):
            study_tables.sweep()


def test_a_point_that_was_named_is_compared_by_the_seeds_it_has(
    miniature: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((results / "sweep-10.json").read_text())
    (fixed,) = (
        run for run in content["runs"]
        if run["seed"] == 6 and (run["scale"], run["margin"]) == (3.1073, 0.0)
    )  # fmt: skip
    extra = {**fixed, "scale": 5.0, "nearest": fixed["nearest"] - 3}
    content["runs"].append(extra)
    monkeypatch.setattr(study_tables, "RESULTS", miniature)
    (miniature / "sweep-10.json").write_text(json.dumps(content))
    (line,) = (line for line in study_tables.sweep().rows if line[3] == "5, 0")
    assert line[2] == "1"
    assert line[4] == ""
    assert line[6] == Comparison((3.0,))


def test_an_incomplete_seed_is_left_out(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    for name in ("mnist", "faces", "sweep-10"):
        content = json.loads((results / f"{name}.json").read_text())
        content["runs"] = [run for run in content["runs"] if not run.get("confirms")]
        assert {run["seed"] for run in content["runs"]} == {0, 1}
        whole = [run for run in content["runs"] if run["seed"] == 0]
        content["runs"].pop()
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        assert study_tables.load(name).runs == whole
    content["runs"] = [content["runs"][0], {**content["runs"][1], "seed": 1}]
    (tmp_path / "sweep-10.json").write_text(json.dumps(content))
    with pytest.raises(study_tables.ReportError, match="no seed is complete"):
        study_tables.load("sweep-10")


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
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
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
    monkeypatch.setattr(study_tables, "RESULTS", folder)
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


def test_tables_of_the_study_are_numbered_as_the_report_counts_them() -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    order = [*study_tables.TABLES, study_tables.COUNTS]
    assert MARK.findall(text) == order
    captions = re.findall(r"^\*\*Table (\d+)\. ", text, re.MULTILINE)
    assert captions == [f"{number}" for number in range(1, len(order) + 1)]
    mentioned = {
        int(number)
        for name in (*study_report.DOCUMENTS, "README.md")
        for number in re.findall(
            r"(?:[Tt]ables?|表) (\d+)", (ROOT / name).read_text(encoding="utf-8")
        )
    }
    assert mentioned <= {*range(1, len(order) + 1)}


def test_pictures_of_the_study_are_there_and_small() -> None:
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    used = re.findall(r"images/(study-[\w-]+\.png)", text)
    assert used
    for name in used:
        assert name in study_report.PICTURES
        assert (ROOT / "docs" / "images" / name).stat().st_size < 400_000

"""README.md and docs/ say what is so: code runs, names exist, defaults and equations match."""

from __future__ import annotations

import functools
import inspect
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import Block, find_blocks
from helpers import ROOT

import fused_margin as fm

DOCUMENTS = (ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md")))
MATH = ROOT / "docs" / "math.md"


def blocks_of(*languages: str) -> list[Block]:
    return [
        block for path in DOCUMENTS for block in find_blocks(path) if block.language in languages
    ]


def commands() -> list[str]:
    """Lines that a shell would run, with prompts and comments removed."""
    lines = []
    for block in blocks_of("bash", "console", "sh", "shell"):
        for line in block.text.splitlines():
            is_command = block.language != "console" or line.startswith("$ ")
            command = line.removeprefix("$ ").split(" #")[0].strip()
            if is_command and command:
                lines.append(command)
    return lines


def make_targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z]+):(?!=)", makefile, re.MULTILINE))


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment of a job of one process, whose group ends with the test."""
    job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    store = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # any port that is free
    for name, value in (job | store).items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_python_block_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    # Readers get Inductor; here aot_eager, which finds graph breaks without a C++ compiler.
    compile_eagerly = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    if "from accelerate import" in block.text:
        pytest.importorskip("accelerate", reason="Accelerate is not a dependency of the tests")
    # Blank lines in front give a traceback the document's own line numbers.
    code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(code, {"__name__": "__main__"})


def test_readme_has_python_and_shell_blocks() -> None:
    readme = [block.language for block in find_blocks(ROOT / "README.md")]
    assert readme.count("python") >= 5
    assert "console" in readme


def test_every_fence_names_its_language() -> None:
    assert [str(block) for block in blocks_of("")] == []
    for path in DOCUMENTS:
        fences = re.findall(r"^```", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(find_blocks(path)), f"{path.name}: a fence isn't closed"


def test_commands_exist() -> None:
    targets = make_targets()
    missing = []
    num_targets = 0
    for command in commands():
        words = command.split()
        if words[0] == "make":
            # a word with "=" is a variable; what follows it may be the rest of a quoted value
            named = [word for word in words[1:2] if "=" not in word]
            num_targets += len(named)
            missing += [f"make {word}" for word in named if word not in targets]
        paths = (word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh)", word))
        missing += [path for path in paths if not (ROOT / path).is_file()]
    assert missing == []
    assert num_targets > 0


def test_inline_make_targets_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z]+)", readme))
    assert named <= make_targets()
    variables = set(re.findall(r"`([A-Z]+_ARGS)`", readme))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert variables <= set(re.findall(r"^([A-Z_]+) \?=", makefile, re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_resolve(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


# --- losses ---------------------------------------------------------------------------------------


def rows_of_losses() -> list[dict[str, str]]:
    """The table of losses as one dictionary a row, keyed by the header's first words."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^\| module \| function \|.*?(?=\n\n)", readme, re.MULTILINE | re.DOTALL)
    assert table is not None, "README.md has no table of losses"
    lines = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in table[0].split("\n")
    ]
    header = [cell.split()[0] for cell in lines[0]]
    return [dict(zip(header, line, strict=True)) for line in lines[2:]]


def quoted_number(cell: str) -> float | None:
    """The number that a cell starts with, in backquotes; None if it starts with anything else."""
    match = re.match(r"`([\d.]+)`", cell)
    return None if match is None else float(match[1])


def default(function: object, name: str) -> object:
    assert callable(function)
    parameter = inspect.signature(function).parameters.get(name)
    return None if parameter is None else parameter.default


def test_table_of_losses_is_complete() -> None:
    """But for their base class, which has no margin."""
    modules = {row["module"].strip("`") for row in rows_of_losses()}
    assert modules | {"MarginSoftmaxLoss"} == {name for name in fm.__all__ if name.endswith("Loss")}


def function_of(row: dict[str, str]) -> Any:
    """The function that gives the loss, the last one where there are several."""
    return getattr(fm.functional, row["function"].split(", ")[-1].strip("`"))


@pytest.mark.parametrize("row", rows_of_losses(), ids=lambda row: row["module"].strip("`"))
@pytest.mark.parametrize("name", ["margin", "scale"])
def test_table_of_losses_has_the_defaults(row: dict[str, str], name: str) -> None:
    module = getattr(fm, row["module"].strip("`"))
    function = function_of(row)
    documented = quoted_number(row[name])
    assert default(module, name) == documented
    if "no default" in row[name]:
        assert default(function, name) is inspect.Parameter.empty
    else:
        assert default(function, name) == documented


def rows_of_other_logits() -> dict[str, tuple[str, str]]:
    """By module, the logit of another class and where it is that, as they are written."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| `(\w+)` \| (s·[^|]+) \| (c > [^|]+) \|$", readme, re.MULTILINE)
    return {name: (logit, where) for name, logit, where in found}


def evaluated(text: str, names: dict[str, Any]) -> Any:
    """What stands before the first comma of a formula."""
    expression = text.split(", ")[0].replace("·", "*").replace("−", "-")
    expression = expression.replace("cos θ", "cos(θ)").replace("^", "**")
    return eval(expression, {}, names)


def other_logit(module: str, c: torch.Tensor, names: dict[str, Any]) -> torch.Tensor:
    """The logit of another class of cosine c."""
    logit, where = rows_of_other_logits().get(module, ("s·c", "c > -2"))
    below = 0.0 * c if "else 0" in where else names["s"] * c
    return evaluated(logit, names | {"c": c}) if evaluated(where, names | {"c": c}) else below


def test_table_of_losses_has_the_formulas() -> None:
    """The written target logit and scale give the loss, with the embedding at a known angle."""
    num_classes = 3
    theta = torch.tensor(1.0, dtype=torch.float64)
    weight = torch.eye(num_classes, dtype=torch.float64)
    embedding = torch.stack([theta.cos(), theta.sin(), torch.zeros_like(theta)])[None, :]
    others = embedding[0, 1:]
    meaning: dict[str, Any] = {"cos": torch.cos, "θ": theta, "m1": 1.0, "m2": 0.5, "m3": 0.0}
    meaning["k"] = math.floor(1.5 * theta / math.pi)
    meaning["ẑ"] = 0.333 * (1.0 - 20.0) / (100.0 + 1e-3)  # of an embedding of norm 1
    for row in rows_of_losses():
        function, name = function_of(row), row["module"].strip("`")
        margin, scale = quoted_number(row["margin"]), quoted_number(row["scale"])
        added = 0.0
        if name == "MagFaceLoss":
            margin, added = 0.45, 35.0 * (10.0 / 110.0**2 + 1.0 / 10.0)  # of norms up to 10
        if name == "AdaCosLoss":
            scale = 12.0
        margin = {"ElasticFaceLoss": 0.5, "MVSoftmaxLoss": 0.35}.get(name, margin)
        if scale is None:
            formula = row["scale"].split(",")[0]
            assert formula == "√2·ln(C − 1)"
            scale = 2**0.5 * float(torch.tensor(num_classes - 1.0, dtype=torch.float64).log())
        given = {"scale": scale} if "no default" in row["scale"] else {}
        given |= {"sigma": 0.0} if name == "ElasticFaceLoss" else {}
        names = meaning | {"m": margin, "s": scale}
        names["t"] = 0.3 if name == "CurricularFaceLoss" else 1.2  # a statistic, a default
        target = evaluated(row["target"], names)
        given |= {"t": 0.3} if name == "CurricularFaceLoss" else {}
        logits = torch.stack([target, *(other_logit(name, c, names) for c in others)])
        expected = torch.logsumexp(logits, dim=0) - target + added
        loss = function(embedding, weight, torch.tensor([0]), **given)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


# --- equations ------------------------------------------------------------------------------------


def cited_equations(text: str) -> set[int]:
    """Numbers of our own equations: "eq. 1, 2", "eq. 7 to 9"; those of papers are left out."""
    text = re.sub(r"\n\s*#?\s*", " ", text)
    text = re.sub(r"arXiv:[\d.]+,? eq\. \d+", "", text)
    numbers = set()
    for citation in re.findall(r"\beqs?\. (\d+(?:(?:, | to | and )\d+)*)", text):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", citation):
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def numbered_equations() -> list[int]:
    return [int(number) for number in re.findall(r"\\tag\{(\d+)\}", MATH.read_text("utf-8"))]


def test_cited_equations_are_found() -> None:
    text = "(eq. 1, 2), eq. 7 to 9,\n    # eq. 12; arXiv:1801.07698,\n    eq. 3."
    assert cited_equations(text) == {1, 2, 7, 8, 9, 12}


def test_equations_are_numbered_in_order() -> None:
    numbers = numbered_equations()
    assert numbers == list(range(1, len(numbers) + 1))
    assert numbers


SOURCES = [*sorted((ROOT / "fused_margin").rglob("*.py")), *DOCUMENTS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_cited_equations_exist(path: Path) -> None:
    cited = cited_equations(path.read_text(encoding="utf-8"))
    assert cited <= set(numbered_equations())


def test_every_equation_is_cited_by_the_code() -> None:
    sources = (path.read_text(encoding="utf-8") for path in SOURCES if path.suffix == ".py")
    cited = set().union(*(cited_equations(source) for source in sources))
    assert cited == set(numbered_equations())

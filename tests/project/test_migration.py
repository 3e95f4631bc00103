"""The tables of migration: both languages say the same, and what they name is there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch import nn

import fused_margin as fm
from fused_margin.compat import heads, insightface, pml

C, D = 300, 50


def table(path: str, first: str) -> list[list[str]]:
    """The rows below the header that starts with ``first``."""
    text = (ROOT / path).read_text(encoding="utf-8")
    found = re.search(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None, f"{path} has no such table"
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]


def codes(rows: list[list[str]]) -> list[str]:
    return [code for row in rows for cell in row for code in re.findall(r"`([^`]+)`", cell)]


ENGLISH = table("README.md", "from")
JAPANESE = table("README.ja.md", "元")
DETAILS = table("docs/migration.md", "from")


def test_both_languages_name_the_same_code() -> None:
    assert codes(ENGLISH) == codes(JAPANESE)
    assert len(ENGLISH) >= 9


@pytest.mark.parametrize("row", ENGLISH, ids=lambda row: row[1].strip("`"))
def test_what_comes_after_is_there(row: list[str]) -> None:
    """Imports import, calls with sizes for D and C make a loss, dotted names are found."""
    for code in re.findall(r"`([^`]+)`", row[2]):
        if code.startswith("from "):
            exec(code, {})
        elif code.startswith("fm."):
            criterion = eval(code, {"fm": fm, "C": C, "D": D})
            assert (criterion.num_classes, criterion.embedding_size) == (C, D)
        elif code.startswith("compat."):
            assert hasattr(heads, code.removeprefix("compat.heads."))


# The class that starts as its original, by the first words of the row
STARTS: dict[str, Callable[[], Any]] = {
    "pytorch-metric-learning": lambda: pml.ArcFaceLoss(C, D),
    "insightface": lambda: insightface.PartialFC_V2(insightface.ArcFace(), D, C),
    "arcface-pytorch": lambda: heads.ArcMarginProduct(D, C),
    "WeSpeaker": lambda: heads.WeSpeakerAAM(D, C),
    "SpeechBrain": lambda: heads.SpeechBrainAAM(D, C),
}


@pytest.mark.parametrize("row", DETAILS, ids=lambda row: row[0])
def test_the_initialisation_is_the_original_s(row: list[str]) -> None:
    named = re.findall(r"`([^`]+)`", row[3])
    criterion = fm.ArcFaceLoss(C, D)
    for line in named:
        exec(line, {"nn": nn, "criterion": criterion})
    drawn = criterion.weight.detach()
    for name, make in STARTS.items():
        if name in row[0]:
            (parameter,) = make().parameters()
            expected = parameter.detach()
            expected = expected if expected.shape == drawn.shape else expected.t()
            assert float(drawn.std()) == pytest.approx(float(expected.std()), rel=0.05)
            kurtosis = [float((w / w.std()).pow(4).mean()) for w in (drawn, expected)]
            assert kurtosis[0] == pytest.approx(kurtosis[1], rel=0.1)  # normal 3, uniform 1.8
    if not named:
        norms = torch.linalg.vector_norm(drawn, dim=1)
        assert float(norms.mean()) == pytest.approx(1.0, rel=0.05)


def test_every_stack_is_in_both_tables() -> None:
    details = " ".join(row[0] for row in DETAILS)
    readme = " ".join(row[0] for row in ENGLISH)
    for name in (*STARTS, "OML", "pytorch-adacos", "AdaFace", "CurricularFace", "ElasticFace"):
        assert name in details
        assert name in readme

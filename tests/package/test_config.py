"""The text to paste into a bug report."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import fused_margin as fm


def test_show_config(capsys: pytest.CaptureFixture[str]) -> None:
    fm.show_config()
    text = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line[0].islower())
    assert lines["fused_margin"] == fm.__version__
    assert lines["torch"].startswith(torch.__version__)
    for key in ("python", "triton", "numpy", "cpu", "gpu", "backends", "label"):
        assert lines[key]
    auto = [line for line in text.splitlines() if line.startswith("auto")]
    assert auto[0].split() == ["auto,", "cpu", "cpu"]
    assert len(auto) == 2


@pytest.mark.parametrize("is_new", [True, False])
def test_precision_by_either_of_torchs_settings(
    is_new: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """`torch.get_float32_matmul_precision` raises once the newer one is used."""
    before = torch.backends.cuda.matmul.fp32_precision
    x, w = torch.randn(5, 8), torch.randn(7, 8)
    try:
        for value, shown in (("tf32", "tf32"), ("ieee", "ieee")):
            if is_new:
                torch.backends.cuda.matmul.fp32_precision = value
            else:
                torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")
            fm.show_config()
            assert f"{shown} (fp32 products" in capsys.readouterr().out
            if not fm._validate.has_triton():
                continue
            planning = importlib.import_module("fused_margin._triton.planning")
            assert planning.plan(x, w, x.dtype).operands == value
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


def _assembler(capsys: pytest.CaptureFixture[str]) -> str:
    fm.show_config()
    lines = capsys.readouterr().out.splitlines()
    return next(line for line in lines if line.startswith("assembler")).split(maxsplit=1)[1]


def test_show_config_names_the_assembler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is the one that Triton runs: TRITON_PTXAS_PATH's, unless that is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from triton import knobs

    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    tool = knobs.nvidia.ptxas
    assert re.fullmatch(
        rf"ptxas {re.escape(tool.version)}\.\d+, {re.escape(tool.path)}", _assembler(capsys)
    )
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.3, V13.3.17'\n")
    other.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(other))
    assert knobs.nvidia.ptxas.path == str(other)
    assert _assembler(capsys) == f"ptxas 13.3.17, {other} (TRITON_PTXAS_PATH)"
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    assert knobs.nvidia.ptxas.path == tool.path
    assert _assembler(capsys).endswith(f"{tool.path}; TRITON_PTXAS_PATH={tmp_path}/none is not one")

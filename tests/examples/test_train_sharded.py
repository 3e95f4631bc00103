"""The example of sharded training: the same on any number of ranks, and after a rank is killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this build of PyTorch has no gloo", allow_module_level=True)

TIMEOUT = 20  # seconds until a lost rank is an error
SMALL = [
    "--identities", "61", "--dim", "16", "--batch", "50", "--steps", "60", "--every", "20",
    "--report", "10", "--timeout", str(TIMEOUT),
]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def launch(
    folder: Path, ranks: int, *arguments: str, of_last: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """The example in as many processes, as torchrun starts it, or by itself.

    ``of_last``: more arguments, of the last rank alone.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "examples/train_sharded.py", *SMALL, *arguments]
    started = []
    port = _free_port()
    for rank in range(ranks):
        command += of_last if rank == ranks - 1 else ()
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"LOCAL_WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        started.append(
            subprocess.Popen(
                [*command, "--checkpoints", str(folder)], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    return started


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What rank 0 has said; every rank has ended well, and the others said nothing."""
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output)
    assert not any(outputs[1:])
    return outputs[0].splitlines()


def ended(processes: list[subprocess.Popen[str]], status: int = 1) -> list[str]:
    """What each rank says of an error, at once and without a traceback."""
    said = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == status, errors
        # but for what torch logs of unreadable metadata, before it raises
        assert "Traceback" not in errors.partition("Global metadata")[0]
        assert errors.splitlines()[-1].startswith(("error: ", "train_sharded.py: error: "))
        assert not output
        said.append(errors)
    return said


def numbers(lines: list[str]) -> dict[str, str]:
    """Losses by step, and the accuracy, without times."""
    found = {}
    for line in lines:
        match = re.match(r"(step +\d+|accuracy) .*?([0-9.]+)(?: %|  .*)$", line)
        if match:
            found[match[1]] = match[2]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One process from the first step to the last."""
    found = numbers(finish(launch(tmp_path_factory.mktemp("alone"), 1)))
    assert float(found["accuracy"]) > 90.0
    return found


@pytest.mark.slow
def test_a_killed_rank_and_a_resumed_run(tmp_path: Path, alone: dict[str, str]) -> None:
    """Killed while it may be saving: the others end with an error, and two ranks go on."""
    processes = launch(tmp_path, 3)
    assert processes[0].stdout is not None
    for line in processes[0].stdout:
        if line.startswith("step    40"):
            break
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    for process in (processes[0], processes[2]):
        _, errors = process.communicate(timeout=TIMEOUT + 10)
        assert process.returncode not in (0, None)
        assert "Error" in errors
    assert time.monotonic() - killed < TIMEOUT + 10
    processes[1].communicate()

    cut_short = tmp_path / "step-00000050.part"
    cut_short.mkdir()
    (cut_short / "__0_0.distcp").write_bytes(b"a part of it")
    lines = finish(launch(tmp_path, 2))
    assert re.fullmatch(r"2 ranks, cpu, from step-000000(20|40)", lines[0])
    assert not cut_short.exists()
    found = numbers(lines)
    assert found.items() <= alone.items()
    assert len(found) >= 3
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000040", "step-00000060"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_checkpoints_of_other_settings_are_refused(tmp_path: Path, ranks: int) -> None:
    """On every rank, with what differs, and nothing is changed."""
    short = ["--steps", "20"]
    finish(launch(tmp_path, ranks, *short))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000020"]
    others = (
        ("--identities", "62", "identities 61, not 62"),
        ("--dim", "8", "dim 16, not 8"),
        ("--seed", "1", "seed 0, not 1"),
    )
    for option, value, said in others[: 1 if ranks > 1 else None]:
        for process in launch(tmp_path, ranks, *short, option, value):
            output, errors = process.communicate(timeout=120)
            assert process.returncode == 1
            assert f"step-00000020 was trained with {said}; give the same settings" in errors
            assert "Traceback" not in errors
            assert not output
    settings = tmp_path / "step-00000020" / "settings.json"
    settings.write_text(settings.read_text().replace("CosFaceLoss", "ArcFaceLoss"))
    errors = [one.communicate(timeout=120)[1] for one in launch(tmp_path, ranks, *short)]
    assert all("loss ArcFaceLoss, scale 16, not CosFaceLoss, scale 16" in one for one in errors)
    settings.unlink()
    errors = [one.communicate(timeout=120)[1] for one in launch(tmp_path, ranks, *short)]
    assert all("has no settings.json" in one for one in errors)


def test_what_a_user_may_get_wrong(tmp_path: Path) -> None:
    """It ends, every rank of it, and says what to do."""
    for options, said in (
        (("--batch", "0"), "argument --batch: expected a whole number of at least 1, got '0'"),
        (("--loss", "arcface"), "unrecognized arguments: --loss arcface"),
        (("--timeout", "soon"), "argument --timeout: expected a whole number"),
    ):
        assert said in ended(launch(tmp_path, 1, *options), status=2)[0]
    file = tmp_path / "file"
    file.write_text("no folder")
    for path in (file, file / "inside"):
        for one in ended(launch(path, 2)):
            assert "error: --checkpoints must name a folder: " in one
            assert str(path) in one


def test_damaged_checkpoints(tmp_path: Path) -> None:
    short = ["--steps", "4", "--every", "2"]
    finish(launch(tmp_path, 2, *short))
    assert "4 steps are done already; raise --steps" in finish(launch(tmp_path, 2, *short))[1]
    newest = tmp_path / "step-00000004"

    def broken(name: str, said: str, content: bytes | None, ranks: int = 1) -> None:
        path = newest / name
        kept = path.read_bytes()
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for one in ended(launch(tmp_path, ranks, *short)):
            assert re.search(said, one), one
        path.write_bytes(kept)

    parts = sorted(path.name for path in newest.glob("*.distcp"))
    assert len(parts) == 2
    delete = r"step-00000004 is damaged \(.*\); delete it to resume from the one before"
    broken(parts[-1], delete, b"cut", ranks=2)
    broken(parts[-1], delete, None)
    broken(".metadata", delete, b"no pickle", ranks=2)
    broken(".metadata", r"has no \.metadata, so it is damaged: delete it, or give another", None)
    for content in (b"{", b"[1]"):
        broken("settings.json", r"settings\.json is damaged: delete step-00000004, or", content)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert finish(launch(tmp_path, 2, *short))[0].endswith("from step-00000002")


def test_ranks_of_different_settings(tmp_path: Path) -> None:
    found = launch(tmp_path, 2, of_last=("--batch", "51"))
    for one in ended(found):
        assert "error: ranks have different --batch, 50, 51 by rank; give all the same" in one


def test_help() -> None:
    command = [sys.executable, "examples/train_sharded.py", "--help"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert "torchrun" in done.stdout

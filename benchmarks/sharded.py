"""Peak memory, bytes and time of steps with classes split over gloo ranks, beside the plan's.

    python -m benchmarks.sharded                         # C = 4,000,000, D = 64 on 4 ranks
    python -m benchmarks.sharded --ranks 2 --classes 1000000 --json FILE

Each rank is a process of one thread. Memory is the growth of the peak resident size (VmHWM) from
before the weight is made, after a warm-up at few classes. The plan's is what a CPU makes: weight,
gradient, momentum, gathered rows, and the backend's block. Linux only.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fused_margin as fm
from benchmarks.memory import _status_bytes, reset_peak
from fused_margin import plan

STEPS = 3
BLOCK = 48 << 20  # of the CPU backend: products kept (40 MiB) and a block of cosines (8)


def _training(setting: plan.Setting) -> tuple[Any, torch.optim.Optimizer]:
    with torch.device("meta"):
        criterion = fm.CosFaceLoss(setting.classes, setting.dim)
    fm.distributed.shard_classes(criterion)
    criterion.to_empty(device="cpu")
    criterion.reset_parameters()
    return criterion, torch.optim.SGD(criterion.parameters(), lr=0.1, momentum=0.9, foreach=False)


def _steps(setting: plan.Setting, count: int) -> tuple[list[float], int]:
    """Seconds of each step, and bytes that this rank sent in the last."""
    criterion, optimizer = _training(setting)
    seconds, sent = [], 0
    for _ in range(count):
        x = torch.randn(setting.rows, setting.dim, requires_grad=True)
        labels = torch.randint(setting.classes, (setting.rows,))
        dist.barrier()
        began = time.perf_counter()
        with fm.distributed.count_traffic() as counted:
            criterion(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        sent = counted.total()
    return seconds, sent


def _rank(rank: int, setting: plan.Setting, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=setting.gpus
    )
    _steps(setting._replace(classes=2000), 2)
    fm.empty_cache()
    before = reset_peak()
    seconds, sent = _steps(setting, STEPS)
    found = {
        "peak_bytes": _status_bytes("VmHWM") - before,
        "sent_bytes": sent,
        "seconds": statistics.median(seconds),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # at once: a thread of gloo that lets go of a tensor while the interpreter ends aborts it
    os._exit(0)


def measure(setting: plan.Setting) -> dict[str, Any]:
    """Largest peak, bytes and median time over the ranks, and what the plan says."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, setting, folder))
            for rank in range(setting.gpus)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"exit codes {[process.exitcode for process in processes]}")
        ranks = [
            json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(setting.gpus)
        ]
    planned = plan.plan(setting)
    memory = sum(planned.memory.values()) - planned.memory["kernels"] + BLOCK
    return {
        "setting": setting._asdict(),
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "planned_bytes": memory,
        "sent_bytes": max(rank["sent_bytes"] for rank in ranks),
        "planned_sent_bytes": planned.sent,
        "seconds": max(rank["seconds"] for rank in ranks),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--classes", type=int, default=4_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--rows", type=int, default=32, help="of each rank")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    results = []
    for ranks in given.ranks:
        setting = plan.Setting(given.classes, given.dim, ranks, rows=given.rows, embeddings="fp32")
        found = measure(setting)
        results.append(found)
        print(
            f"{ranks} ranks: peak {found['peak_bytes'] / 1e6:.1f} MB, planned"
            f" {found['planned_bytes'] / 1e6:.1f}; sent {found['sent_bytes']}, planned"
            f" {found['planned_sent_bytes']}; {found['seconds']:.2f} s a step",
            flush=True,
        )
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

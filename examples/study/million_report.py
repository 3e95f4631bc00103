"""What a training with a million classes reached and took, for people."""

from __future__ import annotations

import math
import statistics
from typing import Any

from .memory import MIB
from .tables import number, text_table


def mib(count: int | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"


def report(run: dict[str, Any], settings: dict[str, Any]) -> str:
    """Say what a run reached, what it took, and what it doesn't show."""
    seen, classes = settings["identities_seen"], settings["classes"]
    titles = {
        "trained": f"the {seen:,} identities trained on",
        "untrained": f"the {classes - seen:,} others",
    }
    table = text_table(
        ("new samples of", "loss before", "after", "accuracy before", "after"),
        [
            [
                title,
                *(number(run[when][name]["loss"]) for when in ("before", "after")),
                *(f"{run[when][name]['accuracy']:.1f} %" for when in ("before", "after")),
            ]
            for name, title in titles.items()
            if run["before"][name] is not None
        ],
    )
    memory = run["memory"]
    how = "measured" if memory["peak_growth_is_exact"] else "at least"
    memory_table = text_table(
        ("memory", "MiB"),
        [
            ["class weights", mib(memory["class_weights"])],
            ["their gradient", mib(memory["gradient"])],
            [f"all else (network, cosines, ...), {how}", mib(memory["above_weights_and_gradient"])],
            ["careful eager code: the loss alone, by formula", mib(memory["eager_by_formula"])],
        ],
    )
    losses, seconds = run["losses"], run["seconds"]
    head = (
        f"{run['loss']}, scale {run['scale']:.2f}: training loss {losses[0]:.2f} in step 1, "
        f"{losses[-1]:.2f} in step {len(losses)}; ln C is {math.log(classes):.2f}"
    )
    times = (
        f"{len(seconds)} steps in {sum(seconds):.0f} s, {run['steps_per_second']:.2f} steps/s; "
        f"measuring {run['measuring_seconds']:.0f} s, "
        f"checkpoints {run['checkpoint_seconds']:.0f} s"
    )
    return "\n".join([head, table, times, memory_table])


def comparison_report(run: dict[str, Any]) -> str:
    rows = [
        [
            title,
            f"{statistics.median(run[name]['seconds']):.2f}",
            mib(run[name]["above_weights_and_gradient"]),
            f"{run[name]['loss']:.5f}",
        ]
        for name, title in (("fused", "fused_margin"), ("eager", "careful eager code"))
    ]
    return text_table(
        ("forward + backward", "seconds", "MiB above weights and gradient", "loss"), rows
    )


def describe_run(run: dict[str, Any], settings: dict[str, Any]) -> str:
    return comparison_report(run) if run["what"] == "comparison" else report(run, settings)

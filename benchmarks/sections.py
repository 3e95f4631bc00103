"""The sections of the report, one for each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import baselines, cpu
from benchmarks.document import (
    SHORT,
    Report,
    Result,
    largest_error,
    milliseconds,
    number,
    provenance,
    ratio,
    title_of,
    versions,
    without_time,
)
from benchmarks.harness import MIB
from benchmarks.scaling import larger_half
from benchmarks.shapes import SHAPES

DEFAULTS = {"n": 256, "c": cpu.CLASSES, "d": cpu.DIM}  # of benchmarks.cpu and benchmarks.losses
PEERS = ("careful", "compiled", "usual", "lce", "lce_chunked")


def _median(rows: Mapping[str, Any], key: str) -> float | None:
    return rows[key]["median_s"] if key in rows else None


def _over(rows: Mapping[str, Any], upper: str, lower: str) -> float | None:
    above, below = _median(rows, upper), _median(rows, lower)
    return None if above is None or below is None else above / below


def _sizes(shape: Mapping[str, int]) -> str:
    """The options of a command that measured a shape."""
    return "".join(f" --{key} {size}" for key, size in shape.items() if size != DEFAULTS[key])


def _floor(rows: Mapping[str, Any]) -> str:
    """The key of the bare products, by the quickest route where that was searched for."""
    return cpu.FLOOR if cpu.FLOOR in rows else "products"


def _is_lower_bound(key: str, row: Mapping[str, Any]) -> bool:
    return bool(row.get("drops_margin", key in baselines.LOWER_BOUNDS))


def _peer_bars(
    path: Path,
    title: str,
    subtitle: str,
    rows: Mapping[str, Mapping[str, Any]],
    floor_ms: float,
    floor_name: str,
) -> None:
    from benchmarks import charts  # matplotlib isn't needed for the document alone

    bars = [
        charts.Bar(row["name"], row["ms"], key.startswith("ours"), _is_lower_bound(key, row))
        for key, row in rows.items()
    ]
    charts.bars(path, title, subtitle, bars, floor_ms, floor_name)


def peers_on_cpu(report: Report, results: Sequence[Result]) -> None:
    """Ratios for every shape, then a table and a chart for each."""
    results = sorted(results, key=lambda one: tuple(one.data["shape"].values()))
    report.add("### Against peers: forward + backward, ArcFace, fp32")
    report.add(
        "Peers' times are divided by ours, ours by that of the three bare products by torch's"
        " quickest route, fp32 by bf16 (bf16 embeddings over fp32 weights)."
    )
    header = ["N", "C", "D", "ours, ms", "ours / floor", "bf16 / its floor"]
    header += [f"{SHORT[key]} / ours" for key in PEERS]
    lines = []
    for result in results:
        rows, shape = result.data["results"], result.data["shape"]
        lines.append(
            [
                *(f"{size:,}" for size in shape.values()),
                milliseconds(_median(rows, "ours")),
                ratio(_over(rows, "ours", _floor(rows))),
                ratio(_over(rows, "ours_bf16", cpu.FLOOR_BF16)),
                *(ratio(_over(rows, key, "ours")) for key in PEERS),
                ratio(_over(rows, "ours", "ours_bf16")),
            ]
        )
    report.table([*header, "fp32 / bf16"], lines, words=0)
    for result in results:
        _peers_of_one_shape(report, result)


def _peers_of_one_shape(report: Report, result: Result) -> None:
    rows, shape = result.data["results"], result.data["shape"]
    title = title_of(shape)
    report.add(f"#### {title}")
    subtitle = f"{result.device}, {versions(result.environment)}"
    products, floor = ("products", cpu.FLOOR, cpu.FLOOR_BF16), _floor(rows)
    bars = {
        key: {**row, "ms": 1e3 * row["median_s"]}
        for key, row in rows.items()
        if key not in products
    }
    report.chart(
        f"{result.stem}.png",
        f"Time of forward + backward against peers, {title}, {result.device}",
        lambda path: _peer_bars(
            path,
            f"ArcFace, forward + backward: {title}, fp32",
            subtitle,
            bars,
            1e3 * rows[floor]["median_s"],
            "three bare products, fp32",
        ),
    )
    lines = []
    for key, row in sorted(rows.items(), key=lambda item: item[1]["median_s"]):
        name = row["name"] + (" \\*" if _is_lower_bound(key, row) else "")
        lines.append(
            [
                f"**{name}**" if key == "ours" else name,
                milliseconds(row["median_s"]),
                milliseconds(row["min_s"]),
                ratio(_over(rows, key, "ours")),
                ratio(_over(rows, floor, key)),
                largest_error(row),
                number(row.get("above_x_w_and_d_w_mib")),
            ]
        )
    report.table(
        ["", "median ms", "min ms", "over ours", "floor / time", "error", "memory MiB"], lines
    )
    search = rows.get("lce_chunked", {}).get("search_s")
    if search:
        tried = ", ".join(f"{rows_} rows {milliseconds(taken)}" for rows_, taken in search.items())
        own = rows["lce_chunked"].get("own_choice_s")
        report.add(
            f"One step of F.linear_cross_entropy by its chunk, ms: {tried}"
            + (f"; its own choice {milliseconds(own)}." if own is not None else ".")
        )
    for key in (cpu.FLOOR, cpu.FLOOR_BF16):
        if key in rows:
            tried = rows[key]["search_s"].items()
            listed = "; ".join(f"{route} {milliseconds(taken)}" for route, taken in tried)
            report.add(f"The three products{', bf16' * (key != cpu.FLOOR)}, ms: {listed}.")
    without_time(report, result.data.get("without_time", {}))
    command = f"python -m benchmarks.cpu{_sizes(shape)} --rounds {result.data['rounds']}"
    if "processes" in result.data:
        command += f" --processes {result.data['processes']}"
    report.add(provenance(result, command))


def peak_memory(report: Report, results: Sequence[Result]) -> None:
    """One row for each run of benchmarks.memory."""
    report.add("### Peak memory of forward + backward")
    lines = []
    for result in results:
        data = result.data
        mode = data["benchmark"].rpartition(", ")[2]
        lines.append(
            [
                SHORT[data.get("contender", "ours")],
                mode,
                *(f"{size:,}" for size in data["shape"].values()),
                number(data["above_x_w_and_d_w_mib"]),
                number(data.get("eager_by_formula_mib")),
            ]
        )
    header = ["", "dtype", "N", "C", "D", "memory MiB", "eager MiB, by formula"]
    report.table(header, lines, words=2)
    for result in results:
        sizes = "".join(f" --{key} {size}" for key, size in result.data["shape"].items())
        chosen = result.data.get("contender", "ours")
        who = "" if chosen == "ours" else f" --contender {chosen}"
        report.add(provenance(result, f"python -m benchmarks.memory{sizes}{who}"))


def scaling(report: Report, results: Sequence[Result]) -> None:
    """Charts, slopes and the points of each scaling study."""
    for result in results:
        report.add("### Growth with C and with N: forward + backward, ArcFace, fp32")
        by_sweep: dict[str, list[dict[str, Any]]] = {"classes": [], "rows": []}
        for point in result.data["points"]:
            by_sweep[point["sweep"]].append(point)
        for sweep, size_key in (("classes", "c"), ("rows", "n")):
            points = sorted(by_sweep[sweep], key=lambda point: point[size_key])
            if points:
                slopes = result.data["slopes"][sweep]
                _scaling_sweep(report, result, sweep, size_key, points, slopes)
        report.add(provenance(result, "python -m benchmarks.scaling --save"))


def _scaling_sweep(
    report: Report,
    result: Result,
    sweep: str,
    size_key: str,
    points: Sequence[Mapping[str, Any]],
    slopes: Mapping[str, float | None],
) -> None:
    first, other = points[0], {"c": "n", "n": "c"}[size_key]
    symbol = size_key.upper()
    fixed = f"{other.upper()} = {first[other]:,}, D = {first['d']}"
    what = {"classes": "classes C", "rows": "batch rows N"}[sweep]

    def chart(quantity: str, unit: str, read: Reader) -> None:
        subtitle = f"{result.device}, {versions(result.environment)}; ArcFace, fp32"
        report.chart(
            f"{result.stem}-{sweep}-{quantity.split()[0].lower()}.png",
            f"{quantity} against {what}, {fixed}, {result.device}",
            lambda path: _growth_chart(
                path, f"{quantity}: {fixed}", subtitle, (what, unit), points, size_key, read
            ),
        )

    chart("Time of forward + backward", "ms", _times)
    stated = []
    for key, slope in slopes.items():
        half = larger_half(sorted(p[size_key] for p in points if key in p["results"]))
        if slope is not None:
            stated.append(f"{SHORT[key]} {symbol}^{slope:.2f} ({half[0]:,} to {half[-1]:,})")
    if stated:
        report.add(
            f"Time grows as: {', '.join(stated)}. That is the slope of the fitted line in the"
            " logarithms, over the larger half of the sizes that each was measured at."
        )
    if any(_peak(point, "ours")[0] is not None for point in points):
        chart("Memory above x, W and dW", "MiB", _peak)
    lines = []
    for point in points:
        rows = point["results"]
        eager, is_formula = _peak(point, "careful")
        lines.append(
            [
                f"{point[size_key]:,}",
                *(milliseconds(_median(rows, key)) for key in ("ours", "careful", "products")),
                ratio(_over(rows, "ours", "products")),
                ratio(_over(rows, "careful", "ours")),
                number(_peak(point, "ours")[0]),
                number(eager) + (" (formula)" if is_formula else ""),
            ]
        )
    header = [symbol, "ours, ms", "eager, ms", "products, ms", "ours / floor", "eager / ours"]
    report.table([*header, "ours, MiB", "eager, MiB"], lines, words=0)


Reader = Callable[[Mapping[str, Any], str], tuple[float | None, bool]]


def _times(point: Mapping[str, Any], key: str) -> tuple[float | None, bool]:
    seconds = _median(point["results"], key)
    return (None if seconds is None else 1e3 * seconds), False


def _peak(point: Mapping[str, Any], key: str) -> tuple[float | None, bool]:
    """MiB above the inputs and d_w, and whether by formula."""
    found = point["memory"].get(key, {})
    if "above_x_w_and_d_w_mib" in found:
        # a step that stays inside the memory freed before shows as nothing, or less
        return max(found["above_x_w_and_d_w_mib"], 0.0), False
    by_formula = found.get("by_formula_mib")
    return by_formula, by_formula is not None


def _growth_chart(
    path: Path,
    title: str,
    subtitle: str,
    labels: tuple[str, str],
    points: Sequence[Mapping[str, Any]],
    size_key: str,
    read: Reader,
) -> None:
    from benchmarks import charts

    styles = {
        "careful": (charts.VERMILION, "s"),
        "ours": (charts.BLUE, "o"),
        "products": (charts.GREY, "^"),
    }
    lines = []
    for key, (color, marker) in styles.items():
        found = [(point[size_key], *read(point, key)) for point in points]
        known = [(size, value, flag) for size, value, flag in found if value]  # logarithms
        if known:
            sizes, values, flags = zip(*known, strict=True)
            lines.append(charts.Line(SHORT[key], sizes, values, flags, color, marker))
    charts.growth(path, title, subtitle, *labels, lines)


def _order_of_group(group: tuple[str, ...]) -> tuple[int, ...]:
    orders = (tuple(SHAPES), baselines.LOSSES, baselines.MODES, ("forward", "step"))
    return tuple(order.index(word) for order, word in zip(orders, group, strict=True))


def named_shapes(report: Report, results: Sequence[Result]) -> None:
    """One line for each shape, loss, dtype and work of `make bench`."""
    for result in results:
        report.add("### Named shapes")
        report.add("Peers' times are divided by ours; floor / time is ours.")
        groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
        for row in result.data["rows"]:
            group = tuple(row[key] for key in ("shape_name", "loss", "dtype", "work"))
            groups.setdefault(group, {})[row["contender"]] = row
        lines = []
        for group in sorted(groups, key=_order_of_group):
            shape, loss, mode, work = group
            rows = groups[group]
            ours = rows.get("ours")
            lines.append(
                [
                    shape,
                    baselines.LOSS_NAMES[loss],
                    mode,
                    "forward + backward" if work == "step" else work,
                    milliseconds(_median(rows, "ours")),
                    "–" if ours is None else f"{ours['fraction_of_floor']:.0%}",
                    *(ratio(_over(rows, key, "ours")) for key in PEERS),
                ]
            )
        header = ["shape", "loss", "dtype", "work", "ours, ms", "floor / time"]
        report.table([*header, *(SHORT[key] for key in PEERS)], lines, words=4)
        report.add(provenance(result, "make bench"))


def on_gpu(report: Report, results: Sequence[Result]) -> None:
    """Comparisons with the peers of each run of benchmarks.gpu."""
    for result in results:
        for key, step in result.data["steps"].items():
            if key.startswith("baselines/") and "rows" in step:
                _gpu_comparison(report, result, key, step)
        _gpu_kernels(report, result)
        report.add(provenance(result, "python -m benchmarks.gpu --out DIR"))


def _gpu_kernels(report: Report, result: Result) -> None:
    """Device time of each kernel in a step."""
    steps = {
        key.partition("/")[2]: step["step"]
        for key, step in result.data["steps"].items()
        if key.startswith("kernels/") and step.get("step")
    }
    if not steps:
        return
    report.add("### Kernels of a step, ms (launches)")
    names = dict.fromkeys(
        name for step in steps.values() for name in step if name.endswith("_kernel")
    )
    lines = [
        [
            f"`{name}`",
            *(
                f"{number(step[name]['ms'])} ({step[name]['count']})" if name in step else "–"
                for step in steps.values()
            ),
        ]
        for name in names
    ]
    report.table(["", *(key.partition("/")[0] for key in steps)], lines)


def _gpu_comparison(report: Report, result: Result, key: str, step: Mapping[str, Any]) -> None:
    _, shape, mode = key.split("/")
    sizes = step["shape"]
    title = title_of({"n": sizes["num_rows"], "c": sizes["num_classes"], "d": sizes["dim"]})
    report.add(f"### {shape}, {mode}: forward + backward ({title})")
    timed = {
        name: {**row, "ms": row["step"]["median_ms"]}
        for name, row in step["rows"].items()
        if row.get("step")
    }
    reasons = {
        name: row.get("message", row.get("status", "not run"))
        for name, row in step["rows"].items()
        if name not in timed
    }
    if timed:
        floor = next(iter(timed.values()))["floor"]["step_ms"]
        report.chart(
            f"{result.stem}-{shape}-{mode}.png",
            f"Time of forward + backward against peers, {title}, {result.device}",
            lambda path: _peer_bars(
                path,
                f"{shape}, {mode}: {title}",
                f"{result.device}, {versions(result.environment)}",
                timed,
                floor,
                "floor by the cost model",
            ),
        )
        ours = timed.get("ours", {}).get("ms")
        lines = []
        for name, row in sorted(timed.items(), key=lambda item: item[1]["ms"]):
            extra = row.get("extra_bytes")
            starred = row["name"] + (" \\*" if _is_lower_bound(name, row) else "")
            lines.append(
                [
                    f"**{starred}**" if name == "ours" else starred,
                    number(row["ms"]),
                    ratio(None if ours is None else row["ms"] / ours),
                    ratio(row["floor"]["step_ms"] / row["ms"]),
                    largest_error(row),
                    number(None if extra is None else extra / MIB),
                ]
            )
        header = ["", "median ms", "over ours", "floor / time", "error", "memory MiB"]
        report.table(header, lines)
    without_time(report, reasons)


def losses(report: Report, results: Sequence[Result]) -> None:
    """One table of each run of benchmarks.losses, a row for each loss or option."""
    for result in results:
        data = result.data
        report.add(
            f"### What losses and options cost: forward + backward, {title_of(data['shape'])}"
        )
        report.add("Times that of the plain loss, by the median of the ratios of each round.")
        lines = [
            [name, row["kind"], row["over"], milliseconds(row["median_s"]), ratio(row["times"])]
            for name, row in data["results"].items()
        ]
        report.table(["", "it", "over", "median ms", "times"], lines, words=3)
        command = f"python -m benchmarks.losses{_sizes(data['shape'])} --rounds {data['rounds']}"
        report.add(provenance(result, command))


SECTIONS: dict[str, Callable[[Report, Sequence[Result]], None]] = {
    "cpu": peers_on_cpu,
    "losses": losses,
    "scaling": scaling,
    "memory": peak_memory,
    "shapes": named_shapes,
    "gpu": on_gpu,
}

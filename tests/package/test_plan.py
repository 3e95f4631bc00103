"""The planner's formulas by hand, its advice, and the tables of docs/scaling.md."""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_margin as fm
from fused_margin import _in_backward, plan
from fused_margin._centers import nearest_centers
from fused_margin.distributed import bytes_per_step


def said_of(setting: plan.Setting) -> str:
    return " ".join(one.said for one in plan.advice(setting))


DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
PLANNED = plan.Setting(100_000_000, 512, 64)


def test_formulas() -> None:
    found = plan.plan(PLANNED._replace(rows=10, optimizer="adam", embeddings="bf16"))
    shard = 1_562_500 * 512 * 4
    assert found.memory["class weights"] == found.memory["gradient"] == shard
    assert found.memory["optimiser state"] == 2 * shard
    assert found.memory["all embeddings, gradient"] == 640 * 512 * 6
    assert found.sent == 63 * (10 * (2 * 2 * 512 + 72) + 24)
    assert found.seconds["products"] == 8 * 640 * 1_562_500 * 512 / 200e12
    assert found.seconds["sending"] == found.sent / 50e9
    assert found.seconds["latency"] == pytest.approx(9 * 63 * 5e-6)
    assert found.memory["copies during a step"] == shard
    assert found.memory["kernels"] == 128 << 20
    many = plan.plan(PLANNED._replace(gpus=1024))  # whose partial sums of d_x are more than that
    assert many.memory["kernels"] == (64 << 20) + 4 * 1024 * 128 * 512


def test_sampling_takes_its_share() -> None:
    full, sampled = plan.plan(PLANNED), plan.plan(PLANNED._replace(rate=0.1))
    assert sampled.memory["gradient"] * 10 == full.memory["gradient"]
    assert sampled.memory["class weights"] == full.memory["class weights"]
    assert sampled.seconds["products"] * 10 == pytest.approx(full.seconds["products"])
    fewest = plan.plan(PLANNED._replace(rate=1e-9))
    assert fewest.memory["gradient"] == PLANNED.rows * 512 * 4
    adam = plan.plan(PLANNED._replace(rate=0.1, optimizer="adam"))
    assert adam.memory["optimiser state"] == 1_562_500 * (2 * 512 * 4 + 4)  # updates of each row


def test_without_a_gradient() -> None:
    full = plan.plan(PLANNED)
    within = plan.plan(PLANNED._replace(in_backward=True))
    half = plan.plan(PLANNED._replace(in_backward=True, weights="bf16"))
    assert within.memory["gradient"] == half.memory["gradient"] == plan.BLOCK
    assert within.memory["copies during a step"] == 0
    assert half.memory["copies during a step"] == 5 * plan.BLOCK
    for name in ("class weights", "optimiser state"):
        assert within.memory[name] == full.memory[name] == 2 * half.memory[name]


def test_sub_centers_are_so_many_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Memory and time of as many classes, but what each class has once."""
    several = plan.plan(PLANNED._replace(sub_centers=3))
    rows = plan.plan(PLANNED._replace(classes=3 * PLANNED.classes))
    for_targets = 64 * 128 * 512 * plan.TARGETS
    assert several.memory == rows.memory | {"targets' nearest centres": for_targets}
    assert several.seconds == rows.seconds
    assert several.sent == rows.sent
    assert "sampled" not in said_of(PLANNED._replace(sub_centers=3))
    line = ["--classes", "1e6", "--dim", "512", "--gpus", "4", "--sub-centers", "3"]
    assert plan.main(line) == 0
    assert re.search(r"class weights +1\.54 GB", capsys.readouterr().out)
    for wrong, said in (
        (["--rate", "0.1"], "sampled negatives can't be had with sub-centres"),
        (["--gpus", "7"], "use a number of classes that is a multiple of 7"),
    ):
        with pytest.raises(SystemExit):
            plan.main([*line, *wrong])
        assert said in " ".join(capsys.readouterr().err.split())


def test_nothing_sent_grows_with_classes() -> None:
    assert plan.plan(PLANNED).sent == plan.plan(PLANNED._replace(classes=64)).sent
    assert bytes_per_step(5, 7, 1) == 0
    assert bytes_per_step(5, 7, 3, torch.float64) == 2 * (5 * (2 * 7 * 8 + 72) + 24)


def test_fewest_gpus() -> None:
    setting = PLANNED._replace(classes=10**9)
    assert not plan.fits(setting)
    count = plan.fewest_gpus(setting)
    assert count is not None
    assert plan.fits(setting._replace(gpus=count))
    assert not plan.fits(setting._replace(gpus=count - 1))
    assert plan.fewest_gpus(setting._replace(gpu_memory=16.001e9)) is None
    cut = setting._replace(sub_centers=3, gpus=64)  # not every number leaves a class whole
    count = plan.fewest_gpus(cut)
    assert count is not None
    assert plan.fits(cut._replace(gpus=count))
    assert plan.refusal(cut._replace(gpus=count)) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "the whole step would take 30 ms: --rate 0.1"),
        ({"classes": 10**6, "gpus": 32}, "It fits as it is."),
        ({"classes": 10**6}, "Communication takes 3.2 of 5.9 ms, 2.8 of it latency: split the"),
        ({"classes": 10**9}, "It fits on 97 GPUs."),
        ({"classes": 10**9, "gpu_memory": 90e9}, "It fits with sampled negatives"),
        ({"classes": 10**9, "optimizer": "adam", "gpu_memory": 115e9}, "SGD and momentum"),
        ({"classes": 10**5, "gpus": 1024}, "51.6 of 51.9 ms, 46.0 of it latency: split the"),
        ({"classes": 10**5, "gpus": 1023}, "four times the rows on each GPU"),
        ({"classes": 10**9, "optimizer": "adam", "gpu_memory": 90e9}, "another optimiser than"),
        ({"classes": 10**9, "optimizer": "adam", "gpu_memory": 50e9}, "another optimiser than"),
        ({"classes": 10**9, "optimizer": "adam", "gpu_memory": 170e9}, "fm.optim.RowSparseAdam"),
    ],
)
def test_advice(change: dict[str, Any], said: str) -> None:
    assert said in said_of(PLANNED._replace(**change))


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--classes", "1e8", "--dim", "512", "--gpus", "64", "--gpu-memory", "80"]
    assert plan.main(line) == 0
    text = capsys.readouterr().out
    assert "100,000,000 classes x 512 on 64 GPUs: 1,562,500 classes and 128 rows each" in text
    assert re.search(r"total +9\.77 GB  of 80\.00 GB less 16\.00 GB reserved", text)
    assert plan.main([*line, "--gpu-memory", "20"]) == 1
    assert "It doesn't fit." in capsys.readouterr().out


WHOLE = ("--classes", "--dim", "--gpus", "--copies", "--rows", "--sub-centers")
REAL = ("--gpu-memory", "--reserved", "--network", "--latency", "--products", "--memory-rate")
NO_NUMBERS = ("x", "", "nan", "inf", "-1", "-0.5", "1e300", "1e999999999", "1e-300")


@pytest.mark.parametrize("option", [*WHOLE, *REAL, "--rate"])
def test_numbers_out_of_range(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut: what was given is named, and what is allowed."""
    wrong = [*NO_NUMBERS]
    wrong += ["1.5", "0"] if option in WHOLE else []
    if option == "--rate":
        wrong = [text for text in wrong if text != "1e-300"] + ["0", "1.0001", "2"]
    if option in ("--gpu-memory", "--network", "--products", "--memory-rate"):
        wrong += ["0"]
    for text in wrong:
        with pytest.raises(SystemExit):
            plan.parse_arguments(["--classes=9", "--dim=9", "--gpus=1", f"{option}={text}"])
        said = " ".join(capsys.readouterr().err.split())
        assert f"argument {option}: expected " in said, text
        assert said.endswith(f"got {text!r}")
        assert re.search(r"from [\d.]+ to [\d,]+ ?|above 0 and at most 1", said)


def test_numbers_are_exact() -> None:
    line = ["--dim=1e2", "--gpus=1", "--reserved=0", "--latency=0", "--rate=1e-300"]
    setting = plan.parse_arguments(["--classes=900719925474993", *line])
    assert setting.classes == 900_719_925_474_993
    assert (setting.dim, setting.reserved, setting.latency) == (100, 0.0, 0.0)
    assert plan.report(setting)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--in-backward --rate 0.1", "--in-backward updates all classes; leave --rate"),
        ("--in-backward --optimizer adam", "not adam; give --optimizer momentum"),
        ("--in-backward --copies 2", "leave --copies, and split the classes over all GPUs"),
        ("--rate 0.5 --copies 2", "sampled negatives can't be had with copies"),
        ("--rate 0.5 --sub-centers 2", "sampled negatives can't be had with sub-centres"),
        ("--weights bf16", "--weights bf16 needs --in-backward"),
        ("--weights bf16 --in-backward --embeddings fp32", "needs --embeddings bf16, got fp32"),
        ("--weights bf16 --in-backward --embeddings fp16", "needs --embeddings bf16, got fp16"),
        ("--sub-centers 2 --gpus 3", "use a number of classes that is a multiple of 3"),
        ("--classes 1e15 --dim 1e6", "more numbers than a tensor can have"),
    ],
)
def test_what_does_not_go_together(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--classes", "1000", "--dim", "8", "--gpus", "2", *options.split()])
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_setting_that_the_package_refuses() -> None:
    with pytest.raises(ValueError, match="needs --in-backward"):
        plan.plan(PLANNED._replace(weights="bf16"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_package_takes_bf16_weights_with_bf16_embeddings_alone(dtype: torch.dtype) -> None:
    criterion = fm.ArcFaceLoss(5, 4, dtype=torch.bfloat16)
    labels = torch.tensor([0, 1])
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16 but embeddings are"):
        criterion(torch.randn(2, 4, dtype=dtype), labels)
    criterion(torch.randn(2, 4, dtype=torch.bfloat16), labels)


def options(setting: plan.Setting) -> list[str]:
    """The command line of a setting."""
    units = {"gpu_memory": 1e9, "reserved": 1e9, "network": 1e9, "latency": 1e-6}
    units |= {"products": 1e12, "memory_rate": 1e9}
    line = []
    for name, value in setting._asdict().items():
        option = f"--{name.replace('_', '-')}"
        if name == "in_backward":
            line += [option] if value else []
        else:
            line += [option, str(value / units[name] if name in units else value)]
    return line


GRID = [
    plan.Setting(
        int(classes), 512, gpus, optimizer=optimizer, in_backward=in_backward, rate=rate,
        weights=weights, embeddings=embeddings, sub_centers=centers, copies=copies,
        gpu_memory=memory,
    )
    for classes, gpus, optimizer, in_backward, rate, weights, embeddings, centers, copies, memory
    in itertools.product(
        (96_000, 1e7, 1e9), (1, 64, 1000), plan.STATES, (False, True), (1.0, 0.1), plan.WEIGHTS,
        ("bf16", "fp32"), (1, 3), (1, 4), (17e9, 80e9),
    )
]  # fmt: skip


def test_each_advice_works() -> None:
    """It is accepted beside all that was asked for, and does what it says."""
    kinds = set()
    for setting in GRID:
        if plan.refusal(setting) is not None:
            with pytest.raises(ValueError, match=re.escape(plan.refusal(setting) or "")):
                plan.plan(setting)
            continue
        for one in plan.advice(setting):
            after = one.setting
            kinds.add((one.gain, setting.in_backward, setting.rate < 1, setting.copies > 1))
            if after is None:
                assert not one.gain
                continue
            assert plan.parse_arguments(options(after)) == after
            if one.gain == "fits":
                assert not plan.fits(setting)
                assert plan.fits(after)
            else:
                shorter = after.rows / setting.rows if one.gain == "time of a row" else 1.0
                assert plan.seconds(after) < shorter * plan.seconds(setting)
                assert plan.fits(after) or not plan.fits(setting)
            assert after.gpus * after.copies == setting.gpus * setting.copies or " GPUs" in one.said
            for name in ("optimizer", "in_backward", "rate", "weights", "embeddings", "copies"):
                if getattr(after, name) != getattr(setting, name):
                    assert f"--{name.replace('_', '-')}" in one.said
            if setting.optimizer == "adam" and after.in_backward:
                assert "which is SGD with momentum, another optimiser than Adam" in one.said
    assert {gain for gain, *_ in kinds} == {"", "fits", "time", "time of a row"}
    assert len(kinds) > 12


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    tensors = (one for one in tree_leaves(tree) if isinstance(one, torch.Tensor))
    return [one.untyped_storage() for one in tensors if one.layout is torch.strided]


class Live(TorchDispatchMode):
    """The most bytes of tensors made in here that are there at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: dict[int, Any] = {}

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        self.known.pop(key)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(found):
            key, size = storage._cdata, storage.nbytes()
            if key in given or key in self.known:
                continue
            self.known[key] = weakref.finalize(storage, self._drop, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)
        return found


def peak(call: Callable[[], Any]) -> int:
    with Live() as live:
        call()
    return live.peak


@pytest.mark.parametrize("optimizer", list(plan.STATES))
def test_copies_that_a_step_makes(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of torch's optimisers, and of those of sampled rows, whose gradient is one more.

    As a GPU does it, all rows together.
    """
    monkeypatch.setattr(fm.optim, "_updates_in_cache", lambda tensor: False)
    count, dim, taken = 1000, 64, 100
    makes: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "sgd": (lambda p: torch.optim.SGD(p, 0.1, foreach=True), fm.optim.RowSparseSGD),
        "momentum": (
            lambda p: torch.optim.SGD(p, 0.1, 0.9, foreach=True),
            lambda p: fm.optim.RowSparseSGD(p, 0.1, 0.9),
        ),
        "adam": (lambda p: torch.optim.Adam(p, foreach=True), fm.optim.RowSparseAdam),
    }
    dense, sparse = makes[optimizer]
    index = torch.arange(0, count, count // taken)
    for make, rows, copies in (
        (dense, count, plan.COPIED[optimizer]),
        (sparse, taken, plan.COPIED_ROWS[optimizer]),
    ):
        weight = torch.nn.Parameter(torch.randn(count, dim))
        made = make([weight])
        values = torch.randn(rows, dim)
        if rows == count:
            weight.grad = values
        else:
            weight.grad = torch.sparse_coo_tensor(
                index[None], values, weight.shape, is_coalesced=True, check_invariants=True
            )
        made.step()  # which makes the state
        found = peak(made.step) / (rows * dim * 4) - (rows == taken)
        assert copies <= found < copies + 0.25
        state = sum(v.nbytes for v in made.state[weight].values() if v.numel() > 1)
        kept = {"sgd": 0, "momentum": 1, "adam": 2}[optimizer] * count * dim * 4
        assert state == kept + (4 * count if rows == taken and optimizer == "adam" else 0)


def test_what_rounding_to_bf16_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does it, all rows of a block together."""
    monkeypatch.setattr(_in_backward, "_ROUNDED_AT_A_TIME", 1 << 40)
    w, velocity = (torch.randn(1000, 64).bfloat16() for _ in range(2))
    rounding = _in_backward._Rounding(_in_backward._Weights(w, velocity, 0.1, 0.9, 0.0, 1.0), 1)
    rounding.elsewhere = torch.Generator()
    grad = torch.randn(1000, 64)
    found = peak(lambda: rounding.update(0, grad)) / grad.nbytes
    assert plan.ROUNDED - 1 < found <= plan.ROUNDED


@pytest.mark.parametrize("centers", [2, 3])
def test_what_targets_of_sub_centers_take(centers: int) -> None:
    x, w, labels = torch.randn(2000, 256), torch.randn(50 * centers, 256), torch.arange(2000) % 50
    found = peak(lambda: nearest_centers(x, w, labels, centers)) / x.numel()
    assert found == pytest.approx(plan.TARGETS, rel=0.02)


def test_copies_of_classes() -> None:
    """The mean of gradients is sent, and made of a copy; the rest is that of one mesh dimension."""
    one, four = plan.plan(PLANNED), plan.plan(PLANNED._replace(copies=4))
    shard = one.memory["gradient"]
    assert four.sent == one.sent + 2 * 3 * shard // 4
    assert four.memory == one.memory | {"copies during a step": shard}
    assert four.seconds["averaging copies"] == pytest.approx((four.sent - one.sent) / 50e9)
    assert four.seconds["latency"] == pytest.approx(one.seconds["latency"] + 6 * 5e-6)


def test_table_of_the_document() -> None:
    rows = [line for line in DOCUMENT.splitlines() if re.match(r"\| [\d,]+ \| [\d.]+ GB", line)]
    assert len(rows) == 5
    for row in rows:
        first, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        for gpus, cell in zip((1, 8, 64, 256, 1024), cells, strict=True):
            found = plan.plan(plan.Setting(int(first.replace(",", "")), 512, gpus))
            memory, time = sum(found.memory.values()) / 1e9, 1e3 * sum(found.seconds.values())
            assert cell == f"{memory:.1f} GB, {time:.0f} ms"


def test_measured_bytes_of_the_document() -> None:
    """Peaks within 5 % of the plan, and bytes equal."""
    lines = [line for line in DOCUMENT.splitlines() if re.search(r"\| [−+][\d.]+ % \|", line)]
    assert len(lines) == 5
    rows = 0
    for line in lines:
        what, _, peak, planned, share, sent, expected = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        rows += bool(what)
        ratio = 100 * (float(peak) / float(planned) - 1)
        assert f"{ratio:.1f} %".replace("-", "−") == share
        assert abs(ratio) < 5
        assert sent == expected
    assert rows == 2


def test_what_more_gpus_can_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Too many hold too many gathered rows; and no number helps where all memory is reserved."""
    few = ["--classes", "1e7", "--dim", "512", "--gpus", "1", "--gpu-memory", "80"]
    assert plan.main([*few, "--reserved", "79"]) == 1
    assert "It fits on " in capsys.readouterr().out
    assert plan.main([*few, "--reserved", "80"]) == 1
    assert "which leaves nothing: set --reserved" in capsys.readouterr().out

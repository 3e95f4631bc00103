"""insightface's files of each rank as one weight, whole or sharded; and what is refused."""

from __future__ import annotations

import math
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rank_files as files
import torch
from rank_files import MOMENTUM, SQUARES, C, D, rows, written
from two_processes import Pair

import fused_margin as fm
from fused_margin import _rank_files, convert
from fused_margin.compat import insightface, pml
from fused_margin.distributed._shards import bounds

KINDS = ("checkpoint", "softmax_fc", "tensor")


@pytest.mark.parametrize("ranks", [1, 2, 3, 12, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_merged(tmp_path: Path, kind: str, ranks: int) -> None:
    """Ranks from 10 on sort before the second by name; those beyond C have no classes."""
    written(tmp_path / "run", ranks, kind)
    assert torch.equal(convert.merge_rank_files(tmp_path / "run", C), rows())
    names = sorted((tmp_path / "run").glob("*[0-9].pt")) or sorted(
        (tmp_path / "run").glob("*weight.pt")
    )
    assert torch.equal(convert.merge_rank_files(names[::-1], C), rows())


def test_other_names_and_mappings_in_the_order_of_ranks(tmp_path: Path) -> None:
    written(tmp_path, 3)
    paths = [
        Path(shutil.copy(tmp_path / f"checkpoint_gpu_{rank}.pt", tmp_path / name))
        for rank, name in enumerate(("c.pt", "a.pt", "b.pt"))
    ]
    assert torch.equal(convert.merge_rank_files(paths, C), rows())
    mappings = [torch.load(path, weights_only=True) for path in paths]
    assert torch.equal(convert.merge_rank_files(mappings, C), rows())
    with pytest.raises(ValueError, match="aren't in the order of ranks"):
        convert.merge_rank_files([paths[2], *paths[:2]], C)


def test_files_of_the_old_format(tmp_path: Path) -> None:
    for rank, part in enumerate(rows().tensor_split(3)):
        path = tmp_path / f"rank_{rank}_softmax_weight.pt"
        torch.save(part.clone(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(convert.merge_rank_files(tmp_path, C), rows())


@pytest.mark.parametrize(
    "make",
    [
        lambda: fm.ArcFaceLoss(C, D),
        lambda: fm.CosFaceLoss(C, D, dtype=torch.bfloat16),
        lambda: insightface.PartialFC_V2(insightface.CosFace(), D, C),
        lambda: pml.ArcFaceLoss(C, D),
    ],
)
def test_into_a_criterion_with_momentum(tmp_path: Path, make: Callable[[], Any]) -> None:
    written(tmp_path, 4)
    criterion = make()
    optimizer = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
    told = convert.load_rank_files(criterion, tmp_path, optimizer)
    assert told == (4, 3, 40, ("momentum_buffer",))
    (parameter,) = criterion.parameters()
    buffer = optimizer.state[parameter]["momentum_buffer"]
    for found, expected in ((parameter.detach(), rows()), (buffer, MOMENTUM)):
        found = found if found.shape == (C, D) else found.t()
        assert torch.equal(found, expected.to(parameter.dtype))
    assert buffer.stride() == parameter.stride()
    criterion(torch.randn(3, D, dtype=parameter.dtype), torch.tensor([0, 5, 22])).backward()
    optimizer.step()


def test_momentum_beside_the_oldest_files(tmp_path: Path) -> None:
    written(tmp_path, 3, "tensor")
    criterion = fm.ArcFaceLoss(C, D)
    optimizer = fm.optim.RowSparseSGD(criterion.parameters(), 0.1, 0.9)
    told = convert.load_rank_files(criterion, tmp_path, optimizer)
    assert told == (3, None, None, ("momentum_buffer",))
    assert torch.equal(optimizer.state[criterion.weight]["momentum_buffer"], MOMENTUM)


@pytest.mark.parametrize("fused", [False, True])
def test_adam(tmp_path: Path, fused: bool) -> None:
    """Goes on as Adam with these moments does."""
    written(tmp_path, 4, optimizer="adamw")
    criterion = fm.ArcFaceLoss(C, D)
    optimizer = torch.optim.AdamW(criterion.parameters(), 0.1, fused=fused)
    convert.load_rank_files(criterion, tmp_path, optimizer)
    other = torch.nn.Parameter(rows())
    expected = torch.optim.AdamW([other], 0.1)
    expected.state[other] = {
        "step": torch.tensor(40.0), "exp_avg": MOMENTUM.clone(), "exp_avg_sq": SQUARES.clone(),
    }  # fmt: skip
    sparse = fm.ArcFaceLoss(C, D)
    by_row = fm.optim.RowSparseAdam(sparse.parameters(), 0.1)
    convert.load_rank_files(sparse, tmp_path, by_row)
    plain = torch.nn.Parameter(rows())
    adam = torch.optim.Adam([plain], 0.1)
    adam.state[plain] = {name: value.clone() for name, value in expected.state[other].items()}
    for parameter in (criterion.weight, other, sparse.weight, plain):
        parameter.grad = rows(5)
    for one in (optimizer, expected, by_row, adam):
        one.step()
    torch.testing.assert_close(criterion.weight.detach(), other.detach())
    torch.testing.assert_close(sparse.weight.detach(), plain.detach())


def _edited(path: Path, change: Callable[[Any], Any]) -> None:
    value = torch.load(path, weights_only=True)
    torch.save(change(value), path)


def _set(*keys: Any, to: Any) -> Callable[[Any], Any]:
    def change(value: Any) -> Any:
        inner = value
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("epoch", to=4), r"different runs or times.*checkpoint_gpu_1|gpu_1.*different runs"),
        (_set("global_step", to=41), "different runs or times"),
        (_set("state_dict_softmax_fc", "weight", to=torch.zeros(6, D + 1)), "different runs"),
        (_set("state_dict_softmax_fc", "weight", to=torch.zeros(6, D).half()), "torch.float16"),
        (_set("state_dict_softmax_fc", "weight", to=torch.zeros(5, D)), "has 5 classes, where"),
        (_set("state_dict_softmax_fc", to={"W": 1}), "has no class weights"),
        (lambda value: [value], r"checkpoint_gpu_1\.pt must hold a mapping .* holds an object of"),
        (_set("epoch", to="three"), r"checkpoint_gpu_1\.pt is damaged.*epoch is of type str"),
        (_set("global_step", to=torch.zeros(2)), r"gpu_1\.pt is damaged.*global_step is of type T"),
    ],
)
def test_files_of_different_runs(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    written(tmp_path, 4)  # of 6, 6, 6 and 5 classes
    _edited(tmp_path / "checkpoint_gpu_1.pt", change)
    with pytest.raises((ValueError, TypeError), match=message):
        convert.merge_rank_files(tmp_path, C)


def test_missing_and_other_files(tmp_path: Path) -> None:
    written(tmp_path, 4)
    with pytest.raises(ValueError, match=r"has 6 classes, where its rank of 4 had 7"):
        convert.merge_rank_files(tmp_path, C + 4)
    criterion = fm.ArcFaceLoss(C, D)
    before = criterion.weight.detach().clone()
    (tmp_path / "checkpoint_gpu_3.pt").unlink()  # the last: only the number of classes tells
    with pytest.raises(
        ValueError,
        match=r"files of 3 ranks, 0 to 2, are there,.* of 4 ranks.*missing, rank 3\. Else",
    ):
        convert.load_rank_files(criterion, tmp_path)
    (tmp_path / "checkpoint_gpu_1.pt").rename(tmp_path / "checkpoint_gpu_4.pt")
    with pytest.raises(ValueError, match=r"ranks \[1, 3\] are missing, \[0, 2, 4\] are th"):
        convert.load_rank_files(criterion, tmp_path)
    assert torch.equal(criterion.weight, before)
    other = written(tmp_path / "other", 4)
    with pytest.raises(ValueError, match=r"ranks \[0\] are there more than once"):
        convert.merge_rank_files([*other.iterdir(), tmp_path / "checkpoint_gpu_0.pt"], C)
    written(other, 2, "softmax_fc")
    with pytest.raises(ValueError, match="files of several kinds"):
        convert.merge_rank_files(other, C)
    with pytest.raises(ValueError, match=r"has no file of a rank, as checkpoint_gpu_0.pt"):
        convert.merge_rank_files(_empty(tmp_path), C)
    with pytest.raises(TypeError, match="must be a folder or a list"):
        convert.merge_rank_files({"weight": rows()}, C)
    with pytest.raises(ValueError, match="num_classes must be >= 2"):
        convert.merge_rank_files(other, 1)
    with pytest.raises(ValueError, match=r"weights of D = 6, the criterion of 7"):
        convert.load_rank_files(fm.ArcFaceLoss(C, D + 1), written(tmp_path / "fresh", 3))


def test_the_last_files_are_missing(tmp_path: Path) -> None:
    """As far as the sizes tell which."""
    written(tmp_path / "eight", 8)  # of 3, 3, 3, 3, 3, 3, 3 and 2 classes
    (tmp_path / "eight" / "checkpoint_gpu_7.pt").unlink()
    with pytest.raises(ValueError, match=r"ranks, 0 to 6, are there,.*of 8 to 11 ranks.*rank 7 at"):
        convert.merge_rank_files(tmp_path / "eight", C)
    written(tmp_path / "five", 5)  # of 5, 5, 5, 4 and 4
    for rank in (3, 4):
        (tmp_path / "five" / f"checkpoint_gpu_{rank}.pt").unlink()
    with pytest.raises(
        ValueError, match=r"0 to 2, are there,.*of 5 ranks.*missing, ranks 3 to 4\."
    ):
        convert.merge_rank_files(tmp_path / "five", C)
    with pytest.raises(ValueError, match=r"files of 3 ranks, 0 to 2, are there; it is of a run"):
        convert.merge_rank_files(tmp_path / "five", 13)  # no number of ranks explains it


@pytest.mark.parametrize(("num_classes", "most"), [(1, 4), (7, 9), (40, 12)])
def test_how_many_ranks_there_were(num_classes: int, most: int) -> None:
    for ranks in range(1, most):
        for rank in range(min(ranks, num_classes)):
            start, stop = _rank_files.cut(num_classes, rank, ranks)
            for least in range(rank + 1, most):
                sizes = {
                    count: _rank_files.cut(num_classes, rank, count)
                    for count in range(least + 1, num_classes + 1)
                }
                expected = [count for count, (a, b) in sizes.items() if b - a == stop - start]
                found = list(_rank_files.ranks_of(num_classes, rank, stop - start, least))
                assert found == expected


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or folder: .*nowhere.*give the fol"):
        convert.merge_rank_files(tmp_path / "nowhere", C)
    with pytest.raises(FileNotFoundError, match=r"No such file or folder: .*nowhere"):
        convert.load_rank_files(fm.CosFaceLoss(C, D), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="files is empty"):
        convert.merge_rank_files([], C)
    with pytest.raises(TypeError, match="list of one file for each rank, got Tensor"):
        convert.merge_rank_files(rows(), C)
    written(tmp_path, 2)
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"No such file: .*elsewhere.checkpoint_gpu_1\.pt"):
        convert.merge_rank_files([paths[0], tmp_path / "elsewhere" / "checkpoint_gpu_1.pt"], C)
    paths[1].unlink()
    paths[1].mkdir()
    for given in (tmp_path, paths):
        with pytest.raises(
            IsADirectoryError, match=r"gpu_1\.pt is a folder, where the file of a ch"
        ):
            convert.merge_rank_files(given, C)
    with pytest.raises(TypeError, match=r"number 1 of those given must hold .* type int"):
        convert.merge_rank_files([{"weight": rows()[:12]}, 3], C)


def test_paths_that_can_be_gone_through_once(tmp_path: Path) -> None:
    written(tmp_path, 3)
    criterion = fm.CosFaceLoss(C, D)
    told = convert.load_rank_files(criterion, (path for path in tmp_path.iterdir()))
    assert told.ranks == 3
    assert torch.equal(criterion.weight, rows())


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_unreadable_files(tmp_path: Path) -> None:
    written(tmp_path, 2)
    whole = (tmp_path / "checkpoint_gpu_1.pt").read_bytes()
    (tmp_path / "checkpoint_gpu_1.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"checkpoint_gpu_1.pt is no checkpoint that torch.load"):
        convert.merge_rank_files(tmp_path, C)
    torch.save({"weight": rows(), "other": Path("x")}, tmp_path / "checkpoint_gpu_1.pt")
    with pytest.raises(ValueError, match="weights_only=False"):
        convert.merge_rank_files(tmp_path, C)


def _damaged(whole: bytes, seed: int) -> bytes:
    """Some bits flipped, or cut short."""
    draw = random.Random(seed)
    if seed % 3 == 0:
        return whole[: draw.randrange(len(whole))]
    found = bytearray(whole)
    for _ in range(3):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("kind", ["checkpoint", "tensor"])
def test_damaged_files_are_named(tmp_path: Path, kind: str, is_zip: bool) -> None:
    """Whatever is wrong with the bytes; weights may be other ones, which nothing tells."""
    written(tmp_path, 2, kind)
    path = next(
        path for path in tmp_path.iterdir() if re.search(r"gpu_1|1_softmax_weight\.", str(path))
    )
    value = torch.load(path, weights_only=True)
    torch.save(value, path, _use_new_zipfile_serialization=is_zip)
    whole = path.read_bytes()
    # found by trial: a record of a storage that is lost, a zip file in several parts
    said = []
    for seed in range(120):
        path.write_bytes(_damaged(whole, seed))
        criterion = fm.CosFaceLoss(C, D)
        optimizer = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the format
            try:
                convert.load_rank_files(criterion, tmp_path, optimizer)
            except (TypeError, ValueError) as error:
                said.append(str(error))
    assert len(said) > 40
    assert all(path.name in one for one in said)


@pytest.mark.parametrize(
    ("error", "said"),
    [(AssertionError("storage key"), "AssertionError: storage key"), (OSError(22, "bad"), "bad")],
)
def test_whatever_torch_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    written(tmp_path, 2)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError, match=rf"checkpoint_gpu_0\.pt is no checkpoint .*{said}"):
        convert.merge_rank_files(tmp_path, C)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("state_optimizer", to=[1]), "has a state_optimizer that is no state_dict"),
        (_set("state_optimizer", to={"state": {}}), "has a state_optimizer that is no state_dict"),
        (_set("state_optimizer", "param_groups", to=[{}]), "that is no state_dict"),
        (_set("state_optimizer", "state", to=None), "that is no state_dict"),
        (_set("state_optimizer", "state", to={}), "has no momentum_buffer"),
        (_set("state_optimizer", "state", 1, to={"step": "x"}), "its step is of type str"),
        (
            _set("state_optimizer", "state", 1, "momentum_buffer", to=torch.ones(8, D).long()),
            "no m",
        ),
    ],
)
def test_states_of_no_optimizer(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    """Named with their file; without an optimiser the weights are all that is looked at."""
    written(tmp_path, 3)
    _edited(tmp_path / "checkpoint_gpu_1.pt", change)
    criterion = fm.CosFaceLoss(C, D)
    optimizer = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
    with pytest.raises(ValueError, match=rf"checkpoint_gpu_1\.pt .*{said}"):
        convert.load_rank_files(criterion, tmp_path, optimizer)
    assert torch.equal(convert.merge_rank_files(tmp_path, C), rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_into_an_optimizer_in_the_backward(tmp_path: Path, dtype: torch.dtype) -> None:
    """It goes on as SGD with this momentum does."""
    written(tmp_path, 4)
    criterion = fm.CosFaceLoss(C, D, dtype=dtype)
    optimizer = fm.optim.SGDInBackward([criterion.weight], 0.1, 0.9)
    told = convert.load_rank_files(criterion, tmp_path, optimizer)
    assert told == (4, 3, 40, ("momentum_buffer",))
    state = optimizer.state[criterion.weight]
    assert torch.equal(state["momentum_buffer"], MOMENTUM.to(dtype))
    assert state["step"] == 0
    assert state["step"].dtype == torch.int64
    other = fm.CosFaceLoss(C, D, dtype=dtype)
    sgd = torch.optim.SGD(other.parameters(), 0.1, 0.9)
    convert.load_rank_files(other, tmp_path, sgd)
    x, labels = torch.randn(5, D, dtype=dtype), torch.tensor([0, 5, 22, 7, 7])
    for loss, one in ((criterion, optimizer), (other, sgd)):
        for _ in range(2):
            loss(x, labels).backward()
            one.step()
            one.zero_grad()
    assert state["step"] == 2
    exact: dict[str, Any] = (
        {} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.02}
    )  # rounded at random
    torch.testing.assert_close(criterion.weight, other.weight, **exact)
    other.load_state_dict(criterion.state_dict())
    again = fm.optim.SGDInBackward([other.weight], 0.1, 0.9)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[other.weight]["step"] == 2
    optimizer.release()
    again.release()


def test_state_that_the_optimizer_cant_take(tmp_path: Path) -> None:
    written(tmp_path, 3)
    criterion = fm.ArcFaceLoss(C, D)

    def refuses(match: str, optimizer: torch.optim.Optimizer) -> None:
        with pytest.raises(ValueError, match=match):
            convert.load_rank_files(criterion, tmp_path, optimizer)

    refuses("has no exp_avg .*it has momentum_buffer", torch.optim.Adam(criterion.parameters()))
    refuses("neither momentum", torch.optim.SGD(criterion.parameters(), 0.1))
    refuses("neither momentum", torch.optim.RMSprop(criterion.parameters(), momentum=0.9))
    refuses("without amsgrad", torch.optim.Adam(criterion.parameters(), amsgrad=True))
    sgd = torch.optim.SGD(criterion.parameters(), 0.1, 0.9)
    refuses("doesn't hold", torch.optim.SGD(fm.ArcFaceLoss(C, D).parameters(), 0.1, 0.9))
    _edited(
        tmp_path / "checkpoint_gpu_2.pt",
        _set("state_optimizer", "state", 1, "momentum_buffer", to=torch.ones(2, D)),
    )
    refuses(r"of shape \(2, 6\) for weights \(7, 6\): that of the rows sampled last", sgd)
    shutil.rmtree(tmp_path)
    written(tmp_path, 3, "softmax_fc")
    refuses("it has no state of an optimizer", sgd)
    assert not sgd.state


@pytest.mark.parametrize("kind", ["sgd", "adam", "row-sparse adam", "in backward"])
@pytest.mark.parametrize("then", [1, 3, 5, 40])
def test_into_shards(ranks: Pair, tmp_path: Path, then: int, kind: str) -> None:
    """Each rank opens the files that overlap its classes, and no others."""
    written(tmp_path, then, optimizer="adamw" if "adam" in kind else "sgd")
    for rank, found in enumerate(ranks.run(files.loaded, tmp_path, kind)):
        weight, state, told, opened = found
        np.testing.assert_array_equal(weight, rows().numpy())
        name = "exp_avg" if "adam" in kind else "momentum_buffer"
        np.testing.assert_array_equal(state[name], MOMENTUM.numpy())
        if kind == "adam":
            assert state["step"] == 40
        elif kind == "in backward":
            assert state["step"] == 0
        elif kind != "sgd":
            np.testing.assert_array_equal(state["updates"], np.full((C, 1), 40.0))
        assert told[:3] == (then, 3, 40)
        start, stop = bounds(C, rank, ranks.ranks)
        ends = np.cumsum([C // then + (one < C % then) for one in range(then)])
        begins = np.concatenate([[0], ends[:-1]])
        expected = [
            f"checkpoint_gpu_{one}.pt"
            for one in range(then)
            if max(begins[one], start) < min(ends[one], stop)
        ]
        assert opened == expected


def test_every_rank_raises(ranks: Pair, tmp_path: Path) -> None:
    written(tmp_path, 8)
    whole = (tmp_path / "checkpoint_gpu_0.pt").read_bytes()
    (tmp_path / "checkpoint_gpu_0.pt").write_bytes(whole[: len(whole) // 2])
    for rank, (said,) in enumerate(ranks.run(files.loaded, tmp_path)):
        assert "checkpoint_gpu_0.pt is no checkpoint" in said
        assert ("rank 0 of the shards can't read its files" in said) == (rank > 0)
    for (said,) in ranks.run(files.loaded, tmp_path / "nowhere"):
        assert "No such file or folder" in said
        assert "nowhere" in said
    (tmp_path / "checkpoint_gpu_0.pt").unlink()
    (tmp_path / "checkpoint_gpu_0.pt").mkdir()
    for rank, (said,) in enumerate(ranks.run(files.loaded, tmp_path)):
        assert "checkpoint_gpu_0.pt is a folder, where" in said
        assert ("rank 0 of the shards can't read its files" in said) == (rank > 0)
    (tmp_path / "checkpoint_gpu_0.pt").rmdir()
    written(tmp_path, 8)
    _edited(tmp_path / "checkpoint_gpu_7.pt", _set("state_optimizer", to={"state": 3}))
    for said in (said for (said,) in ranks.run(files.loaded, tmp_path)):
        assert "checkpoint_gpu_7.pt has a state_optimizer that is no state_dict()" in said
    written(tmp_path, 8)
    _edited(tmp_path / "checkpoint_gpu_7.pt", _set("epoch", to=2))
    last = math.ceil(C / ranks.ranks)
    for rank, (said,) in enumerate(ranks.run(files.loaded, tmp_path)):
        is_found_here = rank == (C - 1) // last
        assert "different runs" in said
        assert is_found_here or "rank" in said

"""Files as insightface's arcface_torch writes them, one for each rank, and who loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_margin as fm
from fused_margin import _rank_files, convert

C, D = 23, 6


def rows(seed: int = 0) -> Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(seed))


MOMENTUM, SQUARES = rows(1), rows(2).square()


def written(folder: Path, ranks: int, kind: str = "checkpoint", optimizer: str = "sgd") -> Path:
    """C // R classes a rank, one more for the first ones."""
    folder.mkdir(exist_ok=True)
    start = 0
    for rank in range(ranks):
        stop = start + C // ranks + (rank < C % ranks)
        part = slice(start, stop)
        weight, momentum = rows()[part].clone(), MOMENTUM[part].clone()
        state: dict[str, Any] = {"momentum_buffer": momentum}
        if optimizer == "adamw":
            state = {"exp_avg": momentum, "exp_avg_sq": SQUARES[part].clone()}
            state["step"] = torch.tensor(40.0)
        if kind == "checkpoint":
            checkpoint = {
                "epoch": 3,
                "global_step": 40,
                "state_dict_backbone": {"fc.weight": torch.randn(D, 9)},
                "state_dict_softmax_fc": {"weight": weight},
                "state_optimizer": {
                    "state": {0: {"momentum_buffer": torch.ones(D, 9)}, 1: state},
                    "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.1, "params": [1]}],
                },
                "state_lr_scheduler": {"last_epoch": 40},
            }
            torch.save(checkpoint, folder / f"checkpoint_gpu_{rank}.pt")
        elif kind == "softmax_fc":
            torch.save({"weight": weight}, folder / f"softmax_fc_gpu_{rank}.pt")
        else:
            torch.save(weight, folder / f"rank_{rank}_softmax_weight.pt")
            torch.save(momentum, folder / f"rank_{rank}_softmax_weight_mom.pt")
        start = stop
    return folder


def loaded(folder: Path, kind: str = "sgd", num_classes: int = C) -> list[Any]:
    """What is in a sharded criterion and its optimiser, and which files this rank has opened."""
    from sharded_growth import _whole

    opened: list[str] = []
    load = _rank_files.loaded

    def noted(file: Any, **options: Any) -> Any:
        opened.append(Path(file).name)
        return load(file, **options)

    with torch.device("meta"):
        criterion = fm.ArcFaceLoss(num_classes, D)
    fm.distributed.shard_classes(criterion)
    criterion.to_empty(device="cpu")
    makes: dict[str, Any] = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, 0.9),
        "adam": lambda p: torch.optim.Adam(p, 0.1),
        "row-sparse adam": lambda p: fm.optim.RowSparseAdam(p, 0.1),
        "in backward": lambda p: fm.optim.SGDInBackward(p, 0.1, 0.9),
    }
    optimizer = makes[kind](criterion.parameters())
    _rank_files.loaded = noted
    try:
        told = convert.load_rank_files(criterion, folder, optimizer)
    except (OSError, TypeError, ValueError) as error:
        return [str(error)]
    finally:
        _rank_files.loaded = load
    weight: Any = criterion.weight
    state = {name: _whole(value).numpy() for name, value in optimizer.state[weight].items()}
    whole = _whole(weight).numpy()
    if kind in ("sgd", "in backward"):
        buffer = optimizer.state[weight]["momentum_buffer"]
        assert buffer.placements == weight.placements
    criterion(torch.randn(3, D), torch.tensor([0, 5, C - 1])).backward()
    optimizer.step()
    return [whole, state, tuple(told), opened]

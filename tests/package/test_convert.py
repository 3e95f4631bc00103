"""Class weights and optimiser states, from the checkpoints that other packages write."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from pytorch_metric_learning import distances, reducers
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning import regularizers as peer_regularizers
from torch import nn

import fused_margin as fm
from fused_margin import convert
from fused_margin.compat import heads, insightface, pml

Tensor = torch.Tensor
C, D = 11, 7
ROWS = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
COLUMNS = ROWS.t().contiguous()
BACKBONE = {"layer1.weight": torch.randn(D, 32), "layer1.bias": torch.randn(D)}
BACKBONE["conv.weight"] = torch.randn(8, 3, 3, 3)


def under(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in state.items()}


# As each package saves them; "hint": nothing but the sizes tells which matrix it is
CHECKPOINTS: dict[str, tuple[dict[str, Any], str]] = {
    "pytorch-metric-learning": ({"W": COLUMNS}, "hint"),
    "pytorch-metric-learning, in a model": ({**BACKBONE, "criterion.W": COLUMNS}, "hint"),
    "insightface": (
        {
            "epoch": 3,
            "state_dict_backbone": BACKBONE,
            "state_dict_softmax_fc": {"weight": ROWS},
            "state_optimizer": {"state": {0: {"momentum_buffer": ROWS}}},
        },
        "hint",
    ),
    "insightface, the softmax alone": ({"weight": ROWS}, ""),
    "OML, by Lightning": (
        {"state_dict": under("model.", BACKBONE) | {"criterion.weight": ROWS}}, "hint"
    ),
    "WeSpeaker": ({**BACKBONE, "projection.weight": ROWS}, "hint"),
    "SpeechBrain": ({"weight": ROWS}, ""),
    "AdaFace, by Lightning": (
        {
            "state_dict": under("model.", BACKBONE)
            | {"head.kernel": COLUMNS, "head.t": torch.zeros(1)}
        },
        "",
    ),
    "CurricularFace": ({"kernel": COLUMNS, "t": torch.zeros(1)}, ""),
    "ElasticFace, from DDP": ({"module.kernel": COLUMNS}, ""),
    "pytorch-adacos": ({"W": ROWS}, "hint"),
    "fused_margin": ({"weight": ROWS}, ""),
    "another name": ({**BACKBONE, "fc.centers": ROWS}, "hint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoint, needs = CHECKPOINTS[name]
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint, path)
    for given in (checkpoint, path, str(path)):
        weight = convert.class_weights(given, C, D)
        assert weight.is_contiguous()
        torch.testing.assert_close(weight, ROWS, rtol=0, atol=0)
    torch.testing.assert_close(convert.class_weights(checkpoint, num_classes=C), ROWS)
    if name != "another name":  # where layer1.weight fits too
        torch.testing.assert_close(convert.class_weights(checkpoint, embedding_size=D), ROWS)
    if needs:
        with pytest.raises(ValueError, match=r"num_classes and embedding_size|name another one"):
            convert.class_weights(checkpoint)
    else:
        torch.testing.assert_close(convert.class_weights(checkpoint), ROWS)


LOSSES: dict[str, Callable[[], Any]] = {
    "native": lambda: fm.CosFaceLoss(C, D),
    "pml": lambda: pml.ArcFaceLoss(C, D),
    "partial fc": lambda: insightface.PartialFC_V2(insightface.ArcFace(), D, C),
    "head": lambda: heads.ArcMarginProduct(D, C),
    "wrapped": lambda: fm.FixedAdaCosLoss(C, D, dtype=torch.float64),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loading_into_a_loss(name: str) -> None:
    for checkpoint, _ in CHECKPOINTS.values():
        criterion = LOSSES[name]()
        parameter = next(criterion.parameters())
        source = convert.load_class_weights(criterion, checkpoint)
        again = convert.class_weights(checkpoint, C, D, key=source.key, layout=source.layout)
        torch.testing.assert_close(again, ROWS, rtol=0, atol=0)
        assert next(criterion.parameters()) is parameter
        rows = parameter.t() if name == "pml" else parameter
        assert rows.is_contiguous()
        torch.testing.assert_close(rows.detach(), ROWS.to(rows.dtype), rtol=0, atol=0)


SQUARE = torch.randn(5, 5)


def test_square_matrices_go_by_their_name() -> None:
    torch.testing.assert_close(convert.class_weights({"weight": SQUARE}, 5, 5), SQUARE)
    torch.testing.assert_close(convert.class_weights({"kernel": SQUARE}, 5, 5), SQUARE.t())
    torch.testing.assert_close(convert.class_weights({"W": SQUARE}, 5, 5, layout="CD"), SQUARE)
    torch.testing.assert_close(convert.class_weights({"W": SQUARE}, layout="DC"), SQUARE.t())
    with pytest.raises(ValueError, match=r"W of shape \(5, 5\) can be a row per class.*layout="):
        convert.class_weights({"W": SQUARE}, 5, 5)


def test_a_key_chooses() -> None:
    both = {"first": {"weight": ROWS}, "second": {"weight": 2 * ROWS}, "weight": 3 * ROWS}
    for key, factor in (("first.weight", 1), ("second.weight", 2), ("weight", 3)):
        torch.testing.assert_close(convert.class_weights(both, C, D, key=key), factor * ROWS)
    nested = {"a": both["first"], "b": {"c": {"weight": 2 * ROWS}}}
    torch.testing.assert_close(convert.class_weights(nested, key="c.weight"), 2 * ROWS)
    torch.testing.assert_close(convert.class_weights(nested["b"], key="b.c.weight"), 2 * ROWS)
    source = convert.load_class_weights(fm.CosFaceLoss(C, D), nested, key="c.weight")
    assert source == convert.Source("b.c.weight", "CD")


class Anything:
    """Something that a file may not hold."""


def unsafe(folder: Path) -> Path:
    path = folder / "unsafe.pt"
    torch.save({"weight": ROWS, "hyper_parameters": Anything()}, path)
    return path


def damaged(folder: Path, part: float, name: str = "cut.pt") -> Path:
    path = folder / name
    torch.save({"weight": ROWS}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))] if part else b"no checkpoint at all")
    return path


def holding(folder: Path, value: Any) -> Path:
    torch.save(value, folder / "held.pt")
    return folder / "held.pt"


REFUSED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "cut short": (
        lambda folder: convert.class_weights(damaged(folder, 0.5)), ValueError,
        r"cut\.pt is no checkpoint that torch.load can read; it is damaged or incomplete",
    ),
    "empty": (
        lambda folder: convert.class_weights(damaged(folder, 1e-9)), ValueError, "damaged or incom"
    ),
    "text": (lambda folder: convert.class_weights(damaged(folder, 0)), ValueError, "damaged or"),
    "safetensors": (
        lambda folder: convert.class_weights(damaged(folder, 0, "a.safetensors")), ValueError,
        r"safetensors.torch.load_file\(path\)",
    ),
    "file of a tensor": (
        lambda folder: convert.class_weights(holding(folder, ROWS)), TypeError,
        r"held\.pt must hold a mapping .* holds a Tensor; load it with torch\.load",
    ),
    "file of a list": (
        lambda folder: convert.load_class_weights(fm.CosFaceLoss(C, D), holding(folder, [ROWS])),
        TypeError, r"held\.pt must hold a mapping .* holds an object of type list",
    ),
    "file of several": (
        lambda folder: convert.class_weights(
            holding(folder, {"a.weight": ROWS, "b.weight": ROWS}), C, D
        ),
        ValueError, r"several matrices of .*held\.pt can be",
    ),
    "file of none": (
        lambda folder: convert.class_weights(holding(folder, BACKBONE), C, D), ValueError,
        r"no class weights .* among the matrices of .*held\.pt: ",
    ),
    "file of an unknown layout": (
        lambda folder: convert.class_weights(holding(folder, {"W": ROWS})), ValueError,
        r"held\.pt: W of shape .* can be",
    ),
    "a folder": (
        lambda folder: convert.class_weights(folder), IsADirectoryError, "is a folder, where the"
    ),
    "a folder for a criterion": (
        lambda folder: convert.load_class_weights(fm.CosFaceLoss(C, D), folder),
        IsADirectoryError, "merge_rank_files",
    ),
    "not there": (
        lambda folder: convert.class_weights(folder / "a.pt"), FileNotFoundError, "No such file"
    ),
    "no loss there": (
        lambda folder: convert.to_pml(fm.AdaFaceLoss(C, D)), ValueError,
        r"has no loss that computes what this AdaFaceLoss does; .*criterion\.weight\.t\(\)",
    ),
    "smoothing": (
        lambda folder: convert.to_pml(fm.CosFaceLoss(C, D, label_smoothing=0.1)), ValueError,
        "this CosFaceLoss with label_smoothing=0.1 does",
    ),
    "centres of CosFace": (
        lambda folder: convert.to_pml(fm.CosFaceLoss(C, D, sub_centers=2)), ValueError,
        "with sub_centers=2",
    ),
    "several": (
        lambda folder: convert.class_weights({"a.weight": ROWS, "b.weight": ROWS}, C, D),
        ValueError, r"several matrices.*a\.weight \(11, 7\), b\.weight \(11, 7\); choose with key=",
    ),
    "several of other names": (
        lambda folder: convert.class_weights(CHECKPOINTS["another name"][0], embedding_size=D),
        ValueError, r"layer1\.weight \(7, 32\), fc\.centers \(11, 7\)",
    ),
    "none": (
        lambda folder: convert.class_weights(BACKBONE, C, D), ValueError,
        r"no class weights with C = 11, D = 7 among.*layer1\.weight \(7, 32\)",
    ),
    "no matrix": (lambda folder: convert.class_weights({}), ValueError, "checkpoint: none"),
    "no such key": (
        lambda folder: convert.class_weights({"weight": ROWS}, key="kernel"), ValueError,
        "no class weights named kernel",
    ),
    "unknown layout": (
        lambda folder: convert.class_weights({"W": ROWS}), ValueError,
        "11 classes .pytorch-adacos.*7 classes .pytorch-metric-learning",
    ),
    "layout": (
        lambda folder: convert.class_weights({"W": ROWS}, layout="T"), ValueError, "'CD'"
    ),
    "no mapping": (
        lambda folder: convert.class_weights(ROWS), TypeError, "mapping.*got Tensor"  # pyright: ignore[reportArgumentType]
    ),
    "unsafe": (
        lambda folder: convert.class_weights(unsafe(folder)), ValueError, "weights_only=False"
    ),
    "no weights": (
        lambda folder: convert.load_class_weights(nn.ReLU(), {"weight": ROWS}), TypeError,
        "got ReLU",
    ),
    "another class": (
        lambda folder: convert.from_pml(pml.SphereFaceLoss(C, D)), ValueError, "compat.pml"
    ),
    "no such class": (
        lambda folder: convert.from_pml(peers.TripletMarginLoss()), ValueError,
        "compat.pml has ArcFaceLoss, CosFaceLoss",
    ),
    "one of ours": (
        lambda folder: convert.from_pml(fm.ArcFaceLoss(D, D)), ValueError, "is a loss of fused"
    ),
    "no state of an optimiser": (
        lambda folder: convert.transpose_moments(
            {"model": {}}, torch.optim.SGD([torch.ones(1)]), pml.ArcFaceLoss(C, D)
        ),
        ValueError, r"state_dict\(\) of an optimizer, .* got \['model'\]",
    ),
    "a regulariser": (
        lambda folder: convert.from_pml(
            peers.CosFaceLoss(C, D, weight_regularizer=peer_regularizers.RegularFaceRegularizer())
        ),
        ValueError, "with weight_regularizer",
    ),
    "a reducer": (
        lambda folder: convert.from_pml(peers.CosFaceLoss(C, D, reducer=reducers.SumReducer())),
        ValueError, "SumReducer",
    ),
    "norms": (
        lambda folder: convert.from_pml(
            peers.NormalizedSoftmaxLoss(
                C, D, distance=distances.DotProductSimilarity(normalize_embeddings=False)
            )
        ),
        ValueError, "not normalised",
    ),
    "a boundary": (
        lambda folder: convert.to_pml(fm.ArcFaceLoss(C, D, boundary="none")), ValueError,
        "boundary='none'",
    ),
    "a reduction": (
        lambda folder: convert.to_pml(fm.CosFaceLoss(C, D, reduction="sum")), ValueError,
        "reduction='sum'",
    ),
    "a subclass": (
        lambda folder: convert.to_pml(heads.ArcMarginProduct(D, C)), ValueError, "ArcMarginProduct"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call(tmp_path)


def test_to_pml_says_that_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ValueError, match="pip install pytorch-metric-learning"):
        convert.to_pml(fm.CosFaceLoss(C, D))


PEERS: dict[str, Callable[[], Any]] = {
    "arcface": lambda: peers.ArcFaceLoss(C, D, margin=40, scale=32),
    "cosface": lambda: peers.CosFaceLoss(C, D, margin=0.2, scale=10),
    "softmax": lambda: peers.NormalizedSoftmaxLoss(C, D, temperature=0.1),
    "sub-centres": lambda: peers.SubCenterArcFaceLoss(
        num_classes=C, embedding_size=D, margin=40, scale=32, sub_centers=3
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_objects_round_trip(name: str) -> None:
    peer = PEERS[name]()
    ours = convert.from_pml(peer, backend="reference")
    back: Any = convert.to_pml(ours)
    assert ours.backend == "reference"
    assert type(back) is type(peer)
    torch.testing.assert_close(back.W, peer.W, rtol=0, atol=0)
    x, labels = torch.randn(9, D), torch.randint(C, (9,))
    for criterion in (ours, back):
        torch.testing.assert_close(criterion(x, labels), peer(x, labels))
    same = convert.from_pml(getattr(pml, type(peer).__name__)(C, D))
    assert type(same) is type(ours)
    ours.weight.data.zero_()
    assert float(peer.W.detach().abs().min()) > 0.0  # a copy


def test_fixed_adacos_becomes_a_temperature() -> None:
    ours = fm.FixedAdaCosLoss(C, D)
    peer: Any = convert.to_pml(ours)
    assert peer.temperature == pytest.approx(1 / (math.sqrt(2) * math.log(C - 1)))
    x, labels = torch.randn(9, D), torch.randint(C, (9,))
    torch.testing.assert_close(ours(x, labels), peer(x, labels))


# --- optimisers -----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.3, 0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, amsgrad=True),
    "plain": lambda p: torch.optim.SGD(p, 0.3),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.05),
}


def steps(model: nn.Module, criterion: Any, optimizer: Any, number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(number)
    for _ in range(3):
        x = torch.randn(9, D, generator=generator, dtype=torch.float64)
        labels = torch.randint(C, (9,), generator=generator)
        optimizer.zero_grad()
        criterion(model(x), labels).backward()
        optimizer.step()
    weight = convert._parameter(criterion)
    rows = weight.t() if weight.shape == (D, C) else weight
    return [rows.detach(), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("target", ["native", "compat"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_with_the_moments(name: str, target: str) -> None:
    """Three steps with the peer, three more with ours or the peer: the same weights."""
    model = nn.Linear(D, D).double()
    peer: Any = peers.ArcFaceLoss(C, D).double()
    optimizer = OPTIMIZERS[name]([*model.parameters(), *peer.parameters()])
    steps(model, peer, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model = copy.deepcopy(model)
    ours: Any = convert.from_pml(peer) if target == "native" else pml.ArcFaceLoss(C, D).double()
    convert.load_class_weights(ours, peer.state_dict())
    other = OPTIMIZERS[name]([*other_model.parameters(), *ours.parameters()])
    if target == "native":
        before = copy.deepcopy(saved)
        saved = convert.transpose_moments(saved, other, ours)
        assert str(before) == str(optimizer.state_dict())  # what was given is left alone
    other.load_state_dict(saved)
    expected, actual = steps(model, peer, optimizer, 2), steps(other_model, ours, other, 2)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    if target == "native":  # and back
        back = convert.transpose_moments(other.state_dict(), optimizer, peer)
        optimizer.load_state_dict(back)
        steps(model, peer, optimizer, 3)


def test_moments_that_do_not_fit() -> None:
    ours, model = fm.ArcFaceLoss(C, D), nn.Linear(D, D)
    optimizer = torch.optim.SGD([*model.parameters(), *ours.parameters()], 0.1, 0.9)
    ours(model(torch.randn(3, D)), torch.arange(3)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"has shape \(11, 7\).*weight's own layout"):
        convert.transpose_moments(optimizer.state_dict(), optimizer, ours)
    with pytest.raises(ValueError, match="doesn't hold the class weights of this CosFaceLoss"):
        convert.transpose_moments(optimizer.state_dict(), optimizer, fm.CosFaceLoss(C, D))
    fewer = torch.optim.SGD(ours.parameters(), 0.1, 0.9)
    with pytest.raises(ValueError, match=r"groups of \[3\] parameters, the optimizer of \[1\]"):
        convert.transpose_moments(optimizer.state_dict(), fewer, ours)
    swapped = torch.optim.SGD([*ours.parameters(), *model.parameters()], 0.1, 0.9)
    with pytest.raises(ValueError, match=r"has shape \(7, 7\).*same order"):
        convert.transpose_moments(optimizer.state_dict(), swapped, ours)


def test_factors_without_a_second_dimension() -> None:
    """As other packages' Adafactor has them."""
    ours = fm.ArcFaceLoss(C, D)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    row, col = torch.arange(D), torch.arange(C)
    kept = {"step": 3, "exp_avg_sq_row": row, "exp_avg_sq_col": col, "RMS": 0.5}
    saved = {"state": {0: kept}, "param_groups": optimizer.state_dict()["param_groups"]}
    moments = convert.transpose_moments(saved, optimizer, ours)["state"][0]
    assert moments.keys() == kept.keys()
    assert torch.equal(moments["exp_avg_sq_row"], col)
    assert torch.equal(moments["exp_avg_sq_col"], row)
    saved["state"][0] = {"preconditioner": torch.eye(D)}
    with pytest.raises(ValueError, match=r"has no transpose, and has to start anew"):
        convert.transpose_moments(saved, optimizer, ours)


def test_reachable_from_the_package() -> None:
    """Without an import of its own, which costs nothing until it is asked for."""
    code = "import sys, fused_margin as fm\nbefore = 'fused_margin.convert' in sys.modules\n"
    code += "print(before, fm.convert.from_pml.__name__, fm.compat.pml.ArcFaceLoss.__name__)\n"
    code += "print('compat' in dir(fm), hasattr(fm, 'nothing'), hasattr(fm.compat, 'nothing'))"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert answer.split() == ["False", "from_pml", "ArcFaceLoss", "True", "False", "False"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"focal_gamma": 2.0}, "focal_gamma=2.0"),
        ({"focal_alpha": 0.25}, "focal_alpha=0.25"),
        ({"class_weight": torch.ones(7)}, "class_weight=a tensor"),
        ({"ignore_index": -1}, "ignore_index=-1"),
        ({"scale": torch.nn.Parameter(torch.tensor(30.0))}, "a tensor as scale"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_option_is_dropped(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert.to_pml(fm.ArcFaceLoss(7, 5, **options))


def test_no_margin_per_class_is_dropped() -> None:
    criterion = fm.ArcFaceLoss(7, 5)
    criterion.margin = torch.full((7,), 0.3)
    with pytest.raises(ValueError, match="a tensor as margin"):
        convert.to_pml(criterion)


OTHER_STATES: dict[str, tuple[Any, dict[str, tuple[int, int]], bool]] = {
    "pytorch-metric-learning": (fm.ArcFaceLoss, {"W": (6, 10)}, True),
    "AdaFace": (fm.CosFaceLoss, {"kernel": (6, 10)}, True),
    "transposed": (fm.ArcFaceLoss, {"weight": (6, 10)}, True),
    "of a wrapper": (fm.ArcFaceLoss, {"module.weight": (10, 6)}, True),
    "to pytorch-metric-learning": (pml.ArcFaceLoss, {"weight": (10, 6)}, True),
    "W by rows": (pml.ArcFaceLoss, {"W": (10, 6)}, True),
    "of another size": (fm.ArcFaceLoss, {"W": (7, 10)}, False),
    "beside its own": (fm.ArcFaceLoss, {"weight": (10, 6), "W": (6, 10)}, False),
}


@pytest.mark.parametrize("name", OTHER_STATES)
def test_the_state_of_another_package_s_loss(name: str) -> None:
    """The error says what loads it, which does; what may be missing is no error."""
    make, shapes, is_told = OTHER_STATES[name]
    criterion = make(10, 6)
    (parameter,) = criterion.parameters()
    state = {key: torch.randn(shape) for key, shape in shapes.items()}
    with pytest.raises(RuntimeError) as caught:
        criterion.load_state_dict(state)
    words = "take them with fused_margin.convert.load_class_weights(criterion, state)"
    assert (words in str(caught.value)) == is_told
    if not shapes.keys() & dict(criterion.named_parameters()).keys():
        assert len(criterion.load_state_dict(state, strict=False).missing_keys) == 1
    if is_told:
        convert.load_class_weights(criterion, state)
        (given,) = state.values()
        given = given if given.shape == parameter.shape else given.t()
        torch.testing.assert_close(parameter.detach(), given)

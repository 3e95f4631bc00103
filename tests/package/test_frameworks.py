"""What training is done with, around a loss: each against plain steps.

DDP, FSDP2 and Accelerate in several processes have files of their own (test_distributed*.py).
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin import convert
from fused_margin.compat import heads, pml

Tensor = torch.Tensor
ROWS, FEATURES, D, C, STEPS = 12, 6, 8, 11, 3

CRITERIA: dict[str, Callable[[], Any]] = {
    "native": lambda: fm.ArcFaceLoss(C, D, scale=16.0),
    "pml": lambda: pml.ArcFaceLoss(C, D, scale=16.0),
    "subcenters": lambda: pml.SubCenterArcFaceLoss(C, D, scale=16.0),
}
every_criterion = pytest.mark.parametrize("name", CRITERIA)


class Network(nn.Module):
    """A backbone and its criterion in one module: the loss, or with ``scores`` the logits."""

    def __init__(self, criterion: nn.Module, scores: bool = False) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(FEATURES, D), nn.Tanh(), nn.Linear(D, D))
        self.criterion: Any = criterion
        self.scores = scores

    def forward(self, rows: Tensor, labels: Tensor | None = None) -> Tensor:
        embeddings = self.backbone(rows)
        if self.scores:
            return self.criterion.logits(embeddings)
        return self.criterion(embeddings, labels)


def network(name: str) -> Network:
    torch.manual_seed(1)
    return Network(CRITERIA[name]())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(ROWS, FEATURES, generator=generator),
            torch.randint(C, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def sgd(module: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def trained(module: nn.Module) -> nn.Module:
    """Plain steps."""
    optimizer = sgd(module)
    for rows, labels in batches():
        optimizer.zero_grad()
        module(rows, labels).backward()
        optimizer.step()
    return module


def assert_same(actual: nn.Module, expected: nn.Module, tolerance: float = 1e-5) -> None:
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for key, value in states[1].items():
        torch.testing.assert_close(states[0][key], value, rtol=tolerance, atol=tolerance)


@every_criterion
def test_accumulation(name: str) -> None:
    module = network(name)
    optimizer = sgd(module)
    for rows, labels in batches():
        optimizer.zero_grad()
        for some, targets in zip(rows.chunk(3), labels.chunk(3), strict=True):
            (module(some, targets) / 3).backward()
        optimizer.step()
    assert_same(module, trained(network(name)))


@pytest.mark.parametrize("reentrant", [False, True])
@every_criterion
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    """Of backbone and loss together: the forward runs twice."""
    module = network(name)
    optimizer = sgd(module)
    for rows, labels in batches():
        optimizer.zero_grad()
        loss: Any = checkpoint(module, rows.requires_grad_(), labels, use_reentrant=reentrant)
        loss.backward()
        optimizer.step()
    assert_same(module, trained(network(name)))


@every_criterion
def test_autocast_and_grad_scaler(name: str) -> None:
    """A factor of a power of 2 changes nothing, and a step with infinite gradients is left out."""

    def run(scaler: torch.amp.GradScaler) -> nn.Module:
        module = network(name)
        optimizer = sgd(module)
        for rows, labels in batches():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(rows, labels)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
        return module

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    module = run(scaler)
    assert_same(module, run(torch.amp.GradScaler("cpu", enabled=False)), 1e-6)
    before = copy.deepcopy(module)
    optimizer = sgd(module)
    rows, labels = batches()[0]
    scaler.scale(1e38 * module(1e3 * rows, labels)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert_same(module, before, 0.0)


@every_criterion
def test_moving_average(name: str) -> None:
    module = network(name)
    average: Any = swa_utils.AveragedModel(module, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = sgd(module)
    expected = [parameter.detach().clone() for parameter in module.parameters()]
    for number, (rows, labels) in enumerate(batches()):
        optimizer.zero_grad()
        module(rows, labels).backward()
        optimizer.step()
        average.update_parameters(module)
        for kept, parameter in zip(expected, module.parameters(), strict=True):
            kept.lerp_(parameter.detach(), 0.1 if number else 1.0)
    for kept, parameter in zip(expected, average.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), kept)
        assert parameter.stride() == kept.stride()
    rows, labels = batches()[0]
    assert bool(average(rows, labels).isfinite())


@every_criterion
def test_meta_device(name: str) -> None:
    """Built without memory, and filled from a checkpoint or anew."""
    saved = network(name).state_dict()
    with torch.device("meta"):
        module = Network(CRITERIA[name]())
    with pytest.raises(ValueError, match="reset_parameters"):
        module.criterion(torch.randn(2, D), torch.tensor([0, 1]))
    module = module.to_empty(device="cpu")
    module.load_state_dict(saved)
    assert_same(trained(module), trained(network(name)))
    module.criterion.reset_parameters()
    (parameter,) = module.criterion.parameters()
    assert bool(parameter.isfinite().all())
    with torch.device("meta"):
        other = Network(CRITERIA[name]())
    other.load_state_dict(saved, assign=True)
    assert_same(trained(other), trained(network(name)))


# each with a way to give it a value again
EMPTIED: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "class_weight": (torch.rand(C), lambda one: setattr(one, "class_weight", torch.ones(C))),
    "margin": (torch.rand(C), lambda one: one.margin.fill_(0.2)),
    "scale": (nn.Parameter(torch.tensor(16.0)), lambda one: one.load_state_dict(STATE)),
    "learnt scale": (nn.Parameter(torch.tensor(16.0)), lambda one: nn.init.ones_(one.scale)),
}
STATE = {"weight": torch.randn(C, D), "scale": torch.tensor(8.0)}


@pytest.mark.parametrize("name", EMPTIED)
@pytest.mark.parametrize("on_meta", [True, False])
def test_to_empty_loses_no_setting_silently(name: str, on_meta: bool) -> None:
    """What no checkpoint has, whether it was given on the meta device or real, and in copies."""
    given, restore = EMPTIED[name]
    key = name.split()[-1]
    if on_meta:
        given = nn.Parameter(given.to("meta")) if key == "scale" else given.to("meta")
    options: dict[str, Any] = {key: given}
    criterion = fm.ArcFaceLoss(C, D, device="meta", **options)
    module = nn.Sequential(criterion).to_empty(device="cpu")
    criterion.reset_parameters()
    rows, labels = torch.randn(4, D), torch.arange(4)
    with pytest.raises(ValueError, match=f"left {key} .* assign criterion.{key}"):
        criterion(rows, labels)
    with pytest.raises(ValueError, match="to_empty"):
        copy.deepcopy(module)[0](rows, labels)
    with torch.no_grad():
        restore(criterion)
    assert bool(criterion(rows, labels).isfinite())
    assert bool(copy.deepcopy(criterion)(rows, labels).isfinite())


def test_compile_of_a_whole_step() -> None:
    module = network("native")
    optimizer = sgd(module)

    @torch.compile(backend="aot_eager")
    def step(rows: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        module(rows, labels).backward()
        optimizer.step()

    for rows, labels in batches():
        step(rows, labels)
    assert_same(module, trained(network("native")))


def test_pickled_with_its_optimizer() -> None:
    module = trained(Network(heads.ArcMarginProduct(D, C)))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), module, 0.0)


@pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None,
    reason="Lightning is not a dependency of the tests",
)
@every_criterion
def test_lightning(name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        lightning: Any = importlib.import_module("lightning")

        class Lit(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = network(name)

            def training_step(self, batch: Any, _: int) -> Tensor:
                return self.network(*batch)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return sgd(self)

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        lit: Any = Lit()
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(lit, torch.utils.data.DataLoader(batches(), batch_size=None))  # pyright: ignore[reportArgumentType]
        path = tmp_path / "last.ckpt"
        trainer.save_checkpoint(path)
        again: Any = Lit.load_from_checkpoint(path)
    assert_same(lit.network, trained(network(name)))
    assert_same(again.network, lit.network, 0.0)
    if name != "subcenters":
        target = CRITERIA[name]()
        (key,) = target.state_dict()
        convert.load_class_weights(target, path, key=f"criterion.{key}")
        assert_same(target, lit.network.criterion, 0.0)


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="Accelerate is not a dependency of the tests",
)
@every_criterion
def test_accelerate(name: str) -> None:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    module = network(name)
    backbone, criterion, optimizer = accelerator.prepare(
        module.backbone, module.criterion, sgd(module)
    )
    for rows, labels in batches():
        optimizer.zero_grad()
        accelerator.backward(criterion(backbone(rows), labels))
        optimizer.step()
    fm.check_setup(criterion, optimizer)
    assert_same(module, trained(network(name)))


@pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxscript") is None,
    reason="onnx and onnxscript are not dependencies of the tests",
)
def test_onnx(tmp_path: Path) -> None:
    """A model with its logits, for any batch, against ONNX's own evaluator."""
    module = Network(fm.ArcFaceLoss(C, D), scores=True).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        program = torch.onnx.export(
            module, (torch.randn(4, FEATURES),), dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("rows")},),
        )  # fmt: skip
        assert program is not None
        program.save(path)
        onnx = importlib.import_module("onnx")
        evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(onnx.load(path))
    rows = torch.randn(9, FEATURES)
    (scores,) = evaluator.run(None, {evaluator.input_names[0]: rows.numpy()})
    np.testing.assert_allclose(scores, module(rows).detach().numpy(), rtol=1e-4, atol=1e-4)

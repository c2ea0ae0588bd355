"""Network deconvolution on a GPU: against float64 on the CPU, without waiting for the device, in memory."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_stability import network
from test_train import tiny
from torch import Tensor, nn

from segdeconv import convert_to_network_deconv, fold_network_deconv
from segdeconv.config import ModelConfig, NetworkDeconvConfig
from segdeconv.evaluate import evaluate_run
from segdeconv.graphs import StepGraphs
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.models import build_model
from segdeconv.schedule import RefreshSchedule
from segdeconv.train import train
from segdeconv.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
FAST, EXACT = NetworkDeconvConfig(mode="fast"), NetworkDeconvConfig(mode="exact")
LAYERS = {
    "3x3": ((32, 24, 3), {"padding": 1}, (4, 32, 33, 20)),
    "1x1": ((64, 24, 1), {}, (4, 64, 9, 9)),
    "7x7, stride 2": ((3, 16, 7), {"stride": 2, "padding": 3}, (2, 3, 64, 48)),
    "depthwise": ((16, 16, 3), {"padding": 1, "groups": 16}, (4, 16, 20, 20)),
    "groups, dilated": ((32, 16, 3), {"padding": 2, "groups": 4, "dilation": 2}, (4, 32, 16, 16)),
    "linear": ((200, 10), {}, (32, 200)),
}


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def layer_of(name: str, config: NetworkDeconvConfig) -> Whitened:
    sizes, options, _ = LAYERS[name]
    make = WhitenedLinear if name == "linear" else WhitenedConv2d
    return make(*sizes, **options, config=config)


def steps(
    layer: nn.Module, shape: tuple[int, ...], count: int, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Outputs and gradients of the last of some training steps, then the running values, on the CPU."""
    generator = torch.Generator().manual_seed(1)
    layer = layer.to(device, dtype).train()
    for _ in range(count):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (x + x.roll(1, -1) + x[:, :1]).to(device, dtype)
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        layer.zero_grad()
        out = layer(x.clone())
        out.sin().sum().backward()
    assert x.grad is not None
    found = [out.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
    return [t.double().cpu() for t in found if t is not None]


@pytest.mark.parametrize("config", [FAST, EXACT], ids=["fast", "exact"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_float64_does(name: str, config: NetworkDeconvConfig) -> None:
    slow = layer_of(name, config)
    quick = copy.deepcopy(slow)
    shape = LAYERS[name][2]
    want = steps(slow, shape, 3, "cpu", torch.float64)
    for mine, theirs in zip(steps(quick, shape, 3, "cuda", torch.float32), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4 * max(theirs.abs().max().item(), 1))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_bfloat16_is_near(name: str) -> None:
    slow = layer_of(name, FAST)
    quick = copy.deepcopy(slow)
    shape = LAYERS[name][2]
    want = steps(slow, shape, 3, "cpu", torch.float64)
    with torch.autocast("cuda", torch.bfloat16):
        got = steps(quick, shape, 3, "cuda", torch.float32)
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm() + 1e-6


def bright_quarters(batch: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(4, (batch,))
    images = torch.randn(batch, 3, 16, 16)
    for image, label in zip(images, labels, strict=True):
        image[:, 8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8] += 1
    return images.cuda(), labels.cuda()


def learn(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    amp: torch.dtype | None,
    refreshes: RefreshSchedule | None = None,
) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for images, labels in batches:
        if refreshes is not None:
            refreshes.step()
        with torch.autocast("cuda", amp, enabled=amp is not None):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_network_learns_without_waiting_for_the_device(amp: torch.dtype | None) -> None:
    """But for the first step, which reads the number of batches that the state has seen."""
    model, _ = convert_to_network_deconv(network())
    model.cuda()
    batches = [bright_quarters(16) for _ in range(45)]
    losses = learn(model, batches[:1], amp)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses += learn(model, batches[1:], amp)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses[-10:]).mean().item() < 0.6
    images, _ = bright_quarters(8)
    with torch.no_grad():
        want = model.eval()(images)
        got = fold_network_deconv(model)(images)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_steps_are_the_same(mode: str) -> None:
    """With a schedule of refreshes, and with layers that decide for themselves."""
    for scheduled in (True, False):
        eager, _ = convert_to_network_deconv(network())
        eager.cuda()
        compiled = copy.deepcopy(eager)
        batches = [bright_quarters(16) for _ in range(50)]
        torch._dynamo.reset()
        want = learn(eager, batches, None, RefreshSchedule(eager) if scheduled else None)
        graphs = torch.compile(compiled, fullgraph=True, mode=mode)
        got = learn(graphs, batches, None, RefreshSchedule(compiled) if scheduled else None)
        torch.testing.assert_close(torch.stack(got[:10]), torch.stack(want[:10]), rtol=0, atol=1e-3)
        assert torch.stack(got[-10:]).mean().item() < 0.6
        for mine, theirs in zip(compiled.buffers(), eager.buffers(), strict=True):
            if not theirs.is_floating_point():
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=str)
def test_recorded_steps_are_the_same(amp: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshes and a batch of another size among them, and steps without graphs after them."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # 70 steps make much of any difference
    eager, _ = convert_to_network_deconv(network())
    eager.cuda()
    recorded = copy.deepcopy(eager)
    batches = [bright_quarters(8 if step == 30 else 16) for step in range(70)]
    tolerance = 1e-4 if amp is None else 0.03
    losses = []
    for model, make in ((eager, Plain), (recorded, StepGraphs)):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

        def compute(images: Tensor, labels: Tensor, model: Any = model) -> Tensor:
            with torch.autocast("cuda", amp, enabled=amp is not None):
                loss = F.cross_entropy(model(images).float(), labels)
            loss.backward()
            return loss.detach()

        step = make(model, compute)
        for images, labels in batches:
            optimizer.zero_grad()
            losses.append(step(images, labels))
            optimizer.step()
    one, other = torch.stack(losses).view(2, -1)
    torch.testing.assert_close(other, one, rtol=0, atol=tolerance)
    assert other[-5:].mean() < 0.9 * other[:5].mean()
    for mine, theirs in zip(recorded.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance * max(theirs.abs().max().item(), 1))


class Plain:
    """A schedule and no graphs."""

    def __init__(self, model: nn.Module, compute: Callable[..., Tensor]) -> None:
        self.compute, self.refreshes = compute, RefreshSchedule(model)

    def __call__(self, *batch: Tensor) -> Tensor:
        self.refreshes.step()
        return self.compute(*batch)


@pytest.mark.parametrize(
    ("norm", "how"), [("bn", ["cuda_graphs"]), ("nd", ["cuda_graphs"]), ("nd", ["compile", "cuda_graphs"])]
)
def test_a_run_with_graphs(norm: str, how: list[str], tmp_path: Path) -> None:
    changes = (f"model.norm={norm}", "train.amp=bf16", "train.epochs=4", "train.ema_decay=0.9")
    want = train(tiny(*changes), tmp_path / "plain", "cuda")
    got = train(tiny(*changes, *(f"train.{key}=true" for key in how)), tmp_path / "graphs", "cuda")
    assert got["loss"] == pytest.approx(want["loss"], abs=0.05)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "batch", "size"),
    [
        ("cifar_resnet18", 64, (32, 32)),
        ("unet_mobilenet_v2", 8, (160, 224)),
        ("deeplabv3_resnet50", 2, (512, 1024)),
    ],
)
def test_peak_memory_is_batch_norms(architecture: str, batch: int, size: tuple[int, int], amp: bool) -> None:
    peaks = {}
    torch.ones(8, 8, device="cuda").matmul(torch.ones(8, 8, device="cuda"))  # cuBLAS takes its memory once
    for norm in ("bn", "nd"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        model = build_model(ModelConfig(architecture, norm=norm), 19)[0].cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            images = torch.randn(batch, 3, *size, device="cuda").contiguous(memory_format=torch.channels_last)
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                output = model(images)
            output = output["out"] if isinstance(output, dict) else output
            output.float().square().mean().backward()
            optimizer.step()
        peaks[norm] = torch.cuda.max_memory_allocated() / 2**20
        del model, optimizer, output, images
    assert peaks["nd"] <= 1.1 * peaks["bn"], peaks


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_stopped_run_goes_on(amp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it had not been stopped, up to what sums in varying order leave."""
    recipe = tiny(f"train.amp={amp}")
    whole = train(recipe, tmp_path / "whole", "cuda")
    step = Trainer.train_step

    def stopping(self: Trainer, *batch: Tensor) -> Tensor:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", stopping)
    with pytest.raises(SystemExit):
        train(recipe, tmp_path / "stopped", "cuda")
    monkeypatch.setattr(Trainer, "train_step", step)
    resumed = train(recipe, tmp_path / "stopped", "cuda", resume=True)
    assert resumed["loss"] == pytest.approx(whole["loss"], abs=2e-3)
    scores = evaluate_run(tmp_path / "stopped", device="cuda")
    assert scores["miou"] == pytest.approx(resumed["miou"], abs=1e-3)

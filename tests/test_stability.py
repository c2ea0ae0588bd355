"""The fast mode trains where batch norm does: learning rates, batch sizes, kernels, precision, odd data."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segdeconv import convert_to_network_deconv
from segdeconv.fold import fold_network_deconv


def network() -> nn.Module:
    """A 7x7, a depthwise, a 1x1 and a dilated layer, a residual and a linear head."""

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def layer(*args: int, **options: int) -> list[nn.Module]:
        return [nn.Conv2d(*args, **options, bias=False), nn.BatchNorm2d(args[1]), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *layer(3, 16, 7, stride=2, padding=3),
        Residual(*layer(16, 16, 3, padding=1, groups=16), *layer(16, 16, 1)[:2]),
        *layer(16, 24, 3, padding=2, dilation=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 4),
    )


def train(model: nn.Module, lr: float, batch: int, amp: bool, data: str, steps: int = 45) -> list[float]:
    """Losses; the class is which quarter of the picture is bright."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step in range(steps):
        labels = torch.randint(4, (batch,), generator=generator)
        images = torch.randn(batch, 3, 16, 16, generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[:, 8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8] += 1
        if data == "a constant channel":
            images[:, 0] = 3.0
        if data == "a sudden change" and step >= 25:
            images = images * 20 - 50
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 5)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


CASES = [
    *itertools.product((0.01, 0.1, 0.3, 1.0), (16,), (False, True), ("plain",)),
    *itertools.product((0.1,), (2, 256), (False,), ("plain",)),
    *itertools.product((0.1, 1.0), (16,), (False,), ("a constant channel", "a sudden change")),
]


@pytest.mark.parametrize(("lr", "batch", "amp", "data"), CASES)
def test_no_divergence(lr: float, batch: int, amp: bool, data: str) -> None:
    """Finite losses that do not end above where they began, and an exact fold afterwards."""
    torch.manual_seed(0)
    model, _ = convert_to_network_deconv(network())
    losses = train(model, lr, batch, amp, data)
    assert all(torch.tensor(losses).isfinite())
    ends = sum(losses[-10:]) / 10
    assert ends < 1.1 * max(losses[0], 1.3863), losses  # ln 4 is knowing nothing
    if lr == 0.1:
        assert ends < 0.6, losses
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        want = model.eval()(images)
        got = fold_network_deconv(model)(images)
    assert want.isfinite().all()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.slow
def test_compiled_steps_are_the_same() -> None:
    """torch.compile, in one graph, trains to the same weights."""
    torch.manual_seed(0)
    eager, _ = convert_to_network_deconv(network())
    compiled = copy.deepcopy(eager)
    train(eager, 0.1, 4, False, "plain", steps=25)
    train(torch.compile(compiled, backend="aot_eager", fullgraph=True), 0.1, 4, False, "plain", steps=25)
    for mine, theirs in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)

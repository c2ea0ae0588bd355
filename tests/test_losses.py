"""The loss against a loop over pixels in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.config import TrainConfig
from segdeconv.losses import loss_of

IGNORED = 255
WEIGHTS = (0.5, 2.0, 0.0, 1.25)


def batch(ignored: float = 0.4) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, (3, 5, 7))  # nothing is of the last class
    targets[rng.random(targets.shape) < ignored] = IGNORED
    return torch.from_numpy(rng.normal(size=(3, 4, 5, 7)) * 3).float(), torch.from_numpy(targets)


def slow_loss(logits: Tensor, targets: Tensor, config: TrainConfig) -> float:
    """Pixel by pixel."""
    weights = config.class_weights or (1.0,) * 4
    losses, counts = [], []
    both, predicted, true = np.zeros((3, 4))
    for scores, target in zip(logits.double().movedim(1, -1).reshape(-1, 4), targets.ravel(), strict=True):
        if target == IGNORED:
            continue
        exps = [math.exp(score) for score in scores]
        p = np.array(exps) / sum(exps)
        if weights[target]:
            losses.append(-math.log(p[target]) * weights[target])
            counts.append(weights[target])
        both[target] += p[target]
        predicted += p
        true[target] += 1
    if config.ohem is not None:
        kept = np.argsort(losses)[::-1][: math.ceil(config.ohem * len(losses))]
        losses, counts = [losses[i] for i in kept], [counts[i] for i in kept]
    loss = sum(losses) / max(sum(counts), 1e-6)
    there = [1 - 2 * both[c] / (predicted[c] + true[c]) for c in range(4) if true[c]]
    return loss + config.dice_weight * sum(there) / max(len(there), 1)


@pytest.mark.parametrize("ignored", [0.0, 0.4, 0.97, 1.0])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"class_weights": WEIGHTS},
        {"dice_weight": 0.7},
        {"ohem": 0.3},
        {"ohem": 0.01},
        {"ohem": 0.95, "class_weights": WEIGHTS},
        {"ohem": 0.25, "class_weights": WEIGHTS, "dice_weight": 0.5},
    ],
)
def test_the_loss_is_that_of_a_loop(settings: dict[str, Any], ignored: float) -> None:
    logits, targets = batch(ignored)
    config = TrainConfig(**settings)
    got = loss_of(logits, targets, config, IGNORED).item()
    assert got == pytest.approx(slow_loss(logits, targets, config), rel=1e-6, abs=1e-12)


def test_auxiliary_outputs_and_smoothed_labels() -> None:
    logits, targets = batch()
    plain = loss_of(logits, targets, TrainConfig(), IGNORED)
    for both in ({"out": logits, "aux": logits}, (logits, None, logits)):
        torch.testing.assert_close(loss_of(both, targets, TrainConfig(aux_weight=0.5), IGNORED), 1.5 * plain)
    smooth = TrainConfig(label_smoothing=0.1)
    expected = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=0.1)
    torch.testing.assert_close(loss_of(logits, targets, smooth, IGNORED), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ohem", [None, 0.3])
def test_a_label_of_weight_0_counts_nothing_smoothed_or_not(ohem: float | None, smoothing: float) -> None:
    logits, targets = batch()
    config = TrainConfig(class_weights=WEIGHTS, label_smoothing=smoothing, ohem=ohem)
    found = loss_of(logits, targets, config, IGNORED)
    want = loss_of(logits, targets.where(targets != 2, IGNORED), config, IGNORED)
    assert found == want > 0
    assert loss_of(logits, torch.full_like(targets, 2), config, IGNORED) == 0


def test_nothing_labelled_has_no_gradient() -> None:
    logits, targets = batch(1.0)
    loss_of(logits.requires_grad_(), targets, TrainConfig(), IGNORED).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_loss_in_inference_mode_spoils_no_later_one() -> None:
    logits, targets = batch()
    config = TrainConfig(class_weights=(0.25, 3.0, 1.0, 1.0))
    with torch.inference_mode():
        want = loss_of(logits, targets, config, IGNORED)
    loss = loss_of(logits.requires_grad_(), targets, config, IGNORED)
    loss.backward()
    assert torch.equal(loss.detach(), want)


def test_the_hardest_are_a_share_of_the_labelled_pixels() -> None:
    """Pixels with a gradient, counted; equal losses count in part, so that their order does not matter."""
    logits, targets = batch(0.8)
    loss_of(logits.requires_grad_(), targets, TrainConfig(ohem=0.5), IGNORED).backward()
    assert logits.grad is not None
    labelled = int((targets != IGNORED).sum())
    assert int(logits.grad.any(1).sum()) == math.ceil(0.5 * labelled) < math.ceil(0.5 * targets.numel())

    equal = torch.zeros(1, 2, 1, 8, requires_grad=True)
    loss = loss_of(equal, torch.zeros(1, 1, 8, dtype=torch.long), TrainConfig(ohem=0.3), IGNORED)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert equal.grad is not None
    torch.testing.assert_close(equal.grad[0, 1, 0], torch.full((8,), 0.5 / 8))


@pytest.mark.parametrize("settings", [{}, {"dice_weight": 1.0}])
def test_the_loss_of_16_bits_is_computed_in_32(settings: dict[str, Any]) -> None:
    from test_losses import IGNORED, batch

    logits, targets = batch()
    found = loss_of(logits.bfloat16(), targets, TrainConfig(**settings), IGNORED)
    assert torch.equal(found, loss_of(logits.bfloat16().float(), targets, TrainConfig(**settings), IGNORED))


def test_auxiliary_outputs_have_all_of_the_loss() -> None:
    from test_losses import IGNORED, batch

    logits, targets = batch()
    config = TrainConfig(dice_weight=0.7, aux_weight=0.5)
    plain = loss_of(logits, targets, config, IGNORED)
    torch.testing.assert_close(loss_of((logits, logits), targets, config, IGNORED), 1.5 * plain)

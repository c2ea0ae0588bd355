"""The training loss. Sums and counts go over all ranks before they are divided, so that N processes with a
share of the batch each have the loss, and the gradients, of one process with all of it.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv.config import TrainConfig
from segdeconv.distributed import sum_over_ranks
from segdeconv.models import split_output


def loss_of(output: Any, targets: Tensor, config: TrainConfig, ignore_index: int) -> Tensor:
    """The loss of a batch: mean cross-entropy over labelled pixels, soft Dice where asked for, and the same
    of auxiliary heads, where the network has some. Every rank gets that of the whole batch.

    Args:
        output: logits (n, C, H, W) or (n, C), alone or with auxiliary ones; see `split_output`.
        targets: (n, H, W) or (n,).
    """

    def of(logits: Tensor) -> Tensor:
        loss = _cross_entropy(logits.float(), targets, config, ignore_index)
        if config.dice_weight:
            loss = loss + config.dice_weight * _dice(logits.float(), targets, ignore_index)
        return loss

    main, auxiliary = split_output(output)
    return of(main) + config.aux_weight * sum(of(logits) for logits in auxiliary)


def _cross_entropy(logits: Tensor, targets: Tensor, config: TrainConfig, ignore_index: int) -> Tensor:
    weights = _weights_on(logits.device, config.class_weights) if config.class_weights else None
    if weights is not None and 0 in (config.class_weights or ()):  # as if ignored, smoothed or not
        counts = weights[targets.where(targets != ignore_index, 0)] > 0
        targets = targets.where(counts, ignore_index)
    losses = F.cross_entropy(
        logits,
        targets,
        weights,
        ignore_index=ignore_index,
        label_smoothing=config.label_smoothing,
        reduction="none",
    )
    labelled = targets != ignore_index
    counts = labelled.float() if weights is None else weights[targets.where(labelled, 0)] * labelled
    if config.ohem is not None:
        hardest = _hardest(losses.detach(), labelled.sum(), config.ohem)
        losses, counts = losses * hardest, counts * hardest
    # Summed and divided by hand: the mean over a batch without a single labelled pixel would be NaN.
    total, count = sum_over_ranks(torch.stack((losses.sum(), counts.sum())))
    return total / count.clamp(min=1 if weights is None else 1e-6)


@functools.lru_cache(8)
def _weights_on(device: torch.device, weights: tuple[float, ...]) -> Tensor:
    """Copied once: every copy would wait for the device."""
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=torch.float32, device=device)


def _hardest(losses: Tensor, labelled: Tensor, share: float) -> Tensor:
    """Weights of the pixels: 1 for the hardest ceil(share * labelled) of the whole batch, else 0. Pixels with
    the border's loss share the weight that is left.

    The border, the smallest loss that counts, is found bit by bit: the order of floats that are not negative
    is that of their bits as integers. So ranks exchange counts and not pixels, and nothing waits for the
    device.

    Args:
        losses: float32, at least 0; 0 where nothing is labelled.
        labelled: how many pixels of this rank are, ().
    """
    exact = Fraction(share).limit_denominator(10**9)  # in integers, because Apple's GPUs have no float64
    wanted = -(-sum_over_ranks(labelled) * exact.numerator // exact.denominator)
    bits = losses.abs().view(torch.int32)  # abs, because -0.0 has the bits of a negative number
    border = torch.zeros_like(labelled, dtype=torch.int32)
    for bit in reversed(range(31)):
        higher = border | 1 << bit
        border = higher.where(sum_over_ranks((bits >= higher).sum()) >= wanted, border)
    above, at = bits > border, bits == border
    taken, there = sum_over_ranks(torch.stack((above.sum(), at.sum())))
    return above + at * ((wanted - taken) / there.clamp(min=1))


def _dice(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """1 - 2 |P ∩ T| / (|P| + |T|) with soft P, the mean over the classes that the batch holds."""
    labelled = targets != ignore_index
    probabilities = logits.softmax(1) * labelled[:, None]
    truth = F.one_hot(targets.where(labelled, 0), logits.shape[1]).movedim(-1, 1) * labelled[:, None]
    over = [axis for axis in range(logits.ndim) if axis != 1]
    sums = torch.stack([t.sum(over) for t in (probabilities * truth, probabilities, truth)])
    both, predicted, true = sum_over_ranks(sums)
    dice = 2 * both / (predicted + true).clamp(min=1e-6)
    return ((1 - dice) * (true > 0)).sum() / (true > 0).sum().clamp(min=1)

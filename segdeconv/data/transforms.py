"""Augmentation and normalisation with albumentations (2.0, the last MIT line).

A training sample is a pure function of the recipe's seed, the epoch and the index: the generator is set for
each sample, so results depend neither on the number of loader processes nor on where a run was stopped.
"""

from __future__ import annotations

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the package index at every import

import albumentations as A
import cv2
import numpy as np
import torch
from torch import Tensor

from segdeconv.config import DataConfig

cv2.setNumThreads(0)  # loader processes are the parallelism; OpenCV's own threads fight with torch's


class TrainTransform:
    """Random scale, padding, crop, mirror and colour as ``config`` says, then normalisation."""

    def __init__(self, config: DataConfig, seed: int, multiple: int) -> None:
        fill = tuple(255 * m for m in config.mean)
        steps: list[A.BasicTransform] = []
        if config.scale != (1.0, 1.0):
            limits = (config.scale[0] - 1, config.scale[1] - 1)
            steps.append(A.RandomScale(limits, interpolation=cv2.INTER_LINEAR, p=1))
        if config.pad:
            steps.append(A.Pad(config.pad, fill=fill, fill_mask=config.ignore_index))
        if config.crop:
            height, width = config.crop
            steps.append(A.PadIfNeeded(height, width, fill=fill, fill_mask=config.ignore_index))
            steps.append(A.RandomCrop(height, width))
        if config.hflip:
            steps.append(A.HorizontalFlip(p=0.5))
        if config.color:
            c = config.color
            steps.append(
                A.ColorJitter((1 - c, 1 + c), (1 - c, 1 + c), (1 - c, 1 + c), (-c / 10, c / 10), p=1)
            )
        self.steps = A.Compose([*steps, *_finish(config, multiple)])
        self.seed = seed

    def __call__(
        self, image: np.ndarray, target: np.ndarray | int, key: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """``key`` is (epoch, index)."""
        self.steps.set_random_seed(int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0]))
        return _apply(self.steps, image, target)


class EvalTransform:
    """Padding on the right and at the bottom to what the network needs, and normalisation."""

    def __init__(self, config: DataConfig, multiple: int) -> None:
        self.steps = A.Compose(_finish(config, multiple))

    def __call__(self, image: np.ndarray, target: np.ndarray | int) -> tuple[Tensor, Tensor]:
        return _apply(self.steps, image, target)


def _finish(config: DataConfig, multiple: int) -> list[A.BasicTransform]:
    # Padding after normalisation: zeros there are exactly what the runtime pads with.
    return [
        A.Normalize(config.mean, config.std),
        A.PadIfNeeded(
            min_height=None,
            min_width=None,
            pad_height_divisor=multiple,
            pad_width_divisor=multiple,
            position="top_left",
            fill=0,
            fill_mask=config.ignore_index,
        ),
        A.ToTensorV2(),
    ]


def _apply(steps: A.Compose, image: np.ndarray, target: np.ndarray | int) -> tuple[Tensor, Tensor]:
    if isinstance(target, np.ndarray):
        out = steps(image=image, mask=target)
        return out["image"], out["mask"].long()
    return steps(image=image)["image"], torch.tensor(target)

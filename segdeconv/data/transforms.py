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
from segdeconv.errors import UserError
from segdeconv.images import Picture, central_crop

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
            if config.resized_crop:
                # INTER_AREA averages where it shrinks, as the antialiasing of evaluation does.
                steps.append(A.RandomResizedCrop((height, width), interpolation=cv2.INTER_AREA))
            else:
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
        self.seed, self.least = seed, config.scale[0]

    def __call__(
        self, image: np.ndarray, target: np.ndarray | int, key: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """``key`` is (epoch, index)."""
        if min(image.shape[:2]) * self.least < 1:
            raise UserError(
                f"data.scale: begins at {self.least}, which leaves nothing of a picture of "
                f"{image.shape[1]}x{image.shape[0]}; give larger factors"
            )
        self.steps.set_random_seed(int(np.random.SeedSequence((self.seed, *key)).generate_state(1)[0]))
        return _apply(self.steps, image, target)


class BatchTransform:
    """Padding, crop, mirror and normalisation of pictures of one size, a whole batch in one operation each.

    What `TrainTransform` takes half a millisecond for is done in a few microseconds here, which is what small
    pictures need. What is done to a picture is in row ``index`` of a table drawn from seed and epoch.
    """

    @staticmethod
    def can(config: DataConfig) -> bool:
        """Whether the recipe asks for nothing else."""
        return config.scale == (1.0, 1.0) and not config.color and not config.resized_crop

    def __init__(self, config: DataConfig, seed: int, count: int) -> None:
        self.config, self.seed, self.count = config, seed, count
        self.epoch, self.table = -1, np.empty(0)
        self.fill = np.round(255 * np.array(config.mean)).astype(np.uint8)
        self.mean, self.std = (255 * torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))

    def __call__(self, images: list[Picture], keys: list[tuple[int, int]]) -> Tensor:
        """Pictures (H, W, 3) uint8, with (epoch, index) of each, to (n, 3, h, w) float32."""
        draws = np.stack([self._draws(epoch)[index] for epoch, index in keys])
        batch = np.stack(images)
        n, *size = batch.shape[:3]
        crop = self.config.crop or size
        pads = [max(self.config.pad, -(-(c - s) // 2)) for c, s in zip(crop, size, strict=True)]
        room = [s + 2 * p for s, p in zip(size, pads, strict=True)]
        padded = np.empty((n, *room, 3), np.uint8)
        padded[:] = self.fill
        padded[:, pads[0] : pads[0] + size[0], pads[1] : pads[1] + size[1]] = batch
        windows = np.lib.stride_tricks.sliding_window_view(padded, tuple(crop), axis=(1, 2))
        top, left = ((draws[:, i] * (room[i] - crop[i] + 1)).astype(int) for i in range(2))
        out = windows[np.arange(n), top, left]  # (n, 3, h, w)
        if self.config.hflip:
            mirrored = draws[:, 2] < 0.5
            out[mirrored] = out[mirrored, :, :, ::-1]
        return (torch.from_numpy(out) - self.mean) / self.std

    def _draws(self, epoch: int) -> np.ndarray:
        """Three numbers in 0 to 1 for every picture of the split."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.table = np.random.default_rng((self.seed, epoch)).random((self.count, 3))
        return self.table


class EvalTransform:
    """Padding on the right and at the bottom to what the network needs, and normalisation; before that the
    central crop, where the recipe gives ``shorter_side``.
    """

    def __init__(self, config: DataConfig, multiple: int) -> None:
        self.config = config
        # Data sets have compared sizes. They may differ: labels scored at their own size are not resized.
        self.steps = A.Compose(_finish(config, multiple), is_check_shapes=False)

    def __call__(self, image: np.ndarray, target: np.ndarray | int) -> tuple[Tensor, Tensor]:
        if self.config.shorter_side is not None and self.config.crop is not None:
            image = central_crop(image, self.config.shorter_side, self.config.crop)
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

"""What a data set is to the rest of the package: named pictures with targets, and how they are read."""

from __future__ import annotations

import colorsys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import numpy as np

from segdeconv.config import DataConfig
from segdeconv.errors import UserError
from segdeconv.images import (
    Palette,
    Picture,
    load_pixels,
    open_image,
    read_rgb,
    resize_image,
    resize_labels,
)


class Samples(ABC):
    """One split of a data set. ``load(i)`` gives an RGB picture (H, W, 3) uint8 and its target.

    The target is a label map (H, W) uint8 for segmentation, with ``ignore_index`` where nothing counts, or a
    class number for classification.
    """

    task: Literal["segmentation", "classification"] = "segmentation"
    classes: tuple[str, ...]
    palette: Palette
    same_size: bool  # whether all pictures are of one size, so that they can be batched whole

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """A short name of the sample, for files and messages."""

    @abstractmethod
    def load(self, index: int) -> tuple[Picture, Picture | int]: ...


def even_palette(count: int) -> Palette:
    """Evenly spread hues, for data sets that bring no colours."""
    return tuple(
        tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / count, 0.65, 0.95))  # type: ignore[misc]
        for i in range(count)
    )


def folder(config: DataConfig, *parts: str) -> Path:
    """A folder under the data root that must be there.

    Raises:
        UserError: the recipe has no root, or the folder is missing.
    """
    if config.root is None:
        raise UserError(f"data.root is missing: the folder of the {config.dataset} data")
    path = Path(config.root).expanduser().joinpath(*parts)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (data.root = {config.root!r}); a {config.dataset} set needs it"
        )
    return path


def read_mask(path: Path, size: tuple[int, int] | None, num_classes: int, ignore_index: int) -> Picture:
    """A label map (H, W) from an 8-bit grey or palette PNG.

    Raises:
        UserError: the file is damaged, has colour channels, or holds a label outside the class list.
    """
    image = load_pixels(open_image(path), path)
    if image.mode not in ("L", "P"):
        raise UserError(
            f"{path}: a mask must be an 8-bit grey or palette picture of class numbers, not {image.mode}"
        )
    mask = resize_labels(np.asarray(image), size)
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    wrong = [int(v) for v in present if v >= num_classes and v != ignore_index]
    if wrong:
        raise UserError(
            f"{path}: holds label {wrong[0]}, but there are {num_classes} classes (0 to {num_classes - 1}) "
            f"and ignore_index {ignore_index}; correct the mask or data.classes"
        )
    return mask


def read_pair(
    image_path: Path, mask_path: Path, config: DataConfig, num_classes: int, ignore_index: int
) -> tuple[Picture, Picture]:
    """A picture and its label map, which must be of one size before they are resized."""
    sizes = [open_image(path).size for path in (image_path, mask_path)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{mask_path}: is {sizes[1][0]}x{sizes[1][1]}, but its picture is {sizes[0][0]}x{sizes[0][1]}"
        )
    image = resize_image(read_rgb(image_path), config.size)
    return image, read_mask(mask_path, config.size, num_classes, ignore_index)

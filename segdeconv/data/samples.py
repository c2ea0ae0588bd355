"""What a data set is to the rest of the package: pictures with targets, and how they are read."""

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
    try:
        path = Path(config.root).expanduser().joinpath(*parts)
    except RuntimeError as error:
        raise UserError(f"data.root = {config.root!r}: {error}") from None
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (data.root = {config.root!r}); a {config.dataset} set needs it"
        )
    return path


def read_mask(path: Path) -> Picture:
    """Class numbers (H, W) uint8 from an 8-bit grey or palette picture in a lossless format.

    Raises:
        UserError: the file is damaged, has colour channels or another depth, or is lossy.
    """
    image = open_image(path)
    if image.format in ("JPEG", "WEBP"):
        raise UserError(f"{path}: a mask must be lossless, not {image.format}; save it as PNG")
    tile = getattr(image, "tile", None)  # how the file stores its pixels, before they are read
    depth = str(tile[0][3]) if tile else ""
    stretched = image.mode == "L" and "L;" in depth  # fewer than 8 bits, which Pillow spreads over 0..255
    if image.mode not in ("L", "P") or stretched:
        kind = depth if stretched else image.mode
        raise UserError(
            f"{path}: a mask must be an 8-bit grey or palette picture of class numbers, not {kind}"
        )
    return np.asarray(load_pixels(image, path))


def read_pair(
    image_path: Path, mask_path: Path, config: DataConfig, num_classes: int, ignore_index: int
) -> tuple[Picture, Picture]:
    """A picture and its label map, both at ``config.size``.

    Raises:
        UserError: either cannot be read, their sizes differ, or the mask holds a label outside the classes.
    """
    image, mask = read_rgb(image_path), read_mask(mask_path)
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"{mask_path}: is {mask.shape[1]}x{mask.shape[0]}, but its picture is "
            f"{image.shape[1]}x{image.shape[0]}"
        )
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    wrong = [int(v) for v in present if v >= num_classes and v != ignore_index]
    if wrong:
        raise UserError(
            f"{mask_path}: holds label {wrong[0]}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}) and ignore_index {ignore_index}; correct the mask or data.classes"
        )
    return resize_image(image, config.size), resize_labels(mask, config.size)

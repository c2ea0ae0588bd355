"""What a data set is to the rest of the package: pictures with targets, and how they are read."""

from __future__ import annotations

import colorsys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from segdeconv.config import DataConfig
from segdeconv.errors import UserError
from segdeconv.files import with_home
from segdeconv.images import (
    Palette,
    Picture,
    exif_turn,
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
    problems: Sequence[str] = ()  # a sentence for every file that has to be left out; see `open_samples`

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What a picture is called, without suffix: its stem, or CLASS/STEM in class folders. No two pictures
        of a split share a name.
        """

    @abstractmethod
    def load(self, index: int) -> tuple[Picture, Picture | int]: ...


class PairedSamples(Samples):
    """Pictures with masks, both in files.

    A subclass sets ``config``, ``pairs`` (picture, mask) and ``numbers``: label in the file -> class number,
    or ``ignore_index``.
    """

    config: DataConfig
    pairs: list[tuple[Path, Path]]
    numbers: dict[int, int]

    @property
    def same_size(self) -> bool:  # type: ignore[override]
        return self.config.size is not None

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.pairs[index][0].stem

    def load(self, index: int) -> tuple[Picture, Picture]:
        return read_pair(*self.pairs[index], self.config.size, self.numbers)


def even_palette(count: int) -> Palette:
    """Evenly spread hues, of many classes in three shades, for data sets that bring no colours."""
    shades = ((0.65, 0.95), (0.95, 0.55), (0.3, 0.8)) if count > 12 else ((0.65, 0.95),)
    hues = -(-count // len(shades))
    colors = (colorsys.hsv_to_rgb(i // len(shades) / hues, *shades[i % len(shades)]) for i in range(count))
    return tuple(tuple(round(255 * part) for part in color) for color in colors)  # type: ignore[misc]


def root_of(config: DataConfig) -> Path:
    """Where the recipe says its data lies.

    Raises:
        UserError: it does not say, or names the home of nobody.
    """
    if config.root is None:
        raise UserError(f"data.root is missing: the folder of the {config.dataset} data")
    return with_home(config.root, "data.root")


def folder(config: DataConfig, *parts: str) -> Path:
    """A folder under the data root that must be there.

    Raises:
        UserError: the recipe has no root, or the folder is missing.
    """
    path = root_of(config).joinpath(*parts)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder (data.root = {config.root!r}); the data set {config.dataset} needs it"
        )
    return path


def match(
    pictures: dict[str, Path], masks: dict[str, Path], picture_folder: Path, mask_folder: Path
) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Pictures and masks of the same key in pairs, and a sentence for every one left over."""
    problems = [
        f"{path}: has no mask of that name in {mask_folder}"
        for key, path in pictures.items()
        if key not in masks
    ]
    problems += [
        f"{path}: has no picture of that name in {picture_folder}"
        for key, path in masks.items()
        if key not in pictures
    ]
    return [(path, masks[key]) for key, path in pictures.items() if key in masks], problems


def read_mask(path: Path) -> Picture:
    """Class numbers (H, W) uint8 from an 8-bit grey or palette picture in a lossless format.

    Raises:
        UserError: the file is damaged, has colour channels, another depth or an EXIF turn, or is lossy.
    """
    with open_image(path) as image:
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
        load_pixels(image, path)
        if exif_turn(image) is not None:  # pictures are turned by it, but masks are hardly ever meant to be
            raise UserError(
                f"{path}: has an EXIF orientation, which a mask must not have; save it upright and without"
            )
        return np.asarray(image)


def read_pair(
    image_path: Path, mask_path: Path, size: tuple[int, int] | None, numbers: dict[int, int]
) -> tuple[Picture, Picture]:
    """A picture and its label map, both at ``size``, with labels as ``numbers`` says.

    Raises:
        UserError: either cannot be read, their sizes differ, or the mask holds a label not in ``numbers``.
    """
    image, mask = read_rgb(image_path), read_mask(mask_path)
    if image.shape[:2] != mask.shape:
        with open_image(image_path) as opened:
            turned = ", turned upright by its EXIF data" if exif_turn(opened) is not None else ""
        raise UserError(
            f"{mask_path}: is {mask.shape[1]}x{mask.shape[0]}, but its picture is "
            f"{image.shape[1]}x{image.shape[0]}{turned}"
        )
    present = np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist()
    wrong = set(present) - set(numbers)
    if wrong:
        raise UserError(
            f"{mask_path}: holds label {_ranges(wrong)}, but the labels here are {_ranges(numbers)}; correct "
            "the mask or data.classes"
        )
    table = np.zeros(256, np.uint8)
    table[list(numbers)] = list(numbers.values())
    return resize_image(image, size), table[resize_labels(mask, size)]


def _ranges(labels: Iterable[int]) -> str:
    """Numbers as people write them: 0 to 18, 255."""
    runs: list[list[int]] = []
    for label in sorted(labels):
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)

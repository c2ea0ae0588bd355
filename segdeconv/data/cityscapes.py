"""Cityscapes (Cordts et al., CVPR 2016, arXiv 1604.01685) from the unpacked official archives:

``root/leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` with ``root/gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png``,
NAME being CITY_SEQUENCE_FRAME; the split train_extra has ``gtCoarse`` instead. ``train: train+train_extra``
joins splits. Label ids become the 19 train classes as they are read; which those are, and their names and
colours, the package cityscapesscripts says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segdeconv.config import DataConfig
from segdeconv.data.samples import PairedSamples, folder, match
from segdeconv.errors import UserError
from segdeconv.images import Picture, load_pixels, open_image, read_rgb, resize_image

_PICTURE = "_leftImg8bit"


def official_labels() -> list[Any]:
    """The labels of cityscapesscripts: name, id, trainId, category, hasInstances, ignoreInEval, color.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from cityscapesscripts.helpers.labels import labels
    except ImportError:
        raise UserError("cityscapesscripts is not installed; pip install 'segdeconv[cityscapes]'") from None
    return list(labels)


class Cityscapes(PairedSamples):
    """See the file's header. Where the split test has no labels, its targets are ignored everywhere.

    Attributes:
        label_ids: the official label id of every class, as the evaluation server wants it.
        categories: the category of every class.
    """

    def __init__(self, config: DataConfig, split: str) -> None:
        labels = official_labels()
        evaluated = sorted((x for x in labels if not x.ignoreInEval), key=lambda label: label.trainId)
        self.config = config
        self.classes = tuple(label.name for label in evaluated)
        self.palette = tuple(label.color for label in evaluated)
        self.label_ids: tuple[int, ...] = tuple(label.id for label in evaluated)
        self.categories: tuple[str, ...] = tuple(label.category for label in evaluated)
        self.numbers = {label.id: config.ignore_index for label in labels if label.id >= 0}
        self.numbers |= {label.id: number for number, label in enumerate(evaluated)}
        self.pairs, self.problems = [], []
        for part in split.split("+"):
            pairs, problems = self._pairs(part)
            self.pairs += pairs
            self.problems += problems

    def _pairs(self, split: str) -> tuple[list[tuple[Path, Path]], list[str]]:
        pictures = folder(self.config, "leftImg8bit", split)
        masks = pictures.parents[1] / _fineness(split) / split
        picture_of = {_frame(path): path for path in sorted(pictures.glob(f"*/*{_PICTURE}.png"))}
        mask_of = {_frame(path): path for path in sorted(masks.glob("*/*_labelIds.png"))}
        if not picture_of:
            return [], [f"{pictures}: holds no picture CITY/NAME{_PICTURE}.png"]
        if split == "test":
            mask_of = {frame: _truth(path, "labelIds") for frame, path in picture_of.items()}
        return match(picture_of, mask_of, pictures, masks)

    def load(self, index: int) -> tuple[Picture, Picture]:
        picture, mask = self.pairs[index]
        if mask.is_file() or picture.parts[-3] != "test":
            return super().load(index)
        image = resize_image(read_rgb(picture), self.config.size)
        return image, np.full(image.shape[:2], self.config.ignore_index, np.uint8)

    def instances(self, index: int) -> NDArray[np.int32] | None:
        """The instance map (H, W) at its own size: label id, or 1000 times it plus a number where objects are
        told apart; None where the file is absent.

        Raises:
            UserError: the file is damaged.
        """
        path = _truth(self.pairs[index][0], "instanceIds")
        if not path.is_file():
            return None
        with open_image(path) as image:
            return np.asarray(load_pixels(image, path)).astype(np.int32)


def _fineness(split: str) -> str:
    return "gtCoarse" if split == "train_extra" else "gtFine"


def _frame(path: Path) -> str:
    """CITY/CITY_SEQUENCE_FRAME, which a picture and its annotations share."""
    return f"{path.parent.name}/{'_'.join(path.name.split('_')[:3])}"


def _truth(picture: Path, kind: str) -> Path:
    """Where the annotation of a picture lies, ``kind`` being labelIds or instanceIds."""
    split = picture.parts[-3]
    return picture.parents[3] / _fineness(split) / split / f"{_frame(picture)}_{_fineness(split)}_{kind}.png"

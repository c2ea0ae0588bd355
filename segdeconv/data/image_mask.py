"""Your own pictures with masks: ``root/SPLIT/images/NAME.jpg`` with ``root/SPLIT/masks/NAME.png``.

Masks are 8-bit grey or palette PNGs of class numbers in the order of ``data.classes``; ``data.ignore_index``
marks what does not count.
"""

from __future__ import annotations

from pathlib import Path

from segdeconv.config import DataConfig
from segdeconv.data.samples import Samples, even_palette, folder, read_pair
from segdeconv.errors import UserError
from segdeconv.images import Picture, images_in


def pair_up(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Every picture with the mask of its name.

    Raises:
        UserError: a picture without a mask, a mask without a picture, or two pictures of one name.
    """
    by_stem = {path.stem: path for path in images_in(images)}
    mask_of = {path.stem: path for path in images_in(masks)}
    for stem, path in by_stem.items():
        if stem not in mask_of:
            raise UserError(f"{path}: has no mask {masks / (stem + '.png')}")
    for stem, path in mask_of.items():
        if stem not in by_stem:
            raise UserError(f"{path}: has no picture of that name in {images}")
    return [(path, mask_of[stem]) for stem, path in by_stem.items()]


class ImageMask(Samples):
    """See the file's header. Raises UserError where folders, pairs, classes or labels are wrong."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if not config.classes:
            raise UserError("data.classes is missing: the class names, in the order of the mask values")
        self.config = config
        self.same_size = config.size is not None
        self.classes = config.classes
        self.palette = config.palette or even_palette(len(config.classes))
        self.pairs = pair_up(folder(config, split, "images"), folder(config, split, "masks"))

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Picture, Picture]:
        return read_pair(*self.pairs[index], self.config, len(self.classes), self.config.ignore_index)

"""Your own pictures with masks: ``root/SPLIT/images/NAME.jpg`` with ``root/SPLIT/masks/NAME.png``.

Masks are 8-bit grey or palette PNGs of class numbers in the order of ``data.classes``; ``data.ignore_index``
marks what does not count.
"""

from __future__ import annotations

from pathlib import Path

from segdeconv.config import DataConfig
from segdeconv.data.samples import PairedSamples, even_palette, folder, match
from segdeconv.errors import UserError
from segdeconv.images import list_images


def pair_up(images: Path, masks: Path) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Every picture with the mask of its name, and a sentence for every file left over."""
    pictures, odd_pictures = list_images(images)
    mask_files, odd_masks = list_images(masks)
    by_stem, mask_of = ({path.stem: path for path in files} for files in (pictures, mask_files))
    pairs, problems = match(by_stem, mask_of, images, masks)
    return pairs, [*odd_pictures, *odd_masks, *problems]


class ImageMask(PairedSamples):
    """See the file's header."""

    def __init__(self, config: DataConfig, split: str) -> None:
        if not config.classes:
            raise UserError("data.classes is missing: the class names, in the order of the mask values")
        self.config = config
        self.classes = config.classes
        self.palette = config.palette or even_palette(len(config.classes))
        self.numbers = {label: label for label in (*range(len(config.classes)), config.ignore_index)}
        self.pairs, self.problems = pair_up(folder(config, split, "images"), folder(config, split, "masks"))

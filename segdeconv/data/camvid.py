"""CamVid road scenes in the SegNet layout: ``root/SPLIT/NAME.png|jpg`` with ``root/SPLITannot/NAME.png``.

Brostow, Fauqueur, Cipolla, 'Semantic object classes in video', 2009. Labels 0 to 10 are the classes below,
11 is void and is ignored.
"""

from __future__ import annotations

import numpy as np

from segdeconv.config import DataConfig
from segdeconv.data.image_mask import pair_up
from segdeconv.data.samples import Samples, folder, read_pair
from segdeconv.images import Color, Picture

CLASSES: dict[str, Color] = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}
VOID = len(CLASSES)


class CamVid(Samples):
    """See the file's header. Raises UserError where folders, pairs or labels are wrong."""

    classes = tuple(CLASSES)
    palette = tuple(CLASSES.values())

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.same_size = config.size is not None
        self.pairs = pair_up(folder(config, split), folder(config, f"{split}annot"))

    def __len__(self) -> int:
        return len(self.pairs)

    def load(self, index: int) -> tuple[Picture, Picture]:
        image, mask = read_pair(*self.pairs[index], self.config, len(CLASSES), VOID)
        return image, np.where(mask == VOID, np.uint8(self.config.ignore_index), mask)

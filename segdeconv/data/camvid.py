"""CamVid road scenes in the SegNet layout: ``root/SPLIT/NAME.png|jpg`` with ``root/SPLITannot/NAME.png``.

Brostow, Fauqueur, Cipolla, 'Semantic object classes in video', 2009. Labels 0 to 10 are the classes below,
11 is void and is ignored.
"""

from __future__ import annotations

from segdeconv.config import DataConfig
from segdeconv.data.image_mask import pair_up
from segdeconv.data.samples import PairedSamples, folder
from segdeconv.images import Color

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


class CamVid(PairedSamples):
    """See the file's header."""

    classes = tuple(CLASSES)
    palette = tuple(CLASSES.values())

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.numbers = {**{label: label for label in range(VOID)}, VOID: config.ignore_index}
        self.pairs, self.problems = pair_up(folder(config, split), folder(config, f"{split}annot"))

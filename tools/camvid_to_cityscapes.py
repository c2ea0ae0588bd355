"""Lay CamVid out as a small Cityscapes tree, to run all that is made for Cityscapes on real photographs.

    python tools/camvid_to_cityscapes.py data/camvid data/citycam

SOURCE is CamVid in the SegNet layout. TARGET gets train and val, and as test the first ten photographs of val
without labels. CamVid tells no objects apart: the instances are the connected regions of a class that has
instances in Cityscapes, numbered from 0, but for regions under ten pixels, which stay a plain label id.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdeconv.config import DataConfig
from segdeconv.data import open_samples
from segdeconv.data.camvid import CLASSES
from segdeconv.data.cityscapes import official_labels
from segdeconv.errors import one_sentence
from segdeconv.files import make_folder
from segdeconv.images import Picture, save_image
from segdeconv.progress import Bar

CITY = "camvid"
# CamVid's names where Cityscapes has others.
RENAMED = {
    "pavement": "sidewalk",
    "tree": "vegetation",
    "sign symbol": "traffic sign",
    "pedestrian": "person",
    "bicyclist": "bicycle",
}
TEST_PICTURES = 10
MIN_PIXELS = 10
VOID = 255


def label_table() -> Picture:
    """CamVid class number, or `VOID`, to Cityscapes label id: (256,) uint8."""
    id_of = {label.name: label.id for label in official_labels()}
    table = np.full(256, id_of["unlabeled"], np.uint8)
    table[: len(CLASSES)] = [id_of[RENAMED.get(name, name)] for name in CLASSES]
    return table


def instance_ids(label_ids: Picture) -> NDArray[np.uint16]:
    """Cityscapes instance map of a label id map, both (H, W): 1000 id + k in region k of a class."""
    instances = label_ids.astype(np.uint16)
    for label in official_labels():
        if label.hasInstances:
            count, regions, stats, _ = cv2.connectedComponentsWithStats(
                (label_ids == label.id).astype(np.uint8), connectivity=8
            )
            large = [i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= MIN_PIXELS]
            for number, region in enumerate(large):
                instances[regions == region] = 1000 * label.id + number
    return instances


def convert(source: Path, target: Path) -> None:
    table = label_table()
    frame = 0
    for split, called in (("train", "train"), ("val", "val"), ("val", "test")):
        samples = open_samples(DataConfig("camvid", root=str(source), ignore_index=VOID), split)
        count = min(TEST_PICTURES, len(samples)) if called == "test" else len(samples)
        pictures = make_folder(target / "leftImg8bit" / called / CITY)
        truth = make_folder(target / "gtFine" / called / CITY)
        for index in Bar(range(count), count, called):
            image, mask = samples.load(index)
            name = f"{CITY}_{frame:06d}_000019"
            frame += 1
            save_image(Image.fromarray(image), pictures / f"{name}_leftImg8bit.png")
            if called != "test":
                label_ids = table[mask]
                save_image(Image.fromarray(label_ids), truth / f"{name}_gtFine_labelIds.png")
                instances = Image.fromarray(instance_ids(label_ids))
                save_image(instances, truth / f"{name}_gtFine_instanceIds.png")
    print(f"wrote {frame} pictures to {target}")


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="CamVid in the SegNet layout")
    parser.add_argument("target", type=Path, help="the folder of the tree")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target)


if __name__ == "__main__":
    main()

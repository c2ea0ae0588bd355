"""ImageNet-1k (ILSVRC 2012, Russakovsky et al., arXiv 1409.0575). Classes are the WordNet ids, sorted.

A split is a folder of class folders, as in `image_folder`, or flat, as the validation pictures come; then
their classes are read from what lies under the root: ``LOC_val_solution.csv`` of the Kaggle archive, or the
unpacked devkit, ``ILSVRC2012_devkit_t12/data``. The Kaggle archive needs no moving of files: ``data.root`` is
its top, ``data.train`` and ``data.val`` are ``ILSVRC/Data/CLS-LOC/train`` and ``.../val``.
"""

from __future__ import annotations

import csv
from pathlib import Path

from segdeconv.config import DataConfig
from segdeconv.data.image_folder import ImageFolder
from segdeconv.data.samples import even_palette, folder, root_of
from segdeconv.errors import UserError, first_line
from segdeconv.images import list_images

KAGGLE = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"


class ImageNet(ImageFolder):
    """See the file's header."""

    def __init__(self, config: DataConfig, split: str) -> None:
        pictures = folder(config, split)
        if any(path.is_dir() and not path.name.startswith(".") for path in pictures.iterdir()):
            super().__init__(config, split)
            return
        self.config = config
        self.same_size = config.size is not None
        found, problems = list_images(pictures)
        class_of, source = _flat_classes(root_of(config))
        self.classes = tuple(sorted(set(class_of.values())))
        self.palette = even_palette(len(self.classes))
        number = {name: label for label, name in enumerate(self.classes)}
        self.items = [(path, number[class_of[path.stem]]) for path in found if path.stem in class_of]
        stems = {path.stem for path in found}
        problems += [f"{path}: is not listed in {source}" for path in found if path.stem not in class_of]
        problems += [f"{source}: lists {stem}, but {pictures} holds no such picture"
                     for stem in class_of if stem not in stems]  # fmt: skip
        self.problems = problems


def _flat_classes(root: Path) -> tuple[dict[str, str], Path]:
    """WordNet id by picture name, and the file that says so."""
    kaggle, truth = root / KAGGLE, root / DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    source = kaggle if kaggle.is_file() else truth
    if not source.is_file():
        raise UserError(
            f"{root}: pictures that lie flat need {KAGGLE} or {DEVKIT} here, which say their classes; put "
            "one there, or sort the pictures into class folders"
        )
    try:
        if source == kaggle:
            with open(kaggle, newline="") as file:
                rows = csv.DictReader(file)
                found = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        else:
            wnids = _devkit_wnids(truth.parent / "meta.mat")
            numbers = truth.read_text().split()
            found = {f"ILSVRC2012_val_{i:08d}": wnids[int(n)] for i, n in enumerate(numbers, 1)}
        if not found:
            raise ValueError("it lists no picture")
        return found, source
    except Exception as error:  # scipy has classes of its own
        raise UserError(f"{source}: not as ImageNet has it ({first_line(error)})") from None


def _devkit_wnids(path: Path) -> dict[int, str]:
    """WordNet id by the devkit's class number, which is not their sorted order."""
    from scipy.io import loadmat

    synsets = loadmat(path, squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if row["num_children"] == 0}

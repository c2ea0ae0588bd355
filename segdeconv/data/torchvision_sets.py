"""CIFAR-10 and -100, MNIST and Fashion-MNIST through torchvision, from files that lie under ``data.root`` as
torchvision leaves them. The whole split is held in memory.

The files of CIFAR are pickles; torchvision compares their MD5 sums with the published ones before it reads
them. Those of MNIST are plain arrays.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import filelock
import numpy as np
import torchvision
from torchvision.datasets import mnist

from segdeconv.config import DataConfig
from segdeconv.data.samples import Samples, even_palette, root_of
from segdeconv.errors import UserError, first_line
from segdeconv.files import make_folder
from segdeconv.images import Picture, resize_image

TORCHVISION = {
    "cifar10": torchvision.datasets.CIFAR10,
    "cifar100": torchvision.datasets.CIFAR100,
    "mnist": torchvision.datasets.MNIST,
    "fashion_mnist": torchvision.datasets.FashionMNIST,
}


def _alone(root: Path) -> AbstractContextManager[object]:
    """A lock: while one process fetches files, others would read what is half there."""
    lock = make_folder(root) / ".download.lock"
    writable = os.access(lock if lock.exists() else root, os.W_OK)
    return filelock.FileLock(lock) if writable else nullcontext()


def _check_readable(raw: Path, part: str) -> None:
    """Raise UserError if a file of MNIST's is there and damaged: torchvision fetches only what is missing."""
    for kind, read in (("images-idx3", mnist.read_image_file), ("labels-idx1", mnist.read_label_file)):
        path = raw / f"{part}-{kind}-ubyte"
        try:
            if path.is_file():
                read(str(path))
        except Exception as error:  # it asserts, and lets through what torch raises
            raise UserError(
                f"{path}: is damaged ({first_line(error)}); delete it, and set data.download=true to fetch it"
            ) from None


class TorchvisionSet(Samples):
    """See the file's header. Splits are train and test; val is test. Grey pictures become RGB.

    Raises:
        UserError: the files are not there or are damaged, or cannot be downloaded, or there is no such split.
    """

    task = "classification"
    same_size = True

    def __init__(self, config: DataConfig, split: str) -> None:
        if split not in ("train", "val", "test"):
            raise UserError(f"data: {config.dataset} has the splits train and test (or val), not {split!r}")
        root = root_of(config)
        try:
            with _alone(root) if config.download else nullcontext():
                data = TORCHVISION[config.dataset](str(root), split == "train", download=config.download)
        except UserError:
            raise
        except Exception as error:  # torchvision's readers assert, and let through what torch raises
            kind = TORCHVISION[config.dataset].__name__
            _check_readable(root / kind / "raw", "train" if split == "train" else "t10k")
            if config.download:
                what = f"cannot be downloaded ({first_line(error)}); check the connection and the room there"
            else:
                what = "is not here, or is damaged; set data.download=true to fetch it"
            raise UserError(f"{root}: {config.dataset} {what}") from None
        self.size = config.size
        self.classes = tuple(data.classes)
        self.palette = even_palette(len(self.classes))
        self.images = np.asarray(data.data)
        self.labels = [int(label) for label in data.targets]
        wrong = set(self.labels) - set(range(len(self.classes)))
        if wrong or len(self.labels) != len(self.images):
            what = f"the label {max(wrong)}" if wrong else f"{len(self.labels)} labels"
            raise UserError(
                f"{root}: {config.dataset} has {what} for {len(self.images)} pictures of {len(self.classes)} "
                "classes; delete its files, and set data.download=true to fetch them"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{index:05d}"

    def load(self, index: int) -> tuple[Picture, int]:
        image = self.images[index]
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        return resize_image(rgb, self.size), self.labels[index]

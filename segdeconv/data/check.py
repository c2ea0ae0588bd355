"""Every file of a recipe's data read once, before training: all that is wrong with it, and what it holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Column, Table
from torch.utils.data import Dataset

from segdeconv.config import DataConfig
from segdeconv.data import Loader, end_workers, find_samples
from segdeconv.data.samples import PairedSamples, Samples
from segdeconv.errors import UserError
from segdeconv.images import exif_turn, folder_of_pictures, open_image
from segdeconv.progress import Bar

Counts = NDArray[np.int64]


class _Sample(NamedTuple):
    """What one picture and its target hold; ``problem`` tells why they cannot be read."""

    problem: str | None
    levels: Counts  # of each channel's 256 levels: (3, 256)
    labels: Counts  # pixels of each label, or 1 for the class of a picture: (256,), or (C,) for more classes
    digest: bytes  # of the picture's pixels
    turned: bool  # by its EXIF data


class _Survey(Dataset[_Sample]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.bins = max(256, len(samples.classes))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> _Sample:
        try:
            image, target = self.samples.load(index)
        except UserError as error:
            empty = np.zeros((3, 256), np.int64), np.zeros(self.bins, np.int64)
            return _Sample(str(error), *empty, b"", False)
        levels = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)]
        labels = np.bincount(np.ravel(target), minlength=self.bins)
        digest = hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        turned = False
        if isinstance(self.samples, PairedSamples):
            with open_image(self.samples.pairs[index][0]) as picture:
                turned = exif_turn(picture) is not None
        return _Sample(None, np.stack(levels), labels, digest, turned)


@dataclass(frozen=True)
class SplitReport:
    """What a split holds: C classes.

    Attributes:
        name: what the recipe calls the split.
        classes: C names.
        pictures: how many could be read.
        problems: a sentence for everything that must be mended.
        warnings: a sentence for everything that looks wrong.
        levels: (3, 256), how often each level of red, green and blue occurs.
        labels: (C,), pixels of each class, or pictures for classification.
        holding: (C,), pictures that hold the class.
        labels_beside: (C,), labelled pixels in those pictures.
        digests: of each picture's pixels, with the first picture's name.
    """

    name: str
    classes: tuple[str, ...]
    pictures: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    levels: Counts
    labels: Counts
    holding: Counts
    labels_beside: Counts
    digests: dict[bytes, str]


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Attributes:
        splits: training and validation.
        problems: a sentence for everything that must be mended, in both splits and between them.
        warnings: likewise, for everything that looks wrong.
    """

    task: str
    classes: tuple[str, ...]
    splits: tuple[SplitReport, SplitReport]
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the training pictures, RGB in units of 0 to 1."""
        return tuple(self._moment(1).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """Of the training pictures, RGB in units of 0 to 1."""
        return tuple(np.sqrt(np.maximum(self._moment(2) - self._moment(1) ** 2, 0)).tolist())

    def _moment(self, power: int) -> NDArray[np.float64]:
        levels = self.splits[0].levels
        return levels @ (np.arange(256) / 255) ** power / np.maximum(levels.sum(1), 1)

    @property
    def class_weights(self) -> tuple[float, ...]:
        """Median frequency balancing (Eigen and Fergus, arXiv 1411.4734): the median of the classes'
        frequencies over each one's, which is its share of the labelled pixels of the pictures that hold it;
        for classification, its share of the pictures. 0 for a class that does not occur.
        """
        split = self.splits[0]
        total = split.labels_beside if self.task == "segmentation" else split.labels.sum()
        frequency = split.labels / np.maximum(total, 1)
        present = frequency > 0
        weights = np.zeros(len(frequency))
        if present.any():
            weights[present] = np.median(frequency[present]) / frequency[present]
        return tuple(weights.tolist())


def check(config: DataConfig) -> Report:
    """Read every file of both splits, with ``config.num_workers`` processes.

    Raises:
        UserError: a split cannot be opened at all.
    """
    opened = [find_samples(config, split) for split in ("train", "val")]
    train, val = (
        _check_split(samples, name, config)
        for samples, name in zip(opened, (config.train, config.val), strict=True)
    )
    problems = [*train.problems, *val.problems]
    if opened[0].classes != opened[1].classes:
        odd = sorted(set(opened[0].classes) ^ set(opened[1].classes))
        what = f"{', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''} in one only"
        problems.append(f"{config.train} and {config.val} have different classes: {what}")
    warnings = [*train.warnings, *val.warnings]
    both = [name for digest, name in val.digests.items() if digest in train.digests]
    if both:
        warnings.append(f"{len(both)} pictures of {config.val} are in {config.train} too, {both[0]} first")
    return Report(opened[0].task, opened[0].classes, (train, val), tuple(problems), tuple(warnings))


def _check_split(samples: Samples, name: str, config: DataConfig) -> SplitReport:
    problems = list(samples.problems)
    names = Counter(samples.name(index) for index in range(len(samples)))
    problems += [
        f"{name}: {times} pictures are called {called}" for called, times in names.items() if times > 1
    ]
    count = len(samples.classes)
    levels = np.zeros((3, 256), np.int64)
    labels, holding, beside = np.zeros((3, count), np.int64)
    pictures = 0
    binary: list[str] = []
    turned: list[str] = []
    digests: dict[bytes, str] = {}
    loader = Loader(_Survey(samples), batch_size=None, num_workers=config.num_workers, collate_fn=_as_it_is)
    batches = iter(loader)
    try:
        for index, sample in enumerate(Bar(batches, len(samples), f"reading {name}")):
            if sample.problem is not None:
                problems.append(sample.problem)
                continue
            counted = sample.labels[:count]
            pictures += 1
            digests.setdefault(sample.digest, samples.name(index))
            if sample.turned:
                turned.append(samples.name(index))
            levels += sample.levels
            labels += counted
            holding += counted > 0
            beside += (counted > 0) * counted.sum()
            if samples.task == "segmentation" and count == 2 and counted[1] == 0 and sample.labels[255]:
                binary.append(samples.name(index))
    finally:
        end_workers(batches)
    if pictures and not labels.any():
        problems.append(f"{name}: no pixel of any mask is labelled, all are {config.ignore_index}, ignored")
    return SplitReport(
        name,
        samples.classes,
        pictures,
        tuple(problems),
        tuple(_warnings(samples, name, pictures, binary, turned)),
        levels=levels,
        labels=labels,
        holding=holding,
        labels_beside=beside,
        digests=digests,
    )


def _warnings(samples: Samples, name: str, pictures: int, binary: list[str], turned: list[str]) -> list[str]:
    """What looks wrong with a split; ``binary`` are the names of masks that hold 0 and 255 only, ``turned``
    those of pictures that EXIF data turns.
    """
    warnings = []
    if binary:
        warnings.append(
            f"{name}: {len(binary)} of {pictures} masks hold 0 and 255 only, {binary[0]} first; 255 is "
            f"ignored, so if it means {samples.classes[1]!r} here, write 1 instead"
        )
    if turned:
        warnings.append(
            f"{name}: {len(turned)} of {pictures} pictures are turned upright by their EXIF data, "
            f"{turned[0]} first; their masks have to be upright too"
        )
    for folder in sorted({path.parent for pair in getattr(samples, "pairs", ()) for path in pair}):
        inner = folder_of_pictures(folder)
        if inner is not None:
            warnings.append(f"{inner}: holds pictures, which are not read; put them into {folder}")
    return warnings


def _as_it_is(sample: Any) -> Any:
    return sample


def table(report: Report) -> Table:
    """The classes for the terminal: their share of the labelled pixels, or of the pictures for
    classification, how many pictures hold them, and the suggested weight.
    """
    columns = [f"{split.name}\n{what}" for split in report.splits for what in ("share", "pictures")]
    out = Table(Column("class", overflow="fold"), *columns, "weight")
    weights = dict(zip(report.classes, report.class_weights, strict=True))
    for name in dict.fromkeys((*report.classes, *report.splits[1].classes)):
        row = []
        for split in report.splits:
            number = split.classes.index(name) if name in split.classes else None
            labels, holding = (0, 0) if number is None else (split.labels[number], split.holding[number])
            row += [f"{labels / max(split.labels.sum(), 1):.4f}", str(holding)]
        out.add_row(name, *row, f"{weights[name]:.3g}" if weights.get(name) else "absent")
    return out


def as_keys(report: Report) -> str:
    """Mean, deviation and weights as a recipe's keys, as far as it takes them."""
    rows = {}
    if min(report.std) > 1e-6:  # rounding alone, of one level, makes 1e-8
        rows["data.mean"] = [round(v, 4) for v in report.mean]
        rows["data.std"] = [round(v, 4) for v in report.std]
    if any(report.class_weights):
        rows["train.class_weights"] = [float(f"{v:.3g}") for v in report.class_weights]
    return "\n".join(f"{key}: {value}" for key, value in rows.items())

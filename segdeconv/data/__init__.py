"""Data sets by name, and the loaders that training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from segdeconv.config import DataConfig
from segdeconv.data.camvid import CamVid
from segdeconv.data.image_folder import ImageFolder
from segdeconv.data.image_mask import ImageMask
from segdeconv.data.samples import Samples
from segdeconv.data.toy import ToyStreet
from segdeconv.data.transforms import EvalTransform, TrainTransform
from segdeconv.errors import UserError
from segdeconv.images import Picture

DATASETS: dict[str, Callable[[DataConfig, str], Samples]] = {
    "toy": ToyStreet,
    "camvid": CamVid,
    "image_mask": ImageMask,
    "image_folder": ImageFolder,
}

_CACHE_BYTES = 2 << 30  # decoded pictures kept in memory by a loader without worker processes


def open_samples(config: DataConfig, split: str) -> Samples:
    """The 'train' or 'val' split of the data a recipe names.

    Raises:
        UserError: no data set of that name, or its files are not as they should be.
    """
    if config.dataset not in DATASETS:
        raise UserError(
            f"data.dataset = {config.dataset!r}: no such data set; known are {', '.join(DATASETS)}"
        )
    samples = DATASETS[config.dataset](config, {"train": config.train, "val": config.val}[split])
    if config.classes is not None and samples.classes != config.classes:
        raise UserError(f"data.classes: {config.dataset} brings its own classes; remove the key")
    if samples.task == "segmentation":
        if len(samples.classes) > 256:
            raise UserError(f"data.classes: {len(samples.classes)} classes do not fit 8-bit masks")
        if config.ignore_index < len(samples.classes):
            raise UserError(
                f"data.ignore_index = {config.ignore_index} is the number of class "
                f"{samples.classes[config.ignore_index]!r}; take one above the classes, such as 255"
            )
    return samples


class _Cached:
    """Decoded samples, kept while they fit in memory."""

    def __init__(self, samples: Samples, enabled: bool) -> None:
        self.samples = samples
        self.room = _CACHE_BYTES if enabled else 0
        self.kept: dict[int, tuple[Picture, Picture | int]] = {}

    def load(self, index: int) -> tuple[Picture, Picture | int]:
        if index in self.kept:
            return self.kept[index]
        image, target = self.samples.load(index)
        size = image.nbytes + (0 if isinstance(target, int) else target.nbytes)
        if size <= self.room:
            self.room -= size
            self.kept[index] = image, target
        return image, target


class TrainSet(Dataset[tuple[Tensor, Tensor]]):
    """Augmented samples; item ``epoch * len + index`` is sample ``index`` as seen in ``epoch``."""

    def __init__(self, samples: Samples, config: DataConfig, seed: int, multiple: int) -> None:
        self.cached = _Cached(samples, enabled=config.num_workers == 0)
        self.count = len(samples)
        self.transform = TrainTransform(config, seed, multiple)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(item, self.count)
        image, target = self.cached.load(index)
        return self.transform(image, target, (epoch, index))


class EvalSet(Dataset[tuple[Tensor, Tensor]]):
    """Samples as they are, normalised."""

    def __init__(self, samples: Samples, config: DataConfig, multiple: int) -> None:
        self.cached = _Cached(samples, enabled=config.num_workers == 0)
        self.count = len(samples)
        self.transform = EvalTransform(config, multiple)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.cached.load(index))


class EpochBatches(Sampler[list[int]]):
    """Batches of items of a `TrainSet`: a fresh order every epoch, from seed and epoch alone.

    Set ``epoch``, and ``start`` to begin with a later batch, before each pass. Of every batch this process
    gets each ``world``-th item from number ``rank`` on. The incomplete last batch is dropped.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world: int) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count // self.batch_size - self.start

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = (torch.randperm(self.count, generator=generator) + self.epoch * self.count).tolist()
        for batch in range(self.start, self.count // self.batch_size):
            items = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield items[self.rank :: self.world]


def train_loader(
    samples: Samples,
    config: DataConfig,
    batch_size: int,
    seed: int,
    multiple: int,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """This process's share of batches of ``batch_size`` in random order; see `EpochBatches`, which is
    ``loader.batch_sampler``.

    Raises:
        UserError: fewer samples than one batch, fewer in a batch than processes, or whole pictures whose
            sizes differ.
    """
    if len(samples) < batch_size:
        raise UserError(
            f"train.batch_size = {batch_size}: the training split has only {len(samples)} pictures"
        )
    if batch_size < world:
        raise UserError(f"train.batch_size = {batch_size}: it is shared out, and there are {world} processes")
    if config.crop is None and not samples.same_size and batch_size > 1:
        raise UserError("data: pictures of different sizes make no batch; give data.crop or data.size")
    dataset = TrainSet(samples, config, seed, multiple)
    return DataLoader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed, rank, world),
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.num_workers > 0,
        generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from torch's global one
    )


def eval_loader(samples: Samples, config: DataConfig, batch_size: int, multiple: int) -> DataLoader:
    """Every sample once, in order; one at a time where pictures keep sizes of their own."""
    return DataLoader(
        EvalSet(samples, config, multiple),
        batch_size if samples.same_size else 1,
        num_workers=config.num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )

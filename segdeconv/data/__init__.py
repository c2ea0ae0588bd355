"""Data sets by name, and the loaders that training and evaluation read."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter, _MultiProcessingDataLoaderIter

from segdeconv.config import DataConfig, Size
from segdeconv.data.camvid import CamVid
from segdeconv.data.cityscapes import Cityscapes
from segdeconv.data.image_folder import ImageFolder
from segdeconv.data.image_mask import ImageMask
from segdeconv.data.imagenet import ImageNet
from segdeconv.data.samples import Samples
from segdeconv.data.torchvision_sets import TORCHVISION, TorchvisionSet
from segdeconv.data.toy import ToyStreet
from segdeconv.data.transforms import BatchTransform, EvalTransform, TrainTransform
from segdeconv.errors import UserError
from segdeconv.images import Picture, resize_image

DATASETS: dict[str, Callable[[DataConfig, str], Samples]] = {
    "toy": ToyStreet,
    "camvid": CamVid,
    "cityscapes": Cityscapes,
    "image_mask": ImageMask,
    "image_folder": ImageFolder,
    "imagenet": ImageNet,
    **dict.fromkeys(TORCHVISION, TorchvisionSet),
}

_CACHE_BYTES = 2 << 30  # decoded pictures kept in memory by a loader without worker processes


def evenly_spread(count: int, length: int) -> list[int]:
    """Indices of ``count`` of ``length`` things, or of all where there are fewer: neighbours look alike."""
    count = min(count, length)
    return [index * length // count for index in range(count)]


def find_samples(config: DataConfig, split: str) -> Samples:
    """The 'train' or 'val' split of the data a recipe names, without the files that its ``problems`` name.

    Raises:
        UserError: no data set of that name, a folder that is missing, or classes that make no sense.
    """
    if config.dataset not in DATASETS:
        raise UserError(
            f"data.dataset = {config.dataset!r}: no such data set; known are {', '.join(DATASETS)}"
        )
    samples = DATASETS[config.dataset](config, {"train": config.train, "val": config.val}[split])
    if config.classes is not None and samples.classes != config.classes:
        raise UserError(f"data.classes: {config.dataset} brings its own classes; remove the key")
    if len(samples.classes) < 2:
        raise UserError(
            f"data.classes: {''.join(samples.classes)} alone leaves nothing to tell apart; give two or more"
        )
    if config.palette is not None and samples.palette != config.palette:
        raise UserError(f"data.palette: {config.dataset} brings its own colours; remove the key")
    if len(samples.palette) != len(samples.classes):
        raise UserError(
            f"data.palette: {len(samples.palette)} colours for {len(samples.classes)} classes; give one each"
        )
    if samples.task == "segmentation":
        if config.shorter_side is not None:
            raise UserError(
                "data.shorter_side: central crops are for classifiers; give data.size, or nothing"
            )
        if len(samples.classes) > 256:
            raise UserError(f"data.classes: {len(samples.classes)} classes do not fit 8-bit masks")
        if config.ignore_index < len(samples.classes):
            raise UserError(
                f"data.ignore_index = {config.ignore_index} is the number of class "
                f"{samples.classes[config.ignore_index]!r}; take one above the classes, such as 255"
            )
    return samples


def open_samples(config: DataConfig, split: str) -> Samples:
    """The 'train' or 'val' split of the data a recipe names, with every file where it should be.

    Raises:
        UserError: as `find_samples`, or the first of the split's problems.
    """
    samples = find_samples(config, split)
    if samples.problems:
        more = len(samples.problems) - 1
        raise UserError(
            samples.problems[0] + (f"; {more} more: segdeconv data check lists them" if more else "")
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
    """Augmented samples; item ``epoch * len + index`` is sample ``index`` as seen in ``epoch``.

    Classifiers' pictures of one size are augmented a batch at a time, all others one by one.
    """

    def __init__(self, samples: Samples, config: DataConfig, seed: int, multiple: int) -> None:
        self.cached = _Cached(samples, enabled=config.num_workers == 0)
        self.count = len(samples)
        by_batch = samples.task == "classification" and samples.same_size and multiple == 1
        if by_batch and BatchTransform.can(config):
            self.transform: BatchTransform | TrainTransform = BatchTransform(config, seed, self.count)
        else:
            self.transform = TrainTransform(config, seed, multiple)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([item])[0]

    def __getitems__(self, items: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What a loader asks for: a batch of items."""
        keys = [divmod(item, self.count) for item in items]
        loaded = [self.cached.load(index) for _, index in keys]
        if isinstance(self.transform, BatchTransform):
            images = self.transform([image for image, _ in loaded], keys)
            return list(zip(images, torch.tensor([target for _, target in loaded]), strict=True))
        return [self.transform(*sample, key) for sample, key in zip(loaded, keys, strict=True)]


class EvalSet(Dataset[tuple[Tensor, Tensor]]):
    """Samples as they are, normalised.

    Args:
        resize: height and width for the pictures, not for targets.
        keep: decoded samples, for the next time they are asked for.
    """

    def __init__(
        self,
        samples: Samples,
        config: DataConfig,
        multiple: int,
        resize: Size | None = None,
        keep: bool = True,
    ) -> None:
        self.cached = _Cached(samples, enabled=keep and config.num_workers == 0)
        self.count, self.resize = len(samples), resize
        self.transform = EvalTransform(config, multiple)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.cached.load(index)
        return self.transform(resize_image(image, self.resize), target)


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


class Loader(DataLoader[Any]):
    """A loader whose processes ignore Ctrl-C and SIGTERM, which often reach every process of a run."""

    def __init__(self, dataset: Dataset[Any], **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=_leave_signals_to_the_run, **options)

    def _get_iterator(self) -> _BaseDataLoaderIter:
        return _Workers(self) if self.num_workers else super()._get_iterator()


class _Workers(_MultiProcessingDataLoaderIter):
    """The processes of a loader: all of them or, where they cannot be started, none.

    Raises:
        UserError: the system does not let them start.
    """

    def __init__(self, loader: Loader) -> None:
        # torch's destructor reads these, even after a constructor that failed early.
        self._shutdown, self._worker_pids_set, self._workers = True, False, []
        try:
            with _signals_blocked():
                super().__init__(loader)
        except BaseException as error:
            self._shutdown = not self._worker_pids_set  # torch cannot end them before it has noted them all
            self.close()
            if not isinstance(error, OSError):
                raise
            raise UserError(
                f"data.num_workers = {loader.num_workers}: these processes cannot be started "
                f"({error.strerror}); lower it, or make ulimit -n or /dev/shm larger"
            ) from None

    def close(self) -> None:
        """End the processes. They ignore SIGTERM, so one that stayed would hang Python's exit."""
        try:
            self._shutdown_workers()
        finally:
            for worker in self._workers:
                worker.kill()


_TO_ALL_OF_A_RUN = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals in this thread, and for good in the processes that it starts."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # its start unblocks them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL_OF_A_RUN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """In a worker process; those of a forkserver inherit no mask."""
    for number in _TO_ALL_OF_A_RUN:
        signal.signal(number, signal.SIG_IGN)


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
    return Loader(
        dataset,
        batch_sampler=EpochBatches(len(dataset), batch_size, seed, rank, world),
        num_workers=config.num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=config.num_workers > 0,
        generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from torch's global one
    )


def _collate(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch with images in the channels-last layout, the fastest for convolutions in every precision."""
    images, targets = default_collate(samples)
    return images.contiguous(memory_format=torch.channels_last), targets


def end_workers(batches: Any) -> None:
    """End the processes, if any, of a loader's iterator, or of a generator that ends them when it is closed.
    By themselves they would end when it is deleted, but a traceback may hold it.
    """
    if hasattr(batches, "close"):
        batches.close()


def eval_loader(
    samples: Samples,
    config: DataConfig,
    batch_size: int,
    multiple: int,
    rank: int = 0,
    world: int = 1,
    resize: Size | None = None,
    keep: bool = True,
) -> DataLoader:
    """Every sample once, in order; one at a time where pictures keep sizes of their own. Of several processes
    each gets its share. ``resize`` and ``keep`` are as `EvalSet` takes them.
    """
    one_size = samples.same_size or config.shorter_side is not None
    return Loader(
        Subset(EvalSet(samples, config, multiple, resize, keep), range(rank, len(samples), world)),
        batch_size=batch_size if one_size else 1,
        num_workers=config.num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
    )

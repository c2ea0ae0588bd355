from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from segdeconv import data
from segdeconv.config import DataConfig
from segdeconv.data import (
    EpochBatches,
    EvalSet,
    TrainSet,
    end_workers,
    eval_loader,
    open_samples,
    train_loader,
)
from segdeconv.data.samples import even_palette
from segdeconv.data.transforms import BatchTransform
from segdeconv.errors import UserError, shortage
from segdeconv.images import central_crop, list_images, read_rgb


def write(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def make_set(root: Path, count: int = 3, split: str = "train", size: tuple[int, int] = (20, 30)) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        write(root / split / "images" / f"{i}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        mask = rng.integers(0, 2, size, dtype=np.uint8)
        mask[0] = 255
        write(root / split / "masks" / f"{i}.png", mask)


def own(root: Path, **changes: object) -> DataConfig:
    return DataConfig("image_mask", **{"root": str(root), "classes": ("a", "b"), **changes})


def test_image_and_mask_folders(tmp_path: Path) -> None:
    make_set(tmp_path)
    samples = open_samples(own(tmp_path), "train")
    assert len(samples) == 3
    assert samples.classes == ("a", "b")
    image, mask = samples.load(1)
    assert image.shape == (20, 30, 3)
    assert set(np.unique(mask)) == {0, 1, 255}
    resized, small = open_samples(own(tmp_path, size=(10, 15)), "train").load(1)
    assert resized.shape == (10, 15, 3)
    assert small.shape == (10, 15)


def test_palette_masks_are_read_as_numbers(tmp_path: Path) -> None:
    make_set(tmp_path)
    path = tmp_path / "train" / "masks" / "0.png"
    mask = Image.open(path)
    numbers = np.asarray(mask)
    mask.putpalette([9] * 768)
    mask.save(path)
    assert Image.open(path).mode == "P"
    _, got = open_samples(own(tmp_path), "train").load(0)
    assert np.array_equal(got, numbers)


def test_masks_that_are_to_be_turned_are_refused(tmp_path: Path) -> None:
    """Pictures are turned as their EXIF data say; a mask that says so too would part from its picture."""
    make_set(tmp_path)
    path = tmp_path / "train" / "masks" / "0.png"
    for orientation in (1, 3):
        mask = Image.open(path)
        mask.load()
        exif = mask.getexif()
        exif[0x0112] = orientation
        mask.save(path, exif=exif)
        samples = open_samples(own(tmp_path), "train")
        if orientation == 1:
            samples.load(0)
            continue
        with pytest.raises(UserError, match=r"0\.png: has an EXIF orientation"):
            samples.load(0)


def test_camvid(camvid: Path) -> None:
    samples = open_samples(DataConfig("camvid", root=str(camvid)), "train")
    assert len(samples) == 367
    assert len(open_samples(DataConfig("camvid", root=str(camvid)), "val")) == 101
    assert len(samples.classes) == len(samples.palette) == 11
    image, mask = samples.load(0)
    assert image.shape == (360, 480, 3)
    assert set(np.unique(mask)) <= {*range(11), 255}
    assert (mask == 3).mean() > 0.05  # road


def test_camvid_takes_png_photographs(tmp_path: Path) -> None:
    """The public SegNet layout has PNG photographs; void (11) becomes the ignored label."""
    write(tmp_path / "train" / "a.png", np.zeros((4, 4, 3), np.uint8))
    write(tmp_path / "trainannot" / "a.png", np.full((4, 4), 11, np.uint8))
    _, mask = open_samples(DataConfig("camvid", root=str(tmp_path)), "train").load(0)
    assert (mask == 255).all()


def test_image_folder(tmp_path: Path) -> None:
    for name, count in (("cat", 2), ("dog", 1)):
        for i in range(count):
            write(tmp_path / "train" / name / f"{i}.jpg", np.full((8, 8, 3), 10 * i, np.uint8))
    samples = open_samples(DataConfig("image_folder", root=str(tmp_path)), "train")
    assert samples.task == "classification"
    assert samples.classes == ("cat", "dog")
    assert [samples.load(i)[1] for i in range(3)] == [0, 0, 1]
    turned = DataConfig("image_folder", root=str(tmp_path), classes=("dog", "cat"))
    assert [open_samples(turned, "train").load(i)[1] for i in range(3)] == [0, 1, 1]
    with pytest.raises(UserError, match="'bird'"):
        open_samples(DataConfig("image_folder", root=str(tmp_path), classes=("bird", "cat", "dog")), "train")


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    """Cameras store how they were held beside the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: the stored rows are columns
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15] = 255
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert read_rgb(tmp_path / "a.png").shape == (30, 20, 3)
    assert read_rgb(tmp_path / "a.png")[:15].min() == 255


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_pillows(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "a.png")))
    assert np.array_equal(read_rgb(tmp_path / "a.png"), want)


def test_damaged_exif_data_say_nothing(tmp_path: Path) -> None:
    """No TIFF header; and a good one, a quarter turn, beside a tag whose type is wrong."""
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "a.png", exif=b"Exif\0\0MM" + bytes(6))
    width = b"\1\0\0\2\0\0\0\3" + b"64\0\0"
    turn = b"\1\x12\0\3\0\0\0\1\0\6\0\0"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\2" + width + turn + bytes(4)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "b.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.png").shape == (4, 6, 3)
    assert read_rgb(tmp_path / "b.jpg").shape == (6, 4, 3)


def test_a_file_that_confuses_its_reader(tmp_path: Path) -> None:
    """A TIFF whose StripOffsets (273) are text: Pillow raises a TypeError of its own."""
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.tif")
    file = bytearray((tmp_path / "a.tif").read_bytes())
    field = file.index(struct.pack("<HHI", 273, 4, 1))
    file[field + 2] = 2
    (tmp_path / "a.tif").write_bytes(file)
    with pytest.raises(UserError, match=r"a.tif: a damaged picture \('str' object"):
        read_rgb(tmp_path / "a.tif")


def test_a_folder_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "b.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert list_images(tmp_path) == ([tmp_path / "a.png"], [])


def test_other_photographs(tmp_path: Path) -> None:
    """Grey, palette, transparent and CMYK pictures are RGB to the network."""
    grey = np.full((4, 4), 77, np.uint8)
    for mode, name in (("L", "l.png"), ("P", "p.png"), ("RGBA", "a.png"), ("CMYK", "c.tif"), ("1", "1.png")):
        Image.fromarray(grey).convert(mode).save(tmp_path / name)
        assert read_rgb(tmp_path / name).shape == (4, 4, 3)
    see_through = Image.fromarray(grey).convert("P")
    see_through.save(tmp_path / "t.png", transparency=bytes(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_rgb(tmp_path / "t.png"), np.full((4, 4, 3), 77))
    Image.fromarray(np.full((4, 4), 7000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep.png: has more than 8 bits"):
        read_rgb(tmp_path / "deep.png")


def four_bit_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    rows = (b"\0" + b"\x01" * ((width + 1) // 2)) * height
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def break_pair(root: Path, what: str) -> None:
    images, masks = root / "train" / "images", root / "train" / "masks"
    if what == "no mask":
        (masks / "1.png").unlink()
    elif what == "no picture":
        (images / "1.png").unlink()
    elif what == "wrong label":
        write(masks / "1.png", np.full_like(np.asarray(Image.open(masks / "1.png")), 7))
    elif what == "colour mask":
        write(masks / "1.png", np.zeros((20, 30, 3), np.uint8))
    elif what == "lossy mask":
        image = Image.open(masks / "1.png")
        (masks / "1.png").unlink()
        image.save(masks / "1.jpg")
    elif what == "four bits":
        # As PNG optimisers write small grey pictures; Pillow reads them back stretched to 0..255.
        (masks / "1.png").write_bytes(four_bit_png(30, 20))
    elif what == "size":
        write(masks / "1.png", np.zeros((20, 31), np.uint8))
    elif what == "truncated":
        data = (images / "1.png").read_bytes()
        (images / "1.png").write_bytes(data[: len(data) // 2])
    elif what == "PostScript":
        (images / "1.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    elif what == "not a picture":
        (images / "1.png").write_text("hello")
    elif what == "two of a name":
        write(images / "1.jpg", np.zeros((20, 30, 3), np.uint8))
    elif what == "empty":
        for path in images.iterdir():
            path.unlink()
    elif what == "no folder":
        masks.rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no mask", r"images/1.png: has no mask"),
        ("no picture", r"masks/1.png: has no picture of that name"),
        ("wrong label", r"masks/1.png: holds label 7, but the labels here are 0 to 1, 255"),
        ("colour mask", r"masks/1.png: a mask must be an 8-bit grey or palette picture .* not RGB"),
        ("lossy mask", r"masks/1.jpg: a mask must be lossless, not JPEG"),
        ("four bits", r"masks/1.png: a mask must be an 8-bit .* not L;4"),
        ("size", r"masks/1.png: is 31x20, but its picture is 30x20"),
        ("truncated", r"images/1.png: a damaged picture"),
        ("PostScript", r"images/1.png: not a readable picture"),
        ("not a picture", r"images/1.png: not a readable picture"),
        ("two of a name", r"there is a second picture of that name"),
        ("empty", r"images: holds no picture"),
        ("no folder", r"masks: no such folder"),
    ],
)
def test_broken_sets_are_named(tmp_path: Path, what: str, says: str) -> None:
    make_set(tmp_path)
    break_pair(tmp_path, what)

    def read_all() -> None:
        samples = open_samples(own(tmp_path), "train")
        for i in range(len(samples)):
            samples.load(i)

    with pytest.raises(UserError, match=says) as caught:
        read_all()
    assert "\n" not in str(caught.value)


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Neither of damaged pictures nor of such with several frames, which Pillow keeps open."""
    make_set(tmp_path)
    break_pair(tmp_path, "lossy mask")
    frames = [Image.fromarray(np.zeros((20, 30, 3), np.uint8))] * 2
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    (tmp_path / "b.png").write_bytes((tmp_path / "train/images/0.png").read_bytes()[:-30])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ResourceWarning)
        samples = open_samples(own(tmp_path), "train")
        for read in (lambda: samples.load(1), lambda: read_rgb(tmp_path / "b.png")):
            with pytest.raises(UserError, match=r"1.jpg: a mask must be lossless|b.png: a damaged picture"):
                read()
        assert read_rgb(tmp_path / "a.tif").shape == (20, 30, 3)
        gc.collect()
    assert not said


def test_unknown_set_and_missing_keys(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known are toy, camvid"):
        open_samples(DataConfig("imagnet"), "train")
    with pytest.raises(UserError, match=r"data.root '~nobody\$/x': there is no such home folder; write"):
        open_samples(DataConfig("camvid", root="~nobody$/x"), "val")
    with pytest.raises(UserError, match=r"data.root is missing"):
        open_samples(DataConfig("camvid"), "train")
    with pytest.raises(UserError, match=r"data.classes is missing"):
        open_samples(DataConfig("image_mask", root=str(tmp_path)), "train")
    with pytest.raises(UserError, match="toy brings its own classes"):
        open_samples(DataConfig("toy", classes=("a",)), "train")
    make_set(tmp_path)
    with pytest.raises(UserError, match=r"data.classes: thing alone leaves nothing to tell apart"):
        open_samples(own(tmp_path, classes=("thing",)), "train")
    with pytest.raises(UserError, match="toy brings its own colours"):
        open_samples(DataConfig("toy", palette=((1, 2, 3),)), "train")
    with pytest.raises(UserError, match=r"data.ignore_index = 7 is the number of class 'car'"):
        open_samples(DataConfig("toy", ignore_index=7), "train")


def augmented(root: Path, **changes: object) -> DataConfig:
    return own(root, crop=(16, 16), scale=(0.5, 2.0), color=0.4, **changes)


def test_a_training_sample_depends_on_seed_epoch_and_index_only(tmp_path: Path) -> None:
    make_set(tmp_path)
    config = augmented(tmp_path)
    samples = open_samples(config, "train")
    one, other = (TrainSet(samples, config, seed=1, multiple=1) for _ in range(2))
    _ = other[2], other[0]  # a different history
    assert torch.equal(one[4][0], other[4][0])
    assert torch.equal(one[4][1], other[4][1])
    assert not torch.equal(one[4][0], one[1][0])  # the same picture in the next epoch
    assert not torch.equal(one[4][0], TrainSet(samples, config, seed=2, multiple=1)[4][0])


def test_worker_processes_change_nothing(tmp_path: Path) -> None:
    make_set(tmp_path, count=6)
    batches = []
    for workers in (0, 2):
        config = augmented(tmp_path, num_workers=workers)
        loader = train_loader(open_samples(config, "train"), config, 3, seed=5, multiple=1)
        loader.batch_sampler.epoch = 3
        batches.append(list(loader))
    for (images, masks), (same_images, same_masks) in zip(*batches, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(masks, same_masks)


def test_epochs_have_their_own_order(tmp_path: Path) -> None:
    make_set(tmp_path, count=12)
    config = augmented(tmp_path)
    loader = train_loader(open_samples(config, "train"), config, 4, seed=0, multiple=1)
    orders = []
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        items = [item for batch in loader.batch_sampler for item in batch]
        assert sorted(i % 12 for i in items) == list(range(12))
        assert {i // 12 for i in items} == {epoch}
        orders.append([i % 12 for i in items])
    assert orders[0] != orders[1]


def test_ranks_share_out_the_batches_of_one_process() -> None:
    whole = EpochBatches(23, 5, seed=3, rank=0, world=1)
    shares = [EpochBatches(23, 5, seed=3, rank=rank, world=2) for rank in range(2)]
    for sampler in (whole, *shares):
        sampler.epoch = 2
    batches = list(whole)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5]
    for batch, *parts in zip(batches, *shares, strict=True):
        assert sorted(batch) == sorted(item for part in parts for item in part)
        assert [len(part) for part in parts] == [3, 2]
    whole.start = 3
    assert len(whole) == 1
    assert list(whole) == batches[3:]


def test_picture_and_mask_move_together(tmp_path: Path) -> None:
    """Scaled, cropped and mirrored pictures still lie under their masks; padding is mean colour, ignored."""
    image = np.zeros((40, 40, 3), np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    image[10:30, 5:25] = 255
    mask[10:30, 5:25] = 1
    write(tmp_path / "train" / "images" / "a.png", image)
    write(tmp_path / "train" / "masks" / "a.png", mask)
    config = own(tmp_path, crop=(48, 48), scale=(0.5, 1.5), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    mirrored = set()
    for epoch in range(8):
        got, labels = dataset[epoch]
        assert got.shape == (3, 48, 48)
        inside = labels != 255
        agree = ((got[0] > 0) == (labels == 1))[inside]
        assert agree.float().mean() > 0.9  # bilinear against nearest differ at edges
        assert (got[0][~inside].abs() < 0.02).all()
        mirrored.add(
            bool((labels == 1).nonzero()[:, 1].float().mean() > (labels == 0).nonzero()[:, 1].float().mean())
        )
    assert len(mirrored) == 2


def test_evaluation_pads_right_and_below(tmp_path: Path) -> None:
    make_set(tmp_path)
    config = own(tmp_path)
    image, mask = EvalSet(open_samples(config, "train"), config, multiple=16)[0]
    assert image.shape == (3, 32, 32)
    assert (mask[20:] == 255).all()
    assert (mask[:, 30:] == 255).all()
    assert (image[:, 20:] == 0).all()
    raw, _ = open_samples(config, "train").load(0)
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    expected = (torch.from_numpy(raw.copy()).float() / 255 - mean) / std
    torch.testing.assert_close(image[:, :20, :30].permute(1, 2, 0), expected, rtol=0, atol=1e-5)


def small(root: Path, count: int = 5, size: tuple[int, int] = (6, 7), **changes: object) -> DataConfig:
    """An image folder of small pictures of one size, which are augmented by the batch."""
    rng = np.random.default_rng(0)
    for i in range(count):
        write(root / "train" / f"c{i % 2}" / f"{i}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    return DataConfig("image_folder", root=str(root), size=size, **changes)


def normalised(picture: np.ndarray, config: DataConfig) -> torch.Tensor:
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return ((torch.from_numpy(picture.copy()).double() / 255 - mean) / std).permute(2, 0, 1).float()


def test_batches_of_small_pictures_are_crops_of_padded_ones(tmp_path: Path) -> None:
    """Every sample is one of the windows, mirrored or not; over epochs all of them occur."""
    config = small(tmp_path, pad=1, crop=(6, 6))
    samples = open_samples(config, "train")
    dataset = TrainSet(samples, config, seed=0, multiple=1)
    assert isinstance(dataset.transform, BatchTransform)
    fill = np.round(255 * np.array(config.mean)).astype(np.uint8)
    windows = {}
    for index in range(5):
        padded = np.tile(fill, (8, 9, 1))
        padded[1:7, 1:8] = samples.load(index)[0]
        for top in range(3):
            for left in range(4):
                window = normalised(padded[top : top + 6, left : left + 6], config)
                windows[index, top, left, False], windows[index, top, left, True] = window, window.flip(-1)
    seen = set()
    for epoch in range(40):
        for index in range(5):
            image, target = dataset[epoch * 5 + index]
            assert target == samples.load(index)[1]
            fits = [key for key, w in windows.items() if torch.allclose(image, w, rtol=0, atol=1e-6)]
            assert [key[0] for key in fits] == [index]
            seen.add(fits[0][1:])
    assert len(seen) == 3 * 4 * 2


def test_a_batch_is_its_samples(tmp_path: Path) -> None:
    config = small(tmp_path, pad=2, crop=(6, 7))
    samples = open_samples(config, "train")
    one, other = (TrainSet(samples, config, seed=3, multiple=1) for _ in range(2))
    items = [11, 3, 14, 7]
    for item, (image, target) in zip(items, one.__getitems__(items), strict=True):
        assert torch.equal(image, other[item][0])
        assert torch.equal(target, other[item][1])
    assert not torch.equal(one[11][0], one[6][0])  # the same picture in another epoch
    assert not torch.equal(one[11][0], TrainSet(samples, config, seed=4, multiple=1)[11][0])
    (batch, targets), *_ = train_loader(samples, config, 4, seed=3, multiple=1)
    assert batch.shape == (4, 3, 6, 7)
    assert targets.dtype == torch.int64


def test_batches_are_padded_to_the_crop_and_untouched_without_one(tmp_path: Path) -> None:
    config = small(tmp_path, crop=(9, 12), hflip=False)
    image, _ = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)[0]
    assert image.shape == (3, 9, 12)
    plain = small(tmp_path, hflip=False)
    samples = open_samples(plain, "train")
    image, _ = TrainSet(samples, plain, seed=0, multiple=1)[1]
    torch.testing.assert_close(image, normalised(samples.load(1)[0], plain), rtol=0, atol=1e-6)


def test_resized_crops(tmp_path: Path) -> None:
    """Inception's crops: of one size, and still lying under their masks."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    write(tmp_path / "train" / "images" / "a.png", image)
    write(tmp_path / "train" / "masks" / "a.png", (image[..., 0] > 0).astype(np.uint8))
    config = own(tmp_path, crop=(24, 32), resized_crop=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    shares = []
    for epoch in range(12):
        got, labels = dataset[epoch]
        assert got.shape == (3, 24, 32)
        assert ((got[0] > 0) == (labels == 1)).float().mean() > 0.95
        shares.append(labels.float().mean().item())
    assert len({round(share, 3) for share in shares}) > 6


@pytest.mark.parametrize("size", [(40, 50), (51, 33), (30, 30), (20, 100)])
def test_central_crops_are_torchvisions(tmp_path: Path, size: tuple[int, int]) -> None:
    """Evaluation of classifiers: Resize(36), CenterCrop((32, 28)) as torchvision does them."""
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    steps = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(36), torchvision.transforms.CenterCrop((32, 28))]
    )
    assert np.array_equal(central_crop(picture, 36, (32, 28)), np.asarray(steps(Image.fromarray(picture))))
    for i in range(2):
        write(tmp_path / "train" / "a" / f"{i}.png", picture[i:])  # of different sizes, yet one batch
        write(tmp_path / "train" / "b" / f"{i}.png", picture)
    config = DataConfig("image_folder", root=str(tmp_path), crop=(32, 28), shorter_side=36, hflip=False)
    (batch, _), *_ = eval_loader(open_samples(config, "train"), config, 2, 1)
    want = normalised(np.asarray(steps(Image.fromarray(picture))), config)
    assert batch.shape == (2, 3, 32, 28)
    torch.testing.assert_close(batch[0], want, rtol=0, atol=1e-6)


def test_central_crops_are_for_classifiers(tmp_path: Path) -> None:
    make_set(tmp_path)
    with pytest.raises(UserError, match=r"data.shorter_side: central crops are for classifiers"):
        open_samples(own(tmp_path, crop=(16, 16), shorter_side=16), "train")


def test_loaders_refuse_what_makes_no_batch(tmp_path: Path) -> None:
    make_set(tmp_path)
    samples = open_samples(own(tmp_path), "train")
    with pytest.raises(UserError, match="only 3 pictures"):
        train_loader(samples, own(tmp_path), 4, 0, 1)
    with pytest.raises(UserError, match=r"give data.crop or data.size"):
        train_loader(samples, own(tmp_path), 2, 0, 1)
    assert eval_loader(samples, own(tmp_path), 2, 1).batch_size == 1
    sized = own(tmp_path, size=(8, 8))
    assert len(list(eval_loader(open_samples(sized, "train"), sized, 2, 1))) == 2


@pytest.mark.parametrize("count", [1, 12, 13, 150])
def test_an_even_palette_has_no_colour_twice(count: int) -> None:
    colors = even_palette(count)
    assert len(set(colors)) == count
    assert all(0 <= channel <= 255 for color in colors for channel in color)


@pytest.mark.parametrize(("count", "world"), [(7, 2), (8, 4), (10, 4), (3, 4), (1, 2)])
def test_shares_of_an_evaluation_are_all_pictures_once(count: int, world: int) -> None:
    config = DataConfig("toy", size=(32, 64), count=(count, 1))
    samples = open_samples(config, "train")
    loaders = [eval_loader(samples, config, 2, 1, rank, world) for rank in range(world)]
    shares = [list(loader.dataset.indices) for loader in loaders]
    assert sorted(index for share in shares for index in share) == list(range(count))
    for loader, share in zip(loaders, shares, strict=True):
        pictures = [image for images, _ in loader for image in images]
        assert len(pictures) == len(share)
        for image, index in zip(pictures, share, strict=True):
            assert torch.equal(image, EvalSet(samples, config, 1)[index][0])


@pytest.mark.parametrize(
    "changes", [{"scale": (0.5, 1.5)}, {"resized_crop": True}, {"size": (29, 37)}], ids=str
)
def test_resized_masks_hold_no_label_between_two(tmp_path: Path, changes: dict) -> None:
    """Between labels 0 and 2 there is no 1, and between 0 and 255 there is nothing."""
    mask = np.zeros((40, 48), np.uint8)
    mask[:, 20:], mask[30:] = 2, 255
    write(tmp_path / "train" / "images" / "a.png", np.zeros((40, 48, 3), np.uint8))
    write(tmp_path / "train" / "masks" / "a.png", mask)
    config = own(tmp_path, classes=("a", "b", "c"), crop=(24, 32), **changes)
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    labels = torch.stack([dataset[epoch][1] for epoch in range(12)])
    assert labels.unique().tolist() == [0, 2, 255]


def test_colours_are_jittered_as_strongly_as_asked(tmp_path: Path) -> None:
    write(tmp_path / "train" / "images" / "a.png", np.full((8, 8, 3), 128, np.uint8))
    write(tmp_path / "train" / "masks" / "a.png", np.zeros((8, 8), np.uint8))
    config = own(tmp_path, color=0.4, mean=(0, 0, 0), std=(1, 1, 1))
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    levels = [dataset[epoch][0].mean().item() * 255 / 128 for epoch in range(40)]
    assert 0.59 < min(levels) < 0.7
    assert 1.3 < max(levels) < 1.41


def test_padding_before_the_crop_moves_it(tmp_path: Path) -> None:
    make_set(tmp_path)  # 20x30, its first row ignored
    config = own(tmp_path, pad=4, crop=(20, 30))
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    ignored = [int((dataset[3 * epoch][1] == 255).sum()) for epoch in range(12)]
    assert max(ignored) > 100
    assert max(ignored) <= 30 * 20 - 15 * 26


def test_orders_and_changes_are_of_the_seed_and_the_picture(tmp_path: Path) -> None:
    first, second = (list(EpochBatches(20, 5, seed, rank=0, world=1)) for seed in (1, 2))
    assert first != second
    make_set(tmp_path, count=2)
    for folder, suffix in (("images", "png"), ("masks", "png")):
        (tmp_path / "train" / folder / f"1.{suffix}").write_bytes(
            (tmp_path / "train" / folder / f"0.{suffix}").read_bytes()
        )
    config = own(tmp_path, crop=(16, 16), scale=(0.5, 2.0))
    dataset = TrainSet(open_samples(config, "train"), config, seed=1, multiple=1)
    assert not torch.equal(dataset[0][0], dataset[1][0])


def test_pictures_are_kept_while_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path)
    monkeypatch.setattr(data, "_CACHE_BYTES", 20 * 30 * 4 * 2)
    for workers, kept in ((0, 2), (2, 0)):
        config = own(tmp_path, num_workers=workers)
        pictures = EvalSet(open_samples(config, "train"), config, 1)
        _ = [pictures[index] for index in range(3)]
        assert len(pictures.cached.kept) == kept


def test_cameras_write_capitals_and_macs_hidden_files(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "DSC_1.JPG")
    (tmp_path / "._DSC_1.JPG").write_bytes(b"a Mac's notes")
    assert list_images(tmp_path) == ([tmp_path / "DSC_1.JPG"], [])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to ignore")
@pytest.mark.parametrize("split", ["train", "val"])
def test_loader_processes_outlive_what_signals_the_whole_run(split: str, tmp_path: Path) -> None:
    """Of six batches one is taken and two are made already; the others need the process."""
    make_set(tmp_path, count=6)
    config = own(tmp_path, size=(8, 8), num_workers=1)
    samples = open_samples(config, "train")
    loader = (
        train_loader(samples, config, 1, 0, 1) if split == "train" else eval_loader(samples, config, 1, 1)
    )
    batches = iter(loader)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(batches._workers[0].pid, number)
    assert len(list(batches)) == 5
    end_workers(batches)


def signalled_at_once(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    data._leave_signals_to_the_run(worker)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no mask of signals")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_loader_processes_outlive_signals_from_their_first_moment_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the process that starts them gets its own once they run."""
    make_set(tmp_path)
    config = own(tmp_path, size=(8, 8), num_workers=1)
    reset, came = data._Workers._reset, []

    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        reset(*arguments, **options)

    monkeypatch.setattr(data._Workers, "_reset", signalled)
    loader = eval_loader(open_samples(config, "train"), config, 1, 1)
    loader.worker_init_fn = signalled_at_once
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    usual = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        batches = iter(loader)
        assert came
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())
        assert len(list(batches)) == len(loader)
    finally:
        multiprocessing.set_start_method(usual, force=True)
        signal.signal(signal.SIGTERM, before)
    end_workers(batches)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("started", [0, 1, 2])
def test_loader_processes_that_cannot_be_started_leave_none(
    started: int, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor an error in the destructor of torch's iterator."""
    make_set(tmp_path)
    config = own(tmp_path, size=(8, 8), num_workers=2)
    samples = open_samples(config, "train")
    loader = (
        train_loader(samples, config, 1, 0, 1) if split == "train" else eval_loader(samples, config, 1, 1)
    )
    left, start, reset = [], multiprocessing.Process.start, data._Workers._reset

    def limited(process: multiprocessing.Process) -> None:
        if len(multiprocessing.active_children()) == started:
            raise OSError(24, "Too many open files")
        start(process)

    def last(*arguments: Any, **options: Any) -> None:
        reset(*arguments, **options)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("sys.unraisablehook", left.append)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", limited)
    monkeypatch.setattr(data._Workers, "_reset", last)
    with pytest.raises(UserError, match=r"data.num_workers = 2: .* cannot be started \(Too many"):
        iter(loader)
    for process in multiprocessing.active_children():
        process.join(5)
    assert not multiprocessing.active_children()
    gc.collect()
    assert not left


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_loader_process_is_known_for_what_it_is(tmp_path: Path) -> None:
    make_set(tmp_path, count=9)
    config = own(tmp_path, size=(8, 8), num_workers=2)
    batches = iter(eval_loader(open_samples(config, "train"), config, 1, 1))
    with pytest.raises(RuntimeError) as raised:  # noqa: PT012 - from wherever the program is
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        list(batches)
    end_workers(batches)
    assert "DataLoader worker" in str(shortage(raised.value))
    assert not multiprocessing.active_children()


def test_scales_and_windows_are_as_wide_as_asked(tmp_path: Path) -> None:
    """Channels say where a pixel was: a resized crop takes 8 to 100 % of the area; scales are in range."""
    rows, columns = np.indices((60, 80), np.uint8)
    write(tmp_path / "train" / "images" / "a.png", np.stack([rows, columns, rows], -1))
    write(tmp_path / "train" / "masks" / "a.png", np.zeros((60, 80), np.uint8))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1), "hflip": False}
    config = own(tmp_path, crop=(24, 32), resized_crop=True, **plain)
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    corners = [dataset[epoch][0][:2, [0, -1], [0, -1]] * 255 for epoch in range(60)]
    areas = [((c[:, 1] - c[:, 0]).clamp(min=0).prod() / (60 * 80)).item() for c in corners]
    assert min(areas) < 0.15
    assert max(areas) > 0.75

    config = own(tmp_path, crop=(120, 160), scale=(0.5, 2.0), **plain)
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    factors = [((dataset[epoch][1] != 255).float().sum() / (60 * 80)).sqrt().item() for epoch in range(60)]
    assert 0.49 < min(factors) < 0.6
    assert 1.85 < max(factors) < 2.01


def test_mirroring_can_be_switched_off(tmp_path: Path) -> None:
    make_set(tmp_path, count=1)
    config = own(tmp_path, hflip=False)
    dataset = TrainSet(open_samples(config, "train"), config, seed=0, multiple=1)
    assert all(torch.equal(dataset[epoch][0], dataset[0][0]) for epoch in range(8))

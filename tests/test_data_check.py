"""`segdeconv data check`: every problem at once, and the numbers it suggests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import Call
from PIL import Image
from test_cityscapes import ALL_IDS, add_frame
from test_data import break_pair, make_set, own, write

from segdeconv.config import DataConfig
from segdeconv.data import open_samples
from segdeconv.data.check import as_keys, check, table


def two_splits(root: Path, count: int = 8) -> None:
    make_set(root, count)
    make_set(root, 2, split="val")


def test_all_problems_at_once(tmp_path: Path) -> None:
    two_splits(tmp_path)
    images, masks = tmp_path / "train" / "images", tmp_path / "train" / "masks"
    (masks / "0.png").unlink()
    break_pair(tmp_path, "wrong label")  # of 1
    write(masks / "2.png", np.zeros((20, 31), np.uint8))
    (images / "3.png").write_bytes((images / "3.png").read_bytes()[:200])
    write(images / "4.jpg", np.zeros((20, 30, 3), np.uint8))
    (images / "5.png").unlink()
    (tmp_path / "val" / "images" / "1.png").write_text("no picture")
    report = check(own(tmp_path))
    says = [
        "4.png: there is a second picture of that name, 4.jpg",
        "images/0.png: has no mask of that name",
        "masks/5.png: has no picture of that name",
        "masks/1.png: holds label 7",
        "masks/2.png: is 31x20, but its picture is 30x20",
        "train/images/3.png: a damaged picture",
        "val/images/1.png: not a readable picture",
    ]
    assert len(report.problems) == len(says)
    for sentence, expected in zip(report.problems, says, strict=True):
        assert expected in sentence
    assert [split.pictures for split in report.splits] == [3, 1]


def test_numbers_are_those_of_the_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            write(tmp_path / split / "images" / f"{i}.png", rng.integers(0, 256, (9, 10, 3), dtype=np.uint8))
            mask = np.zeros((9, 10), np.uint8)
            mask[0] = 255
            mask[1 : 2 + i] = 1 if i else 0
            write(tmp_path / split / "masks" / f"{i}.png", mask)
    report = check(own(tmp_path, classes=("a", "b", "c")))
    assert report.problems == ()
    train, val = report.splits
    assert train.labels.tolist() == [190, 50, 0]  # of 240 labelled pixels
    assert train.holding.tolist() == [3, 2, 0]
    assert (val.pictures, val.labels.tolist()) == (1, [80, 0, 0])
    frequency = np.array([190 / 240, 50 / 160])
    np.testing.assert_allclose(report.class_weights, [*np.median(frequency) / frequency, 0], rtol=1e-15)
    samples = open_samples(own(tmp_path, classes=("a", "b", "c")), "train")
    pixels = np.concatenate([samples.load(i)[0].reshape(-1, 3) for i in range(3)]) / 255
    np.testing.assert_allclose(report.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(report.std, pixels.std(0), rtol=1e-12)


def test_what_looks_wrong_is_told(tmp_path: Path) -> None:
    """Pictures in both splits, turned by EXIF data, or in folders below."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (9, 10, 3), dtype=np.uint8) for _ in range(3)]
    for split, chosen in (("train", images[:2]), ("val", images[1:])):
        for number, image in enumerate(chosen):
            write(tmp_path / split / "images" / f"{split}{number}.png", image)
            write(tmp_path / split / "masks" / f"{split}{number}.png", np.zeros((9, 10), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(images[0]).save(tmp_path / "train" / "images" / "train0.png", exif=exif)
    write(tmp_path / "val" / "masks" / "below" / "more.png", np.zeros((9, 10), np.uint8))
    report = check(own(tmp_path, classes=("a", "b")))
    assert report.problems == ()
    turned, below, both = report.warnings
    assert turned.startswith("train: 1 of 2 pictures are turned upright by their EXIF data, train0 first")
    assert below.startswith(f"{tmp_path / 'val' / 'masks' / 'below'}: holds pictures, which are not read")
    assert both == "1 pictures of val are in train too, val0 first"


def test_a_channel_of_one_level_has_no_deviation(tmp_path: Path) -> None:
    image = np.stack([np.full((9, 10), 0), np.full((9, 10), 200), np.arange(90).reshape(9, 10)], 2)
    for split in ("train", "val"):
        write(tmp_path / split / "images" / "a.png", image.astype(np.uint8))
        write(tmp_path / split / "masks" / "a.png", np.zeros((9, 10), np.uint8))
    report = check(own(tmp_path, classes=("a", "b")))
    assert report.std[0] == 0
    assert report.std[1] == pytest.approx(0, abs=1e-7)
    assert "data.std" not in as_keys(report)


def test_worker_processes_find_the_same(tmp_path: Path) -> None:
    two_splits(tmp_path)
    break_pair(tmp_path, "wrong label")
    alone, shared = check(own(tmp_path)), check(own(tmp_path, num_workers=2))
    assert alone.problems == shared.problems
    assert alone.class_weights == shared.class_weights
    assert (alone.mean, alone.std) == (shared.mean, shared.std)


def test_data_without_a_label(tmp_path: Path) -> None:
    two_splits(tmp_path)
    for i in range(2):
        write(tmp_path / "val" / "masks" / f"{i}.png", np.full((20, 30), 255, np.uint8))
    report = check(own(tmp_path))
    assert report.problems == ("val: no pixel of any mask is labelled, all are 255, ignored",)
    for split in ("train", "val"):
        for path in (tmp_path / split / "images").iterdir():
            path.write_text("no picture")
    assert as_keys(check(own(tmp_path))) == ""


def test_binary_masks_are_suspected(tmp_path: Path) -> None:
    two_splits(tmp_path, 3)
    assert all(split.warnings == () for split in check(own(tmp_path)).splits)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:] = 255
    for i in (0, 2):
        write(tmp_path / "train" / "masks" / f"{i}.png", mask)
    train, val = check(own(tmp_path)).splits
    assert len(train.warnings) == 1
    assert "train: 2 of 3 masks hold 0 and 255 only, 0 first" in train.warnings[0]
    assert "'b'" in train.warnings[0]
    assert val.warnings == ()


def test_classifiers(tmp_path: Path) -> None:
    for split, name, count in (
        ("train", "cat", 3),
        ("train", "dog", 1),
        ("val", "cat", 1),
        ("val", "cow", 1),
    ):
        for i in range(count):
            write(tmp_path / split / name / f"{i}.png", np.full((4, 4, 3), 255 * (i == 1), np.uint8))
    report = check(DataConfig("image_folder", root=str(tmp_path)))
    assert report.problems == ("train and val have different classes: cow, dog in one only",)
    assert report.splits[0].labels.tolist() == [3, 1]
    np.testing.assert_allclose(report.class_weights, [0.5 / 0.75, 0.5 / 0.25], rtol=1e-15)
    assert list(zip(*(column.cells for column in table(report).columns), strict=True)) == [
        ("cat", "0.7500", "3", "0.5000", "1", "0.667"),
        ("dog", "0.2500", "1", "0.0000", "0", "2"),
        ("cow", "0.0000", "0", "0.5000", "1", "absent"),
    ]
    np.testing.assert_allclose(report.mean, [0.25] * 3, rtol=1e-15)


def test_one_name_twice(tmp_path: Path) -> None:
    add_frame(tmp_path, "train", "ulm", 0, ALL_IDS)
    add_frame(tmp_path, "train_extra", "ulm", 0, ALL_IDS)
    config = DataConfig("cityscapes", root=str(tmp_path), train="train+train_extra", val="train")
    assert check(config).problems == (
        "train+train_extra: 2 pictures are called ulm_000000_000019_leftImg8bit",
    )


def test_the_command(tmp_path: Path, call: Call) -> None:
    recipe = {"model": {"architecture": "unet"}, "data": {"dataset": "image_mask", "root": str(tmp_path)}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    command = ("data", "check", tmp_path / "r.yaml", "--set", "data.classes=[a, b]")
    two_splits(tmp_path, 3)
    code, out, _ = call(*command)
    assert code == 0
    assert "3 pictures of train and 2 pictures of val: nothing is wrong" in out
    assert "train.class_weights: [" in out

    two_splits(tmp_path, 60)
    for path in (tmp_path / "train" / "masks").iterdir():
        path.write_text("no picture")
    (tmp_path / "val" / "masks" / "0.png").unlink()
    code, out, error = call(*command)
    assert (code, out.count("wrong: "), error.count("\n")) == (2, 61, 1)
    assert "r.yaml: 61 things are wrong with the data" in error


def test_class_weights_are_of_the_median_frequency(tmp_path: Path) -> None:
    from segdeconv.data.check import check

    labels = np.repeat(np.arange(3, dtype=np.uint8), (60, 30, 10)).reshape(10, 10)
    for split in ("train", "val"):
        write(tmp_path / split / "images" / "a.png", np.zeros((10, 10, 3), np.uint8))
        write(tmp_path / split / "masks" / "a.png", labels)
    report = check(own(tmp_path, classes=("a", "b", "c")))
    assert report.class_weights == pytest.approx((0.3 / 0.6, 1, 0.3 / 0.1))

"""ImageNet's layouts, and torchvision's small sets from files on the disk."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torchvision
from conftest import SHARED_DATA
from scipy.io import savemat
from test_data import write

from segdeconv.config import DataConfig
from segdeconv.data import find_samples, open_samples, torchvision_sets
from segdeconv.errors import UserError

WNIDS = ("n03", "n01", "n02")  # in the devkit's order, which is not the sorted one
TRUTH = (3, 1, 1, 2)  # the devkit's numbers of four pictures: n02, n03, n03, n01


def add_flat_split(root: Path, count: int = 4) -> None:
    for i in range(1, count + 1):
        write(root / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", np.full((5, 7, 3), 40 * i, np.uint8))


def add_kaggle(root: Path) -> None:
    rows = [f"ILSVRC2012_val_{i:08d},{WNIDS[n - 1]} 1 2 3 4 " for i, n in enumerate(TRUTH, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))


def add_devkit(root: Path) -> None:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(map(str, TRUTH)) + "\n")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array(
        [(i, w, "a, b", 0) for i, w in enumerate(WNIDS, 1)] + [(4, "n00", "all", 3)], dtype=kind
    )
    savemat(folder / "meta.mat", {"synsets": synsets.reshape(-1, 1)})


def imagenet(root: Path) -> DataConfig:
    return DataConfig("imagenet", root=str(root))


@pytest.mark.parametrize("add", [add_kaggle, add_devkit])
def test_flat_imagenet(tmp_path: Path, add: object) -> None:
    add_flat_split(tmp_path)
    add(tmp_path)
    samples = open_samples(imagenet(tmp_path), "val")
    assert samples.classes == ("n01", "n02", "n03")
    assert [samples.classes[samples.load(i)[1]] for i in range(4)] == ["n02", "n03", "n03", "n01"]
    assert [int(samples.load(i)[0].mean().round()) for i in range(4)] == [40, 80, 120, 160]


def test_imagenet_in_class_folders(tmp_path: Path) -> None:
    for wnid in WNIDS:
        write(tmp_path / "train" / wnid / "a.JPEG", np.zeros((4, 4, 3), np.uint8))
    samples = open_samples(DataConfig("imagenet", root=str(tmp_path)), "train")
    assert samples.classes == ("n01", "n02", "n03")
    assert [samples.name(i) for i in range(3)] == ["n01/a", "n02/a", "n03/a"]


def test_what_is_wrong_with_a_flat_folder(tmp_path: Path) -> None:
    add_flat_split(tmp_path, 5)
    with pytest.raises(UserError, match=r"need LOC_val_solution.csv or ILSVRC2012_devkit_t12/data here"):
        open_samples(imagenet(tmp_path), "val")
    add_kaggle(tmp_path)
    (tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    problems = find_samples(imagenet(tmp_path), "val").problems
    assert len(problems) == 2
    assert "00000005.JPEG: is not listed in" in problems[0]
    assert "lists ILSVRC2012_val_00000002, but" in problems[1]
    (tmp_path / "LOC_val_solution.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"LOC_val_solution.csv: not as ImageNet has it"):
        open_samples(imagenet(tmp_path), "val")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_grey_sets_become_rgb(tmp_path: Path, name: str, folder: str) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = {
        part: rng.integers(0, 256, (n, 28, 28), dtype=np.uint8) for part, n in (("train", 3), ("t10k", 2))
    }
    for part, pictures in images.items():
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(pictures))
        labels = np.arange(len(pictures), dtype=np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
        for kind, array in (("images-idx3", pictures), ("labels-idx1", labels)):
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    for split, part in (("train", "train"), ("val", "t10k")):
        samples = open_samples(DataConfig(name, root=str(tmp_path)), split)
        assert len(samples) == len(images[part])
        assert len(samples.classes) == 10
        image, label = samples.load(1)
        assert label == 1
        assert image.dtype == np.uint8
        assert np.array_equal(image, np.stack([images[part][1]] * 3, axis=-1))
    resized = open_samples(DataConfig(name, root=str(tmp_path), size=(32, 32)), "train")
    assert resized.load(0)[0].shape == (32, 32, 3)


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(np.zeros((4, 5, 5), np.uint8))[:50], b"", r"train-images-idx3-ubyte: is damaged .* delete it"),
        (b"PK\3\4", b"", r"train-images-idx3-ubyte: is damaged .* delete it"),
        (None, b"", r"train-labels-idx1-ubyte: is damaged .* delete it"),
        (None, idx(np.zeros(2, np.uint8)), r"mnist has 2 labels for 4 pictures .* delete its files"),
        (None, idx(np.array([1, 2, 3, 255], np.uint8)), r"the label 255 .* 10 classes; delete its files"),
    ],
    ids=["cut", "of another kind", "empty", "fewer labels", "label 255"],
)
def test_damaged_files_of_mnist(
    tmp_path: Path, images: bytes | None, labels: bytes, message: str, download: bool
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images or idx(np.zeros((4, 5, 5), np.uint8)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    with pytest.raises(UserError, match=message):
        open_samples(DataConfig("mnist", root=str(tmp_path), download=download), "train")


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/file: is no folder, or a link to none; remove it"):
        open_samples(DataConfig("mnist", root=str(tmp_path / "file"), download=True), "train")


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *arguments: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    planes = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for i, batch in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        content = {"data": planes[i].reshape(1, -1), "labels": [i]}
        (folder / batch).write_bytes(pickle.dumps(content))
    names = [f"class {k}" for k in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    samples = open_samples(DataConfig("cifar10", root=str(tmp_path)), "train")
    assert len(samples) == 5
    assert samples.classes == tuple(names)
    assert samples.load(3)[1] == 3
    assert np.array_equal(samples.load(3)[0], planes[3].transpose(1, 2, 0))
    assert open_samples(DataConfig("cifar10", root=str(tmp_path)), "val").load(0)[1] == 5


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path}: {name} is not here.*set data.download=true") as caught:
        open_samples(DataConfig(name, root=str(tmp_path)), "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has the splits train and test \(or val\), not 'mine'"):
        open_samples(DataConfig(name, root=str(tmp_path), train="mine"), "train")


def test_one_process_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert download
        with pytest.raises(filelock.Timeout):  # another process would wait
            filelock.FileLock(tmp_path / "new/.download.lock", blocking=False).acquire()
        return SimpleNamespace(classes=["0", "1"], data=np.zeros((1, 2, 2), np.uint8), targets=[0])

    monkeypatch.setitem(torchvision_sets.TORCHVISION, "mnist", fetch)
    assert len(open_samples(DataConfig("mnist", root=str(tmp_path / "new"), download=True), "train")) == 1


def test_mnist_as_published() -> None:
    if not (SHARED_DATA / "mnist").is_dir():
        pytest.skip(f"no MNIST at {SHARED_DATA / 'mnist'}")
    samples = open_samples(DataConfig("mnist", root=str(SHARED_DATA / "mnist")), "val")
    assert len(samples) == 10_000
    assert [samples.load(i)[1] for i in range(8)] == [7, 2, 1, 0, 4, 1, 4, 9]

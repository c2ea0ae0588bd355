"""The Cityscapes loader on a small tree, and the tool that lays CamVid out as one."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cityscapesscripts.helpers.csHelpers import getCsFileInfo
from cityscapesscripts.helpers.labels import id2label, name2label, trainId2label
from PIL import Image
from test_data import write

from segdeconv.config import DataConfig
from segdeconv.data import open_samples
from segdeconv.data.cityscapes import Cityscapes
from segdeconv.errors import UserError

TOOL = Path(__file__).parents[1] / "tools" / "camvid_to_cityscapes.py"


ALL_IDS = np.tile(np.arange(34, dtype=np.uint8), (6, 1))


def add_frame(root: Path, split: str, city: str, frame: int, ids: np.ndarray | None) -> None:
    """A picture and, unless ``ids`` is None, its labels and instances."""
    name = f"{city}_{frame:06d}_000019"
    shape = ALL_IDS.shape if ids is None else ids.shape
    write(
        root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", np.full((*shape, 3), frame, np.uint8)
    )
    if ids is not None:
        kind = "gtCoarse" if split == "train_extra" else "gtFine"
        truth = root / kind / split / city
        write(truth / f"{name}_{kind}_labelIds.png", ids)
        write(truth / f"{name}_{kind}_instanceIds.png", ids.astype(np.uint16) * 1000)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    add_frame(tmp_path, "train", "ulm", 0, ALL_IDS)
    add_frame(tmp_path, "train", "aachen", 1, ALL_IDS)
    add_frame(tmp_path, "train_extra", "mainz", 2, ALL_IDS)
    add_frame(tmp_path, "test", "berlin", 3, None)
    return tmp_path


def cityscapes(root: Path, split: str, **changes: object) -> Cityscapes:
    samples = open_samples(DataConfig("cityscapes", root=str(root), train=split, **changes), "train")
    assert isinstance(samples, Cityscapes)
    return samples


def test_label_ids_become_train_classes(tree: Path) -> None:
    samples = cityscapes(tree, "train", ignore_index=254)
    assert [samples.name(i) for i in range(len(samples))] == [
        "aachen_000001_000019_leftImg8bit",
        "ulm_000000_000019_leftImg8bit",
    ]
    image, mask = samples.load(0)
    assert image.shape == (6, 34, 3)
    assert (image == 1).all()
    assert mask.dtype == np.uint8
    for label_id in range(34):
        train_id = id2label[label_id].trainId
        assert (mask[:, label_id] == (254 if train_id == 255 else train_id)).all()


def test_classes_are_those_of_the_official_scripts(tree: Path) -> None:
    samples = cityscapes(tree, "train")
    assert len(samples.classes) == 19
    for number, name in enumerate(samples.classes):
        official = trainId2label[number]
        assert name == official.name
        assert samples.palette[number] == official.color
        assert samples.label_ids[number] == official.id
        assert samples.categories[number] == official.category


def test_splits_can_be_joined_and_test_needs_no_labels(tree: Path) -> None:
    joined = cityscapes(tree, "train+train_extra")
    assert [joined.name(i).split("_")[0] for i in range(len(joined))] == ["aachen", "ulm", "mainz"]
    assert np.array_equal(joined.load(2)[1], joined.load(0)[1])
    hidden = cityscapes(tree, "test", size=(3, 17))
    image, mask = hidden.load(0)
    assert image.shape == (3, 17, 3)
    assert mask.shape == (3, 17)
    assert (mask == 255).all()


def test_a_mask_that_vanished_is_no_unlabelled_picture(tree: Path) -> None:
    samples = cityscapes(tree, "train")
    samples.pairs[0][1].unlink()
    with pytest.raises(UserError, match=r"aachen_000001_000019_gtFine_labelIds\.png"):
        samples.load(0)


def test_instances(tree: Path) -> None:
    instances = cityscapes(tree, "train+train_extra").instances
    for index in (0, 2):
        found = instances(index)
        assert found is not None
        assert found.dtype == np.int32
        assert np.array_equal(found, ALL_IDS.astype(int) * 1000)
    assert cityscapes(tree, "test").instances(0) is None


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("no mask", "ulm_000000_000019_leftImg8bit.png: has no mask of that name in .*gtFine/train$"),
        ("no picture", "_labelIds.png: has no picture of that name in .*leftImg8bit/train$"),
        ("two", "has no mask of that name .*; 1 more: segdeconv data check lists them"),
        ("empty", "leftImg8bit/train: holds no picture CITY/NAME_leftImg8bit.png"),
        ("no folder", "leftImg8bit/train: no such folder"),
        ("train ids", r"labelIds.png: holds label 255, but the labels here are 0 to 33"),
    ],
)
def test_broken_trees_are_named(tree: Path, what: str, says: str) -> None:
    pictures, truth = tree / "leftImg8bit" / "train", tree / "gtFine" / "train"
    name = "ulm/ulm_000000_000019"
    if what in ("no mask", "two"):
        (truth / f"{name}_gtFine_labelIds.png").unlink()
    if what in ("no picture", "two"):
        kept = "aachen/aachen_000001_000019" if what == "two" else name
        (pictures / f"{kept}_leftImg8bit.png").unlink()
    if what == "empty":
        shutil.rmtree(pictures / "ulm")
        shutil.rmtree(pictures / "aachen")
    if what == "no folder":
        shutil.rmtree(pictures)
    if what == "train ids":
        write(truth / f"{name}_gtFine_labelIds.png", np.full((6, 34), 255, np.uint8))
    with pytest.raises(UserError, match=says):
        cityscapes(tree, "train").load(1)


def test_the_package_is_asked_for(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cityscapesscripts.helpers.labels", None)
    with pytest.raises(UserError, match=r"pip install 'segdeconv\[cityscapes\]'"):
        cityscapes(tree, "train")


def lay_out(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), str(source), str(target)])
    runpy.run_path(str(TOOL), run_name="__main__")


def test_camvid_as_cityscapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 12)):
        for i in range(count):
            mask = np.tile(np.arange(12, dtype=np.uint8), (20, 2))  # each class twice, 20 pixels apart
            mask[0, 11] = 8  # a car of one pixel
            write(tmp_path / "camvid" / split / f"{i}.png", rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
            write(tmp_path / "camvid" / f"{split}annot" / f"{i}.png", mask)
    lay_out(tmp_path / "camvid", tmp_path / "one", monkeypatch)
    lay_out(tmp_path / "camvid", tmp_path / "two", monkeypatch)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.png"))
    assert len(files) == 2 * 3 + 12 * 3 + 10
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert {getCsFileInfo(str(f)).city for f in files} == {"camvid"}

    before = open_samples(DataConfig("camvid", root=str(tmp_path / "camvid")), "val")
    after = cityscapes(tmp_path / "one", "val")
    (image, old), (same, new) = before.load(3), after.load(3)
    assert np.array_equal(image, same)
    same_name = {"pavement": "sidewalk", "tree": "vegetation", "sign symbol": "traffic sign",
                 "pedestrian": "person", "bicyclist": "bicycle"}  # fmt: skip
    for number, name in enumerate(before.classes):
        assert (new[old == number] == after.classes.index(same_name.get(name, name))).all()
    assert ((old == 255) == (new == 255)).all()

    instances = after.instances(3)
    assert instances is not None
    car, person = name2label["car"].id, name2label["person"].id
    assert set(np.unique(instances[new == after.classes.index("car")])) == {car, 1000 * car, 1000 * car + 1}
    assert instances[0, 11] == car  # too small to be an object
    assert set(np.unique(instances[new == after.classes.index("person")])) == {
        1000 * person,
        1000 * person + 1,
    }
    assert set(np.unique(instances[new == after.classes.index("road")])) == {name2label["road"].id}
    test = cityscapes(tmp_path / "one", "test")
    assert len(test) == 10
    assert np.array_equal(test.load(3)[0], image)


def test_the_tool_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        lay_out(tmp_path, tmp_path / "out", monkeypatch)
    assert stop.value.code == 2
    assert "train: no such folder" in capsys.readouterr().err


def test_instance_maps_of_sixteen_bits(tmp_path: Path) -> None:
    add_frame(tmp_path, "train", "ulm", 0, ALL_IDS)
    path = tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_instanceIds.png"
    Image.fromarray(np.full((6, 34), 33999, np.uint16)).save(path)
    found = cityscapes(tmp_path, "train").instances(0)
    assert found is not None
    assert (found == 33999).all()

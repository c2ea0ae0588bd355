"""Windows, mirroring, scales and saved predictions; the official Cityscapes script on the same pictures."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import make_set, own, write
from test_train import NO_MEMORY
from torch import Tensor

from segdeconv import evaluate
from segdeconv.checkpoint import CheckpointInfo, save_checkpoint
from segdeconv.config import DataConfig, Recipe, load_recipe
from segdeconv.data import eval_loader, open_samples
from segdeconv.errors import UserError
from segdeconv.evaluate import (
    Inference,
    Predict,
    evaluate_run,
    flipped,
    multi_scale,
    padded,
    probabilities,
    resized,
    score,
    scores_folder,
    sliding_window,
    table,
)
from segdeconv.images import window_starts
from segdeconv.models import build_model
from segdeconv.train import _Stoppable

TOOLS = Path(__file__).parents[1] / "tools"
SIZES = [(32, 64), (33, 47), (7, 100), (1, 1), (5, 9)]


def pointwise(images: Tensor) -> Tensor:
    """Class scores from the pixel alone."""
    return torch.stack([images.sum(1), images[:, 0] - images[:, 1], images[:, 2] ** 2], 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("window", "overlap"), [((16, 16), 0.25), ((8, 24), 0.5), ((5, 7), 0.0), ((3, 3), 0.9)]
)
def test_windows_of_a_pointwise_network_are_the_whole_picture(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    got = sliding_window(pointwise, window, overlap)(images)
    torch.testing.assert_close(got, pointwise(images), rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_windows_cover_a_picture_and_are_averaged(size: tuple[int, int], overlap: float) -> None:
    """Every window puts out its own number; a loop over pixels says what the average must be."""
    window = (16, 12)
    shapes: list[tuple[int, ...]] = []

    def numbered(images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape[-2:]))
        return torch.full((len(images), 1, *images.shape[-2:]), float(len(shapes)), dtype=torch.float64)

    got = sliding_window(numbered, window, overlap)(torch.zeros(1, 3, *size, dtype=torch.float64))
    height, width = (min(w, s) for w, s in zip(window, size, strict=True))
    assert set(shapes) == {(height, width)}  # none is cut, none reaches beyond
    boxes = [
        (t, left)
        for t in window_starts(size[0], height, overlap)
        for left in window_starts(size[1], width, overlap)
    ]
    assert len(boxes) == len(shapes)
    for y in range(size[0]):
        for x in range(size[1]):
            over = [
                i for i, (t, left) in enumerate(boxes, 1) if t <= y < t + height and left <= x < left + width
            ]
            assert over
            assert got[0, 0, y, x].item() == pytest.approx(sum(over) / len(over), abs=1e-13)


@pytest.mark.parametrize("size", [1, 7, 16, 17, 100, 1023, 2048])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 1 / 3, 0.99])
def test_neighbouring_windows_share_what_was_asked_for(size: int, overlap: float) -> None:
    window = min(16, size)
    starts = window_starts(size, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == size - window
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= max(1, window * (1 - overlap))).all()


def test_mirroring() -> None:
    images = torch.randn(2, 3, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(flipped(pointwise)(images), pointwise(images), rtol=0, atol=0)

    def left_of(images: Tensor) -> Tensor:
        """Not equivariant: scores what is left of the pixel."""
        return images.cumsum(-1)

    expected = (images.cumsum(-1) + images.flip(-1).cumsum(-1).flip(-1)) / 2
    torch.testing.assert_close(flipped(left_of)(images), expected, rtol=0, atol=0)
    classify: Predict = lambda images: images.cumsum(-1).mean((2, 3))  # noqa: E731
    mirrored = (classify(images) + classify(images.flip(-1))) / 2
    torch.testing.assert_close(flipped(classify)(images), mirrored, rtol=0, atol=1e-15)


def test_scales() -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 32, 64).contiguous()
    sizes: list[tuple[int, ...]] = []

    def noted(images: Tensor) -> Tensor:
        sizes.append(tuple(images.shape[-2:]))
        return images

    got = multi_scale(noted, (0.5, 1, 2))(ramp)
    assert sizes == [(16, 32), (32, 64), (64, 128)]
    torch.testing.assert_close(got[..., 4:-4], ramp[..., 4:-4], rtol=0, atol=1e-6)  # linear, but for the rim
    torch.testing.assert_close(multi_scale(noted, (1.0,))(ramp), ramp, rtol=0, atol=0)
    constant = multi_scale(
        lambda images: torch.full((1, 2, *images.shape[2:]), images.shape[3] / 64), (0.5, 2.0)
    )
    torch.testing.assert_close(constant(ramp), torch.full((1, 2, 32, 64), 1.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_cut_again(size: tuple[int, int]) -> None:
    def picky(images: Tensor) -> Tensor:
        assert images.shape[-2] % 16 == images.shape[-1] % 16 == 0
        return pointwise(images)

    images = torch.randn(1, 3, *size)
    torch.testing.assert_close(padded(picky, 16)(images), pointwise(images), rtol=0, atol=0)
    labels = padded(lambda images: picky(images).argmax(1), 16)(images)
    assert torch.equal(labels, pointwise(images).argmax(1))


def test_all_at_once_average_probabilities() -> None:
    images = torch.randn(1, 3, 20, 30)
    settings = Inference(window=(8, 8), overlap=0.5, flip=True, scales=(1.0, 1.0))
    expected = pointwise(images).softmax(1)
    torch.testing.assert_close(settings.around(pointwise)(images), expected, rtol=0, atol=1e-6)
    assert Inference().around(pointwise) is pointwise
    torch.testing.assert_close(probabilities(pointwise)(images.bfloat16()).sum(1), torch.ones(1, 20, 30))


def tree_recipe(tree: Path, *changes: str) -> Recipe:
    network = ["model.encoder=lcnet_050", "model.options={encoder_depth: 3, decoder_channels: [16, 16, 8]}"]
    data = ["data.dataset=cityscapes", f"data.root={tree}", "train.batch_size=2"]
    return load_recipe("demo", [*network, *data, *changes])


def untrained(recipe: Recipe, folder: Path) -> Path:
    """A run folder with a checkpoint of a network as it was initialised."""
    samples = open_samples(recipe.data, "val")
    model, _ = build_model(recipe.model, len(samples.classes))
    info = CheckpointInfo(recipe, samples.task, samples.classes, samples.palette, 1, {})
    folder.mkdir(parents=True)
    save_checkpoint(folder / "best.safetensors", model, info)
    return folder


@pytest.fixture(scope="module")
def tree(camvid: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight validation photographs of CamVid, and two of training, as a Cityscapes tree."""
    pytest.importorskip("cityscapesscripts")
    small, tree = tmp_path_factory.mktemp("camvid"), tmp_path_factory.mktemp("tree")
    for split, step in (("train", 200), ("val", 13)):
        for folder in (split, f"{split}annot"):
            (small / folder).mkdir()
            for path in sorted((camvid / folder).iterdir())[::step]:
                (small / folder / path.name).symlink_to(path)
    command = [sys.executable, TOOLS / "camvid_to_cityscapes.py", small, tree]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tree


def corrupted(samples_at: DataConfig) -> Predict:
    """Scores that say the truth, picture by picture, but for random blocks of random classes."""
    samples, rng = open_samples(samples_at, "val"), np.random.default_rng(0)
    pictures = iter(range(len(samples)))

    def predict(images: Tensor) -> Tensor:
        (truth,) = (samples.load(next(pictures))[1] for _ in images)
        assert isinstance(truth, np.ndarray)
        labels = np.where(truth == 255, rng.integers(0, 19, truth.shape), truth)
        for _ in range(150):
            y, x = (int(rng.integers(0, side)) for side in truth.shape)
            labels[y : y + int(rng.integers(4, 40)), x : x + int(rng.integers(4, 40))] = rng.integers(0, 19)
        return torch.nn.functional.one_hot(torch.from_numpy(labels).long(), 19).permute(2, 0, 1)[None].float()

    return predict


@pytest.mark.parametrize("size", ["null", "[180, 240]"])
def test_the_official_script_finds_the_same_scores(
    size: str, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tree_recipe(tree, f"data.size={size}")
    monkeypatch.setattr(evaluate, "torch_predictor", lambda model, amp: corrupted(recipe.data))
    scores = evaluate_run(untrained(recipe, tmp_path / "run"), predictions=tmp_path / "predictions")
    environment = {"CITYSCAPES_DATASET": str(tree), "CITYSCAPES_RESULTS": str(tmp_path / "predictions")}
    done = subprocess.run(
        [sys.executable, TOOLS / "cityscapes_official_evaluation.py"],
        env={**os.environ, **environment, "CITYSCAPES_EXPORT_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    official = json.loads((tmp_path / "resultPixelLevelSemanticLabeling.json").read_text())
    for ours, theirs, mean in (
        ("iou", "classScores", "averageScoreClasses"),
        ("iiou", "classInstScores", "averageScoreInstClasses"),
        ("category_iou", "categoryScores", "averageScoreCategories"),
        ("category_iiou", "categoryInstScores", "averageScoreInstCategories"),
    ):
        both = {name for name, value in official[theirs].items() if not math.isnan(value)}
        assert both == {name for name, value in scores[ours].items() if not math.isnan(value)}
        assert len(both) == {"iou": 19, "iiou": 8, "category_iou": 7, "category_iiou": 2}[ours]
        for name in both:
            assert scores[ours][name] == pytest.approx(official[theirs][name], abs=1e-12), (ours, name)
        key = ours.replace("iou", "miou").replace("imiou", "miiou")
        assert scores[key] == pytest.approx(official[mean], abs=1e-12)
    there = {name for name, value in scores["iou"].items() if value > 0}
    assert len(there) == 11  # the classes of CamVid
    assert 0.1 < scores["iiou"]["person"] < 0.95
    assert scores["iiou"]["person"] != pytest.approx(scores["iou"]["person"], abs=1e-3)
    assert table(scores, "segmentation").row_count == 19 + 7 + 4


def test_submission(tree: Path, tmp_path: Path) -> None:
    """The test split has no labels: nothing is scored. Label ids are zipped under the server's names."""
    run = untrained(tree_recipe(tree, "data.size=[64, 96]"), tmp_path / "run")
    scores = evaluate_run(run, split="test", submission=tmp_path / "s.zip", figures=tmp_path)
    assert not np.any(scores["confusion"])
    assert math.isnan(scores["miou"])
    assert "iiou" not in scores
    pictures = sorted(path.name for path in tree.glob("leftImg8bit/test/*/*.png"))
    with zipfile.ZipFile(tmp_path / "s.zip") as archive:
        names = sorted(archive.namelist())
        assert names == [name.replace("leftImg8bit", "pred_labelIds") for name in pictures]
        labels = Image.open(archive.open(names[0]))
        labels.load()
    assert labels.size == (480, 360)
    assert labels.mode == "L"
    ids = set(open_samples(tree_recipe(tree).data, "val").label_ids)
    assert set(np.unique(np.asarray(labels)).tolist()) <= ids
    assert {path.name for path in tmp_path.iterdir()} == {"run", "s.zip"}


def own_run(folder: Path, **data: object) -> Path:
    make_set(folder, count=12, size=(20, 30))
    make_set(folder, count=12, split="val", size=(20, 30))
    changes = ["data.dataset=image_mask", f"data.root={folder}", "data.classes=[a, b]",
               *(f"data.{key}={value}" for key, value in data.items())]  # fmt: skip
    return untrained(tree_recipe(folder, *changes), folder / "run")


@pytest.mark.parametrize("inference", [Inference(), Inference((16, 16), 0.5, True, (0.75, 1.0, 1.5), True)])
def test_a_run_is_scored_at_its_own_size_or_the_original(tmp_path: Path, inference: Inference) -> None:
    run = own_run(tmp_path, size=[16, 32])
    scores = evaluate_run(run, inference=inference, figures=tmp_path / "a new folder")
    pixels = 12 * (19 * 30 if inference.original else 16 * 32)
    counted = np.sum(scores["confusion"])
    assert counted == pixels if inference.original else 0.9 * pixels < counted < pixels  # a row is ignored
    assert scores["settings"]["scales"] == inference.scales
    assert (tmp_path / "a new folder/confusion.png").is_file()
    worst = Image.open(tmp_path / "a new folder/worst.jpg")
    assert worst.size[0] > 900
    assert worst.size[1] > 10 * 150
    predicted = evaluate_run(run, predictions=tmp_path / "labels", inference=inference)
    assert len(list((tmp_path / "labels").glob("*.png"))) == 12
    confusion = np.zeros((2, 2), int)
    for path in (tmp_path / "labels").glob("*.png"):
        truth = np.asarray(Image.open(tmp_path / "val" / "masks" / path.name))
        np.add.at(confusion, (truth[1:], np.asarray(Image.open(path))[1:]), 1)
    assert predicted["confusion"] == confusion.tolist()
    with pytest.raises(UserError, match="holds pictures or masks of the data; choose another folder"):
        evaluate_run(run, predictions=tmp_path / "val" / "masks", inference=inference)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("too small"), r"cannot take pictures of shape \(1, 3, 32, 64\) \(too small\)"),
        (AssertionError("not 224"), r"cannot take pictures of shape \(1, 3, 32, 64\) \(not 224\)"),
        (torch.OutOfMemoryError(), r"out of memory on pictures of shape \(1, 3, 32, 64\)"),
        (MemoryError(), "out of memory on pictures of shape"),
        (RuntimeError(NO_MEMORY), "out of memory on pictures of shape"),
    ],
    ids=repr,
)
def test_a_picture_that_the_network_cannot_take(error: Exception, said: str) -> None:
    config = DataConfig("toy", size=(32, 64), count=(1, 2))
    samples = open_samples(config, "val")

    def predict(images: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(UserError, match=said):
        score(predict, eval_loader(samples, config, 1, 1), samples, 255, "cpu")


def test_a_loader_process_that_dies_is_not_put_down_to_the_pictures() -> None:
    config = DataConfig("toy", size=(32, 64), count=(1, 2))
    samples = open_samples(config, "val")

    def predict(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        score(predict, eval_loader(samples, config, 1, 1), samples, 255, "cpu")


def test_what_fails_after_pictures_of_that_shape_is_no_bad_input() -> None:
    config = DataConfig("toy", size=(32, 64), count=(1, 2))
    samples = open_samples(config, "val")
    calls = []

    def predict(images: torch.Tensor) -> torch.Tensor:
        calls.append(images)
        if len(calls) == 2:
            raise RuntimeError("device-side assert")
        return torch.zeros(1, len(samples.classes), 32, 64)

    with pytest.raises(RuntimeError, match="device-side assert"):
        score(predict, eval_loader(samples, config, 1, 1), samples, 255, "cpu")


@pytest.mark.parametrize("training", [False, True])
def test_no_process_stays_behind_a_damaged_picture(training: bool, tmp_path: Path) -> None:
    """The traceback holds the loader, whose processes would hang Python's exit."""
    make_set(tmp_path, 1, "val")
    write(tmp_path / "val/masks/0.png", np.full((20, 30), 7, np.uint8))
    config = own(tmp_path, num_workers=1)
    samples = open_samples(config, "val")
    loader: Any = eval_loader(samples, config, 1, 1)
    if training:
        loader = _Stoppable(loader, SimpleNamespace(stop=SimpleNamespace(signal=None)))
    with pytest.raises(UserError, match="holds label 7") as raised:
        score(lambda images: images, loader, samples, 255, "cpu")
    assert raised.traceback
    assert not multiprocessing.active_children()


def test_the_default_is_what_training_validates(tmp_path: Path) -> None:
    """At the recipe's size, padded right and below to what the network needs."""
    from segdeconv.checkpoint import load_checkpoint

    run = own_run(tmp_path)
    model, info = load_checkpoint(run)
    samples = open_samples(info.recipe.data, "val")
    loader = eval_loader(samples, info.recipe.data, 2, 8)
    expected = score(evaluate.torch_predictor(model), loader, samples, 255, "cpu")
    got = evaluate_run(run)
    assert {key: got[key] for key in expected} == expected


def test_the_worst_pictures_are_the_worst(tmp_path: Path) -> None:
    make_set(tmp_path, count=13, split="val")
    samples = open_samples(DataConfig("image_mask", root=str(tmp_path), classes=("a", "b")), "val")
    worst = evaluate._Worst(samples, 255)
    truth = np.zeros((10, 10), np.uint8)
    for index in range(12):
        labels = truth.copy()
        labels.ravel()[: (7 * index) % 12] = 1
        worst(index, labels, truth)
    worst(12, truth, np.full_like(truth, 255))  # without labels there is nothing to be bad at
    kept = sorted((7 * index) % 12 for _, index, _ in worst.kept)
    assert kept == list(range(2, 12))


def test_central_crops_are_evaluated_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, size in enumerate([(36, 40), (50, 38), (40, 40)]):
        for split, name in itertools.product(("train", "val"), ("cat", "dog")):
            write(tmp_path / split / name / f"{number}.png", np.zeros((*size, 3), np.uint8))
    changes = ["model.architecture=mobilenetv3_small_050", f"data.root={tmp_path}", "data.val=val",
               "data.pad=0", "data.size=null", "data.crop=[32, 32]", "data.shorter_side=36",
               "train.batch_size=4"]  # fmt: skip
    batches: list[int] = []
    monkeypatch.setattr(
        evaluate,
        "torch_predictor",
        lambda model, amp: lambda images: batches.append(len(images)) or torch.zeros(len(images), 2),
    )
    evaluate_run(untrained(load_recipe("cifar10_resnet18", changes), tmp_path / "run"))
    assert batches == [4, 2]


def test_scores_of_an_entry_do_not_go_into_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert scores_folder("unet_r.nd_mine") == Path("runs/unet_r.nd_mine")
    assert scores_folder("runs/unet_r.nd_mine") == Path("runs/unet_r.nd_mine")
    Path("runs/unet_r.nd_mine/recipe.yaml").touch()
    assert scores_folder("runs/unet_r.nd_mine") == Path("runs/unet_r.nd_mine")
    with pytest.raises(UserError, match=r"runs/unet_r\.nd_mine: holds a run of your own"):
        scores_folder("unet_r.nd_mine")


def test_top_five() -> None:
    rng = np.random.default_rng(0)
    scores, truth = torch.randn(50, 9), torch.from_numpy(rng.integers(0, 9, 50))
    batches = [(scores[:32], truth[:32]), (scores[32:], truth[32:])]

    class Faces:
        task, classes = "classification", tuple("abcdefghi")

    got = score(lambda images: images, batches, Faces(), -100, "cpu")
    ranks = [int((row > row[t]).sum()) for row, t in zip(scores, truth, strict=True)]
    assert got["top1"] == np.mean([rank < 1 for rank in ranks])
    assert got["top5"] == pytest.approx(np.mean([rank < 5 for rank in ranks]), abs=1e-7)
    numbers = score(lambda images: images.argmax(1), batches, Faces(), -100, "cpu")
    assert numbers["top1"] == got["top1"]
    assert "top5" not in numbers


def test_scores_are_brought_to_the_labels_size() -> None:
    class Two:
        task, classes = "segmentation", ("a", "b")

    small = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    targets = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, 1]]])
    scores = score(lambda images: small, [(torch.zeros(1, 3, 1, 2), targets)], Two(), 255, "cpu")
    assert scores["miou"] == 1.0
    assert resized(small, (1, 2)) is small


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": (0, 5)}, "--window 0,5"),
        ({"overlap": 0.5}, "--overlap 0.5: goes with --window"),
        ({"amp": "bfloat16"}, "--amp bfloat16: expected recipe, off"),
        ({"overlap": 1.0}, "--overlap 1.0"),
        ({"overlap": math.nan}, "--overlap nan"),
        ({"scales": ()}, "--scales"),
        ({"scales": (1.0, 0.0)}, "--scales 1.0,0.0"),
        ({"scales": (math.nan,)}, "--scales nan"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Inference(**settings)


@pytest.mark.parametrize("size", [(5, 9), (24, 40), (3, 40)])
def test_scores_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).random((12, 20), np.float32)
    want = np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR))
    got = resized(torch.from_numpy(values)[None, None], size)[0, 0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "taken"), [("recipe", torch.bfloat16), ("off", None), ("fp16", torch.float16)]
)
def test_the_precision_that_is_asked_for_is_taken(
    asked: str, taken: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tree_recipe(
        tmp_path, "data.dataset=toy", "data.size=[32, 64]", "data.count=[2, 2]", "train.amp=bf16"
    )
    given = []

    def noted(model: torch.nn.Module, amp: torch.dtype | None = None) -> evaluate.Predict:
        given.append(amp)
        return lambda images: torch.zeros(len(images), 8, *images.shape[2:])

    monkeypatch.setattr(evaluate, "torch_predictor", noted)
    scores = evaluate_run(untrained(recipe, tmp_path / "run"), inference=Inference(amp=asked))
    assert given == [taken]
    assert scores["settings"]["amp"] == ("bf16" if asked == "recipe" else asked)


@pytest.mark.parametrize(("overlap", "windows"), [(0.0, 3), (0.25, 4), (0.5, 5)])
def test_windows_overlap_as_asked(overlap: float, windows: int) -> None:
    shapes = []
    predict = Inference(window=tuple(np.array([8, 8])), overlap=overlap).around(
        lambda x: shapes.append(x.shape) or x
    )
    predict(torch.zeros(1, 3, 8, 24))
    assert shapes == [(1, 3, 8, 8)] * windows


@pytest.mark.parametrize(("split", "folder"), [("train", "learn"), ("val", "judge"), ("other", "other")])
def test_splits_are_called_as_the_recipe_calls_them(split: str, folder: str, tmp_path: Path) -> None:
    for name in ("learn", "judge", "other"):
        make_set(tmp_path, count=2, split=name)
    names = ["data.dataset=image_mask", "data.classes=[a, b]", "data.train=learn", "data.val=judge"]
    run = untrained(tree_recipe(tmp_path, *names, "data.size=[16, 32]"), tmp_path / "run")
    assert evaluate_run(run, split=split)["split"] == folder

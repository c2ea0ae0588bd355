"""Recipes for data that is not here, two training steps each on generated files laid out as that data; and
what the paper (arXiv 1905.11926) says of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from test_cityscapes import add_frame
from test_data import write

from segdeconv.config import load_recipe
from segdeconv.train import dry_run

SMALL = ("train.batch_size=2", "data.num_workers=0")
CITY = (*SMALL, "data.crop=[64, 64]")
OVERRIDES = {
    "citycam_unet_mobilenet_v2": (*CITY, "data.size=[64, 96]"),
    "cityscapes_deeplabv3_resnet50": (*CITY, "data.size=[64, 96]"),
    "cityscapes_fcn_resnet50": (*CITY, "data.size=[64, 96]"),
    "cityscapes_modern": (*CITY, "model.options.encoder_weights=null"),
    "imagenet_vgg11": (*SMALL, "data.crop=[64, 64]"),
    "imagenet_resnet18": (*SMALL, "data.crop=[64, 64]"),
    "imagenet_densenet121": (*SMALL, "data.crop=[64, 64]"),
}
QUICK = ("citycam_unet_mobilenet_v2", "imagenet_resnet18")


@pytest.mark.parametrize("name", ["cityscapes_deeplabv3_resnet50", "cityscapes_fcn_resnet50"])
def test_the_papers_segmentation(name: str) -> None:
    recipe = load_recipe(name)
    data, train = recipe.data, recipe.train
    assert recipe.model.architecture == name.removeprefix("cityscapes_")
    assert data.dataset == "cityscapes"
    assert data.size is not None
    assert (min(data.size), data.scale, data.crop) == (520, (0.5, 2.0), (480, 480))
    assert (train.epochs, train.batch_size, train.optimizer, train.lr) == (30, 8, "sgd", 0.1)
    assert (train.schedule, train.poly_power, train.warmup_epochs) == ("poly", 0.9, 0)


@pytest.mark.parametrize(("network", "lr"), [("vgg11", 0.01), ("resnet18", 0.1), ("densenet121", 0.1)])
def test_the_papers_classification(network: str, lr: float) -> None:
    recipe = load_recipe(f"imagenet_{network}")
    train = recipe.train
    assert (recipe.model.architecture, recipe.data.dataset) == (network, "imagenet")
    assert (train.epochs, train.batch_size, train.optimizer, train.lr) == (90, 256, "sgd", lr)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OVERRIDES]
)
@pytest.mark.parametrize("norm", ["nd", "bn"])
def test_two_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, norm: str) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(2):
            if name.startswith("city"):
                add_frame(tmp_path, split, "ulm", i, rng.integers(0, 34, (80, 120), dtype=np.uint8))
            else:
                picture = rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
                write(tmp_path / split / f"n{i}" / "a.JPEG", picture)
    dry_run(load_recipe(name, [*OVERRIDES[name], f"data.root={tmp_path}", f"model.norm={norm}"]))
    assert "step 2: loss " in capsys.readouterr().out

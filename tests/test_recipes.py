"""Recipes for data that is not here, two training steps each on generated files laid out as that data."""

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

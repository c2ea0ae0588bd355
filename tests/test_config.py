from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from segdeconv.config import (
    NetworkDeconvConfig,
    Recipe,
    load_recipe,
    own_recipes,
    recipe_from_dict,
    recipe_to_dict,
)
from segdeconv.data import DATASETS
from segdeconv.errors import UserError
from segdeconv.models import build_model, resolve

GOOD = {"name": "x", "model": {"architecture": "unet"}, "data": {"dataset": "toy"}}


@pytest.mark.parametrize("name", own_recipes())
def test_own_recipes(name: str) -> None:
    """Every committed recipe parses, names what exists, and survives a round trip."""
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.data.dataset in DATASETS
    architecture, _ = resolve(recipe.model)
    assert architecture.task == DATASETS[recipe.data.dataset].task
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe_to_dict(recipe))), name) == recipe


@pytest.mark.parametrize("name", own_recipes())
@pytest.mark.parametrize("norm", ["nd", "bn"])
def test_own_recipes_build(name: str, norm: str) -> None:
    model, report = build_model(load_recipe(name, [f"model.norm={norm}"]).model, 19, pretrained=False)
    assert (report is None) == (norm == "bn")
    assert sum(p.numel() for p in model.parameters()) > 1e5


def test_defaults_are_those_of_the_authors_code() -> None:
    config = NetworkDeconvConfig(mode="reference")
    assert (config.conv_block_size, config.linear_block_size, config.eps) == (64, 512, 1e-5)
    assert (config.num_iters, config.momentum, config.sampling_stride) == (5, 0.1, 3)


def test_overrides() -> None:
    recipe = load_recipe(
        "demo", ["train.lr=0.5", "data.crop=[64, 64]", "model.encoder=resnet18", "name=mine"]
    )
    assert (recipe.train.lr, recipe.data.crop, recipe.model.encoder) == (0.5, (64, 64), "resnet18")
    assert recipe.name == "mine"
    assert load_recipe("cityscapes_modern", ["train.amp=off"]).train.amp == "off"


@pytest.mark.parametrize(
    ("section", "values", "says"),
    [
        (None, {"modle": 1}, r"unknown key 'modle'; did you mean 'model'\?"),
        ("train", {"leraning_rate": 1}, "unknown key 'train.leraning_rate'"),
        ("train", {"batchsize": 4}, r"did you mean 'batch_size'\?"),
        ("model", {"network_deconv": {"blocksize": 4}}, r"did you mean 'block_size'\?"),
        ("train", {"lr": -1}, r"train.lr = -1: input should be greater than 0"),
        ("train", {"epochs": "many"}, "train.epochs = 'many'"),
        ("train", {"optimizer": "adam"}, "'sgd' or 'adamw'"),
        ("model", {"norm": "gn"}, "'bn' or 'nd'"),
        ("data", {"size": [0, 5]}, r"data.size.0 = 0"),
        ("data", {"classes": ["a", "a"]}, "holds a name twice"),
        ("data", {"classes": ["a"], "palette": [[1, 2, 3], [4, 5, 6]]}, "2 colours for 1 classes"),
        ("data", {"scale": [2, 1], "crop": [8, 8]}, "smallest, largest"),
        ("data", {"scale": [0.5, 2]}, "need crop"),
        ("data", {"std": [0, 1, 1]}, "std must be positive"),
        ("data", {"resized_crop": True}, "resized_crop needs crop"),
        ("data", {"resized_crop": True, "crop": [8, 8], "pad": 1}, "neither scale nor pad"),
        ("data", {"shorter_side": 8}, "shorter_side needs crop, and no size"),
        ("model", {"network_deconv": {"num_iters": 4}}, "num_iters = 4 is for exact and reference mode"),
        ("model", {"network_deconv": {"mode": "exact", "refresh_every": 9}}, "refresh_every = 9 is for fast"),
        ("data", {"size": 64}, r"data.size = 64: expected a list, such as \[1, 2\]"),
        ("data", {"crop": [64]}, "data.crop: value number 2 of the list is missing"),
        ("data", {"scale": [50, 150], "crop": [8, 8]}, "data.scale.0 = 50.*less than or equal to 10"),
        ("data", {"pad": 100_000, "crop": [8, 8]}, "data.pad = 100000"),
        ("train", {"class_weights": [0, 0]}, "class_weights are all 0"),
        ("train", {"label_smoothing": 1}, "label_smoothing = 1"),
        (None, {"train": 5}, "train = 5: expected a section"),
        (None, {"name": "../up"}, "name = '../up': expected the name of a folder"),
        ("data", {"shorter_side": 8, "crop": [4, 9]}, "shorter_side = 8 is less than crop"),
    ],
)
def test_wrong_values_are_named(section: str | None, values: dict, says: str) -> None:
    recipe = {key: dict(value) if isinstance(value, dict) else value for key, value in GOOD.items()}
    (recipe if section is None else recipe.setdefault(section, {})).update(values)
    with pytest.raises(UserError, match=says) as caught:
        recipe_from_dict(recipe, "x.yaml")
    assert str(caught.value).startswith("x.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_missing_sections_are_named(missing: str) -> None:
    with pytest.raises(UserError, match=f"the key '{missing}' is missing"):
        recipe_from_dict({k: v for k, v in GOOD.items() if k != missing}, "x.yaml")


def test_frozen() -> None:
    recipe = recipe_from_dict(GOOD, "x")
    assert isinstance(recipe, Recipe)
    with pytest.raises(AttributeError):
        recipe.name = "y"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("model: {architecture: unet}\ndata: {dataset: toy}\nmodel: {architecture: fpn}", "model"),
        ("model: {architecture: unet}\ndata: {dataset: toy}\ntrain: {lr: 0.1, epochs: 2, lr: 0.2}", "lr"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"twice\.yaml: .*the key {key} stands twice"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["name: &a x\nmodel: *a", "a: &a [*a]"])
def test_aliases_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bomb\.yaml: .*the alias \*a: write out what it stands for"):
        load_recipe(path)


def test_the_file_name_names_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "street.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in GOOD.items() if k != "name"}))
    assert load_recipe(path).name == "street"


@pytest.mark.parametrize("share", [0, 1])
def test_ohem_is_a_share_between(share: int) -> None:
    from segdeconv.config import load_recipe
    from segdeconv.errors import UserError

    with pytest.raises(UserError, match=f"train.ohem = {share}: input should be (greater|less) than {share}"):
        load_recipe("demo", [f"train.ohem={share}"])

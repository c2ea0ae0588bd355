from __future__ import annotations

import copy
import os
import pickle
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from segdeconv import checkpoint, models
from segdeconv.checkpoint import (
    CheckpointInfo,
    build_for,
    build_started,
    check_same_recipe,
    copy_checkpoint,
    create_run_folder,
    find_checkpoint,
    load_checkpoint,
    read_info,
    save_checkpoint,
    start_from,
)
from segdeconv.config import ModelConfig, NetworkDeconvConfig, Recipe, load_recipe
from segdeconv.errors import UserError
from segdeconv.files import check_place, make_folder, sha256_of, to_json, write_atomically, write_text
from segdeconv.layers import WhitenedConv2d
from segdeconv.models import build_model

RECIPE = load_recipe("demo", ["model.encoder=lcnet_050", "model.network_deconv.block_size=4"])
CLASSES = ("a", "b", "c")


TWIN = replace(RECIPE, model=replace(RECIPE.model, norm="bn"))


def save(path: Path, recipe: Recipe) -> tuple[Path, torch.nn.Module]:
    model, _ = build_started(recipe.model, 3)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    info = CheckpointInfo(recipe, "segmentation", CLASSES, ((1, 2, 3),) * 3, 4, {"miou": 0.5})
    save_checkpoint(path, model, info)
    return path, model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    return save(tmp_path / "best.safetensors", RECIPE)


def test_round_trip(saved: tuple[Path, torch.nn.Module]) -> None:
    path, model = saved
    loaded, info = load_checkpoint(path.parent)
    assert not loaded.training
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.eval()(x))
    assert info == replace(read_info(path), sha256=sha256_of(path))
    assert (info.recipe, info.classes, info.epoch, info.scores) == (RECIPE, CLASSES, 4, {"miou": 0.5})
    for key, value in model.state_dict().items():  # running values and counters among them
        assert torch.equal(value, loaded.state_dict()[key]), key


def test_loaded_inside_inference_mode(saved: tuple[Path, torch.nn.Module]) -> None:
    with torch.inference_mode():
        model, _ = load_checkpoint(saved[0].parent)
    assert not any(value.is_inference() for value in model.state_dict().values())


def test_the_best_is_taken_before_the_last(saved: tuple[Path, torch.nn.Module]) -> None:
    path, _ = saved
    path.with_name("last.safetensors").write_bytes(path.read_bytes())
    assert find_checkpoint(path.parent) == path
    path.unlink()
    assert find_checkpoint(path.parent).name == "last.safetensors"


def test_truncated(saved: tuple[Path, torch.nn.Module]) -> None:
    path, _ = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"best.safetensors: not a safetensors file, or damaged"):
        load_checkpoint(path)


def test_not_ours(saved: tuple[Path, torch.nn.Module]) -> None:
    path, _ = saved
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint of segdeconv"):
        load_checkpoint(path)


def test_a_name_that_is_not_utf8(saved: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    moved = saved[0].rename(tmp_path / "run\udce9")
    with pytest.raises(UserError, match=r"run.*: safetensors takes no path that is not UTF-8; rename it"):
        load_checkpoint(moved)


def test_damaged_metadata(saved: tuple[Path, torch.nn.Module]) -> None:
    path, _ = saved
    save_file({"x": torch.zeros(1)}, path, {"format": "segdeconv/1", "recipe": "{"})
    with pytest.raises(UserError, match="metadata is damaged"):
        load_checkpoint(path)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path, _ = save(tmp_path / "twin.safetensors", TWIN)
    options = {**TWIN.model.options, "decoder_channels": [48, 32, 16]}
    other, _ = build_model(replace(TWIN.model, options=options), 3)
    says = r"holds a unet with 3 classes, whose weights do not fit the network: .* must be the same"
    with pytest.raises(UserError, match=says):
        start_from(other, path, 3)


def test_other_classes_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, model = save(tmp_path / "twin.safetensors", TWIN)
    other, _ = build_model(TWIN.model, 5)
    head = copy.deepcopy(other.segmentation_head.state_dict())
    start_from(other, path, 5)
    assert "3 classes; not taken from it: segmentation_head.0.weight" in " ".join(
        capsys.readouterr().out.split()
    )
    for name, value in other.state_dict().items():
        own = name.startswith("segmentation_head.")
        want = head[name.partition(".")[2]] if own else model.state_dict()[name]
        assert torch.equal(value, want), name


def test_a_wide_head_that_begins_anew_is_held_back(tmp_path: Path) -> None:
    """Though the run it begins with is from before wide heads were."""
    model = ModelConfig(architecture="mobilenet_v2", norm="nd")
    path, _ = save(tmp_path / "old.safetensors", replace(RECIPE, model=model))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    assert state.pop("classifier.1.gain") < 1
    save_file(state, path, metadata)
    same, _ = build_model(model, 3)
    start_from(same, path, 3)
    assert same.classifier[1].gain == 1
    other, _ = build_model(model, 5)
    start_from(other, path, 5)
    assert other.classifier[1].gain == pytest.approx((128 / 1280) ** 0.5)


def test_a_deconvolved_network_is_started_from(saved: tuple[Path, torch.nn.Module]) -> None:
    path, model = saved
    begun, _ = build_started(replace(RECIPE.model, init=str(path)), 5)
    head = "segmentation_head.0."
    for name, value in model.state_dict().items():
        mine = begun.state_dict()[name]
        if name in (head + "weight", head + "bias"):
            assert len(mine) == 5
        else:
            assert torch.equal(mine, value), name
    with pytest.raises(UserError, match=r"holds network deconvolution, .* or --norm nd"):
        build_started(replace(TWIN.model, init=str(path)), 3)
    other = replace(RECIPE.model, init=str(path), network_deconv=NetworkDeconvConfig(block_size=2))
    with pytest.raises(UserError, match=r"model\.network_deconv and model\.keep must be the same"):
        build_started(other, 3)
    other = replace(RECIPE.model, init=str(path), network_deconv=NetworkDeconvConfig(block_size=4, eps=0.01))
    with pytest.raises(UserError, match=r"eps = 1e-05, not 0\.01"):
        build_started(other, 3)


@pytest.mark.parametrize(("trained", "norm"), [("bn", "bn"), ("bn", "nd"), ("nd", "nd")])
def test_weights_that_init_takes_the_place_of_are_not_fetched(
    trained: str, norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = save(tmp_path / "trained.safetensors", RECIPE if trained == "nd" else TWIN)
    asked, call = [], models._call

    def spy(architecture: Any, encoder: str, classes: int, options: dict[str, Any], name: str) -> Any:
        asked.append(options.get("encoder_weights"))
        return call(architecture, encoder, classes, options, name)

    monkeypatch.setattr(models, "_call", spy)
    options = RECIPE.model.options | {"encoder_weights": "imagenet"}
    build_started(replace(RECIPE.model, norm=norm, init=str(path), options=options), 3)
    assert asked == [None]


def test_what_torchvision_changes_where_weights_are_asked_for_is_rebuilt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = torchvision.models.googlenet(init_weights=False)
    monkeypatch.setattr(
        torchvision.models.GoogLeNet_Weights, "get_state_dict", lambda *_, **__: trained.state_dict()
    )
    config = ModelConfig("googlenet", norm="bn", options={"weights": "DEFAULT"})
    begun, _ = build_started(config, 1000)
    rebuilt, _ = build_for(begun.state_dict(), config, 1000)
    rebuilt.load_state_dict(begun.state_dict())
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(x), begun.eval()(x))


@pytest.mark.parametrize("first", ["nd", "bn"])
def test_starts_in_a_row_where_batch_norms_come_first(first: str, tmp_path: Path) -> None:
    """From trained batch norms before their layers an affine stays; from deconvolution there is none to."""
    config = replace(RECIPE.model, architecture="cifar_preact_resnet18", encoder=None, options={})
    names, init = [], None
    for turn, norm in enumerate((first, "nd", "nd")):
        recipe = replace(RECIPE, model=replace(config, norm=norm, init=init))
        path, model = save(tmp_path / f"{turn}.safetensors", recipe)
        loaded, _ = load_checkpoint(path)
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[name]), name
        names.append(model.state_dict().keys())
        init = str(path)
    assert names[1] == names[2]
    assert (names[0] == names[1]) is (first == "nd")
    assert any(name.endswith("norm1.0.weight") for name in names[2]) is (first == "bn")


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("touch hostile-was-run",)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.safetensors"
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(UserError, match="not a safetensors file"):
        load_checkpoint(path)
    assert not (tmp_path / "hostile-was-run").exists()


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_means_and_variances_are_not_halved(mode: str, tmp_path: Path) -> None:
    layer = WhitenedConv2d(2048, 8, 3, config=NetworkDeconvConfig(mode=mode))
    kept = layer.running_moments if mode == "fast" else layer.running_mean
    assert kept.numel() >= 4096
    kept.fill_(1000.3)
    info = CheckpointInfo(RECIPE, "segmentation", CLASSES, ((1, 2, 3),) * 3, 4, {})
    save_checkpoint(tmp_path / "whole", layer, info)
    renamed = replace(RECIPE, name="renamed")
    copy_checkpoint(tmp_path / "whole", tmp_path / "half", renamed, half=True)
    assert read_info(tmp_path / "half") == replace(info, recipe=renamed)
    stored = load_file(tmp_path / "half")
    assert torch.equal(stored["running_moments" if mode == "fast" else "running_mean"], kept)
    assert stored["weight"].dtype == torch.float16


def test_equal_checkpoints_are_equal_files(tmp_path: Path) -> None:
    """Safetensors puts metadata into an order of chance."""
    layer = torch.nn.Linear(3, 2)
    info = CheckpointInfo(RECIPE, "segmentation", ("straße", "a/b"), ((1, 2, 3),) * 2, 4, {"miou": 0.5})
    for number in range(6):
        save_checkpoint(tmp_path / str(number), layer, info)
    assert len({sha256_of(path) for path in tmp_path.iterdir()}) == 1
    assert read_info(tmp_path / "0") == info
    assert torch.equal(load_file(tmp_path / "0")["weight"], layer.weight)


@pytest.mark.parametrize("below", ["", "inner/out"])
@pytest.mark.parametrize("place", ["file", "link"])
def test_folders_that_cannot_be_made(place: str, below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(UserError, match=r"; (remove it, or )?choose another place"):
        make_folder(tmp_path / place / below)


def test_a_file_in_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_place(tmp_path / "m.onnx")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(UserError, match=r"m\.onnx: .* cannot be written; choose another place"):
        check_place(tmp_path / "m.onnx")


def test_a_run_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As entries of the zoo name what they began with."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "best.safetensors").touch()
    assert find_checkpoint("~") == tmp_path / "best.safetensors"
    with pytest.raises(UserError, match="run '~nobody-at-all/x': there is no such home folder"):
        find_checkpoint("~nobody-at-all/x")


def test_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"file: cannot be written .*No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    longest = tmp_path / ("名" * 83 + ".png")
    write_atomically(longest, lambda temporary: temporary.write_text("whole"))
    assert longest.read_text() == "whole"
    for nowhere in (path / "in a file", tmp_path / ("long" * 100)):
        with pytest.raises(UserError, match="cannot be written"):
            write_atomically(nowhere, lambda temporary: temporary.write_text("whole"))


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_file_is_written(there: bool, tmp_path: Path) -> None:
    link, file = tmp_path / "link.json", tmp_path / "elsewhere" / "file"
    link.symlink_to(file)
    with pytest.raises(UserError, match=r"link\.json: there is no folder .*elsewhere to write into"):
        check_place(link)
    file.parent.mkdir()
    check_place(link)
    if there:
        file.write_text("old")
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert len(list(tmp_path.rglob("*"))) == 3


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    """As devices are, which only root could replace."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "new")
    assert os.read(reader, 9) == b"new"
    os.close(reader)
    assert pipe.is_fifo()


def test_standard_output_may_be_a_file(tmp_path: Path) -> None:
    code = "from segdeconv.files import *; print('table', flush=True); write_text(Path('/dev/fd/1'), 'more')"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "table\nmore"


def test_files_are_as_the_umask_has_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda temporary: temporary.touch(0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_json_has_no_nan() -> None:
    assert to_json({"a": [float("nan"), 1.5], "b": float("inf")}) == '{"a": [null, 1.5], "b": null}'


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("metrics.jsonl", "holds a run without its state"),
        ("state.previous.safetensors", "holds a run already"),
    ],
)
def test_a_run_is_never_overwritten(file: str, says: str, tmp_path: Path) -> None:
    create_run_folder(tmp_path / "run", RECIPE)
    (tmp_path / "run" / file).write_text("{}")
    with pytest.raises(UserError, match=says):
        create_run_folder(tmp_path / "run", RECIPE)


@pytest.mark.parametrize(
    ("begun", "now", "says"),
    [
        ({"decoder_channels": [8, 4]}, {}, r"options.decoder_channels = \[8, 4\], now it is not set"),
        ({}, {"decoder_channels": [8, 4]}, r"options.decoder_channels = not set, now it is \[8, 4\]"),
    ],
)
def test_resuming_with_an_option_more_or_less(begun: dict, now: dict, says: str, tmp_path: Path) -> None:
    def recipe(options: dict) -> Recipe:
        return replace(RECIPE, model=replace(RECIPE.model, options={"encoder_depth": 2, **options}))

    create_run_folder(tmp_path, recipe(begun))
    check_same_recipe(tmp_path, replace(recipe(begun), data=replace(RECIPE.data, num_workers=7)))
    with pytest.raises(UserError, match=says):
        check_same_recipe(tmp_path, recipe(now))


def test_what_half_precision_cannot_hold_stays_whole(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 64)
    layer.weight.data[0, 0] = 1e5
    info = CheckpointInfo(RECIPE, "segmentation", CLASSES, ((1, 2, 3),) * 3, 4, {})
    save_checkpoint(tmp_path / "whole", layer, info)
    copy_checkpoint(tmp_path / "whole", tmp_path / "half", RECIPE, half=True)
    assert torch.equal(load_file(tmp_path / "half")["weight"], layer.weight)


def test_a_checkpoint_that_training_replaces_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata, weights and hash are of one file."""
    path, _ = save(tmp_path / "best.safetensors", RECIPE)
    newer, model = save(tmp_path / "newer.safetensors", RECIPE)
    read = checkpoint.read_weights

    def replaced(at: Path) -> dict[str, torch.Tensor]:
        state = read(at)
        if newer.exists():
            os.replace(newer, path)
        return state

    monkeypatch.setattr(checkpoint, "read_weights", replaced)
    loaded, info = load_checkpoint(path)
    assert info.sha256 == checkpoint.sha256_of(path)
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="this system syncs no folders")
def test_a_file_and_its_name_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_text(tmp_path / "file", "whole")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]

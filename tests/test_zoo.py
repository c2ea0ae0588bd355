"""The zoo: what its entries claim is so; how they are made, found, checked, published and installed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHARED_DATA, Call
from PIL import Image
from safetensors.torch import load_file
from test_checkpoint import Hostile
from test_train import tiny

import segdeconv
from segdeconv import entries
from segdeconv.checkpoint import CheckpointInfo, build_started, find_checkpoint, load_checkpoint, read_info
from segdeconv.config import load_recipe
from segdeconv.entries import (
    WEIGHTS,
    card,
    entry_json,
    entry_names,
    find_weights,
    measured,
    read_entry,
    zoo_folder,
)
from segdeconv.errors import UserError
from segdeconv.evaluate import evaluate_run, write_scores
from segdeconv.export import export_onnx
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import build_model
from segdeconv.train import train
from segdeconv.zoo import (
    Origin,
    _card,
    _without_home,
    add,
    count_gflops,
    count_parameters,
    default_name,
    publish,
    verify,
)

ROOT = Path(__file__).resolve().parents[1]
NAME = "unet_lcnet_050.nd_toy"
TWIN = "unet_lcnet_050.bn_toy"
HEADINGS = (
    "## Data",
    "Licence:",
    "## Reproduce",
    "segdeconv train",
    "minutes on",
    "## Classes",
    "## Known failures",
)


# What lies under zoo/.


@pytest.fixture
def torch_model(name: str) -> torch.nn.Module:
    info = read_info(find_weights(name))
    return build_model(info.recipe.model, len(info.classes), pretrained=False)[0].eval()


def test_there_is_a_zoo() -> None:
    assert entry_names()
    assert {path.name for path in zoo_folder().iterdir() if path.is_dir()} == set(entry_names())
    total = sum(path.stat().st_size for path in zoo_folder().rglob("*") if path.is_file())
    assert total < 100e6


@pytest.mark.parametrize("name", entry_names())
def test_an_entry_is_what_it_says(name: str, torch_model: torch.nn.Module) -> None:
    folder, entry, scores = zoo_folder() / name, read_entry(name), measured(name)
    assert entry.name == name
    if (folder / WEIGHTS).exists():
        content = (folder / WEIGHTS).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.bytes, entry.sha256)
        info = read_info(folder / WEIGHTS)
        assert load_recipe(folder / "recipe.yaml") == info.recipe
        assert (info.task, info.epoch) == (entry.task, scores["epoch"])
    else:
        assert entry.urls
    recipe = load_recipe(folder / "recipe.yaml")
    network = default_name(recipe).partition(".")[0]
    width = r"(w\d+)?"  # of the first stage, where that is not the encoder's own
    assert re.fullmatch(rf"{re.escape(network)}{width}\.{recipe.model.norm}_{entry.dataset}", name)
    assert (recipe.model.norm, recipe.train.seed) == (entry.norm, scores["seed"])
    assert entry.parameters == count_parameters(torch_model)
    assert entry.gflops == pytest.approx(count_gflops(torch_model, entry.input), rel=1e-6)
    assert 0 < scores[MAIN_METRIC[entry.task]] <= 1
    text = card(name)
    assert all(heading in text for heading in HEADINGS)
    precision = {"off": "float32", "bf16": "bfloat16"}[recipe.train.amp]
    for fact in (
        f"{scores[MAIN_METRIC[entry.task]]:.4f}",
        f"| learning rate | {recipe.train.lr:g} |",
        f"{recipe.train.epochs} epochs in {precision}",
        f"of epoch {scores['epoch']}",
    ):
        assert fact in text
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", text)
    Image.open(folder / picture).verify()


@pytest.mark.slow
@pytest.mark.parametrize("name", entry_names())
def test_an_entrys_graph_gives_its_metric(name: str, tmp_path: Path) -> None:
    """Exported, and evaluated with onnxruntime on all pictures that the entry was measured on."""
    own = load_recipe(zoo_folder() / name / "recipe.yaml").data.root
    places = [ROOT / own, SHARED_DATA / Path(own).name] if own else [None]
    root = next((place for place in places if place is None or place.is_dir()), "")
    if root == "":
        pytest.skip(f"{own} is not here")
    model, info = load_checkpoint(name)
    export_onnx(model, info, tmp_path / "model.onnx")
    scores = evaluate_run(name, onnx=tmp_path / "model.onnx", root=str(root) if root else None)
    metric = MAIN_METRIC[info.task]
    assert scores[metric] == pytest.approx(measured(name)[metric], abs=2e-4)


def test_the_table_of_the_readme_is_fresh() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "zoo_table.py"))
    text = (ROOT / "README.md").read_text()
    assert tool["BEGIN"] in text
    assert tool["END"] in text
    assert tool["with_table"](text) == text, "run: python tools/zoo_table.py"


# Made here: both twins of a tiny network.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for norm in ("nd", "bn"):
        train(tiny(f"model.norm={norm}", "train.epochs=1"), folder / norm)
        write_scores(folder / norm, evaluate_run(folder / norm))
    return folder


@pytest.fixture(scope="module")
def made(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo of both twins, as `zoo add` makes it."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("segdeconv.entries.zoo_folder", lambda: folder)
        patch.setattr("segdeconv.zoo.zoo_folder", lambda: folder)
        add(runs / "nd", half=True, origin=Origin(machine="a loom", notes=["It sees ghosts."]))
        add(runs / "bn")
    return folder


@pytest.fixture
def zoo(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that zoo, and a cache of its own."""
    folder = tmp_path / "zoo"
    shutil.copytree(made, folder)
    for module in ("entries", "zoo"):
        monkeypatch.setattr(f"segdeconv.{module}.zoo_folder", lambda: folder)
    monkeypatch.setenv("SEGDECONV_CACHE", str(tmp_path / "cache"))
    for name in ("SEGDECONV_ZOO_URL", "SEGDECONV_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


def change(zoo: Path, name: str, **values: object) -> None:
    entry = dataclasses.replace(read_entry(name), **values)
    (zoo / name / "entry.json").write_text(entry_json(entry))


def move_weights(zoo: Path, name: str, target: Path) -> str:
    """Weights lie elsewhere, as those too large to commit do; their address."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(zoo / name / WEIGHTS, target)
    return target.as_uri()


def test_what_add_makes(zoo: Path, runs: Path) -> None:
    assert entry_names() == [TWIN, NAME]
    entry, twin = read_entry(NAME), read_entry(TWIN)
    assert (entry.storage, twin.storage) == ("float16", "float32")
    assert entry.gflops == twin.gflops
    assert entry.input == (32, 64)
    stored, trained = load_file(zoo / NAME / WEIGHTS), load_file(runs / "nd" / "best.safetensors")
    assert stored.keys() == trained.keys()
    for key, value in trained.items():
        if value.numel() >= 4096 and value.is_floating_point():
            assert torch.equal(stored[key], value.half()), key
        else:
            assert torch.equal(stored[key], value), key
    text = card(NAME)
    assert all(
        part in text for part in ("a loom", "It sees ghosts.", "drawn by this package", TWIN, *HEADINGS)
    )
    picture = Image.open(zoo / NAME / "overlay.jpg")
    assert (picture.width, picture.height > 32) == (320, True)  # the classes' colours are below
    assert not [path for path in zoo.iterdir() if path.name.startswith(".")]


def test_an_entry_does_not_name_its_authors_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    for root, public in (("/home/ada/data/x", "~/data/x"), ("/data/x", "/data/x"), (None, None)):
        data = dataclasses.replace(tiny().data, root=root)
        model = dataclasses.replace(tiny().model, init=root)
        recipe = _without_home(dataclasses.replace(tiny(), data=data, model=model))
        assert recipe.data.root == recipe.model.init == public
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as of a user without a home
    assert _without_home(tiny("data.root=/data/x")).data.root == "/data/x"


def test_metrics_are_of_what_is_stored(zoo: Path) -> None:
    again = evaluate_run(zoo / NAME / WEIGHTS)
    assert json.loads(json.dumps(again["confusion"])) == measured(NAME)["confusion"]
    assert measured(NAME)["seed"] == 0


def test_a_name_is_good_wherever_a_run_is(zoo: Path, runs: Path) -> None:
    assert find_checkpoint(TWIN) == find_checkpoint(zoo / TWIN) == zoo / TWIN / WEIGHTS
    model = segdeconv.load(TWIN)
    expected, info = load_checkpoint(runs / "bn")
    x = torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert not model.training
    recipe = tiny(f"model.init={TWIN}")
    begun, _ = build_started(recipe.model, len(info.classes))  # the twin's weights, converted
    assert sum(p.numel() for p in begun.parameters()) == read_entry(NAME).parameters
    twin = segdeconv.load(TWIN)
    with torch.no_grad():
        torch.testing.assert_close(begun.eval()(x), twin(x), rtol=0, atol=1e-5 * twin(x).abs().max().item())


def test_a_card_names_a_class_that_does_not_occur(zoo: Path, runs: Path) -> None:
    scores = evaluate_run(runs / "nd")
    scores["iou"] |= {"person": math.nan}
    info = read_info(runs / "nd" / "best.safetensors")
    drawn = Origin("drawn", "a loom")
    text = _card(read_entry(NAME), info, scores, scores, 60.0, drawn, "overlay.jpg")
    assert "nan" not in text
    assert "trained from scratch." in text
    assert re.search(r"\d person\b(?! \()", text)
    assert re.search(r"\d road \(0\.\d{3}\)", text)
    named = dataclasses.replace(info, classes=("a|b", "<i>", *info.classes[2:]))
    text = _card(read_entry(NAME), named, scores, scores, 60.0, drawn, "overlay.jpg")
    assert r"0 a\|b, 1 \<i\>, 2 " in text
    info.recipe.model.options["pretrained"] = True
    text = _card(read_entry(NAME), info, scores, scores, 60.0, drawn, "overlay.jpg")
    assert "trained from pretrained weights." in text


def test_a_run_folder_goes_before_an_entry_of_its_name(zoo: Path, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bn", tmp_path / NAME)
    assert find_checkpoint(NAME) == Path(NAME) / "best.safetensors"


def test_the_commands(zoo: Path, call: Call, tmp_path: Path) -> None:
    code, out, _ = call("zoo", "list", "--sort", "miou", "--task", "segmentation")
    assert code == 0
    better, worse = sorted((NAME, TWIN), key=lambda name: -measured(name)["miou"])
    assert 0 < out.index(better) < out.index(worse)
    code, _, error = call("zoo", "list", "--dataset", "camvidd")
    assert (code, "no entry of 'camvidd'; its data sets are toy" in error) == (2, True)
    shown, known = (
        text.partition("Known failures")[2] for text in (call("zoo", "info", NAME)[1], card(NAME))
    )
    words = re.findall(r"[\w.]+", known)
    assert re.findall(r"[\w.]+", shown)[: len(words)] == words
    assert call("zoo", "download", NAME)[1].strip() == str(zoo / NAME / WEIGHTS)
    code, out, _ = call("zoo", "verify", NAME, "--device", "cpu")
    assert code == 0
    assert f"miou {measured(NAME)['miou']:.4f} here" in out
    assert call("eval", NAME, "--device", "cpu")[0] == 0
    assert json.loads((tmp_path / "runs" / NAME / "eval.json").read_text())["miou"] == measured(NAME)["miou"]
    before = sorted((zoo / NAME).iterdir())
    assert call("eval", zoo / NAME, "--device", "cpu")[0] == 0
    assert sorted((zoo / NAME).iterdir()) == before  # photographs and masks are not to be published
    code, out, _ = call("train", NAME, "--dry-run", "--device", "cpu")
    assert code == 0
    assert "step 2: loss" in out
    code, out, _ = call("zoo", "publish", "--to", tmp_path / "www", NAME)
    assert code == 0
    assert f"www/{NAME}/{WEIGHTS}" in out


def test_training_an_entry_or_from_one(zoo: Path, call: Call, tmp_path: Path) -> None:
    """Into a folder of its own, as many entries are of one recipe; or with its network and weights."""
    few = ("--set", "data.count=[8, 2]", "--set", "train.epochs=1", "--device", "cpu")
    assert call("train", NAME, "--norm", "bn", *few)[0] == 0
    assert (tmp_path / "runs" / TWIN / "best.safetensors").exists()
    for name, norm in ((TWIN, "nd"), (NAME, "nd"), (TWIN, "bn")):
        code, _, error = call("train", "toy_unet_resnet18", "--init", name, "--norm", norm, "--dry-run", *few)
        assert (code, error) == (0, ""), (name, norm)
    code, _, error = call("train", "toy_unet_resnet18", "--init", NAME, "--norm", "bn", "--dry-run", *few)
    assert (code, "batch norm cannot start from" in error) == (2, True)


def test_predict_exports_an_entry(
    zoo: Path,
    runs: Path,
    call: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The export itself, which takes long, is tested in test_cli.py."""
    exported = []

    def export(model: torch.nn.Module, info: CheckpointInfo, path: Path) -> None:
        exported.append(info)
        assert not model.training
        path.write_bytes(b"no graph")

    monkeypatch.setattr("segdeconv.export.export_onnx", export)
    Image.new("RGB", (70, 40)).save(tmp_path / "photo.png")
    code, _, error = call("predict", NAME, "photo.png", "--device", "cpu")
    assert code == 2
    assert "onnxruntime cannot load it" in error
    (info,) = exported
    assert dataclasses.replace(info, sha256=None) == read_info(runs / "nd" / "best.safetensors")
    assert info.sha256 == read_entry(NAME).sha256


# Where weights come from.


def test_a_mirror_laid_out_by_publish(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(str(tmp_path / "www"))
    entry = read_entry(NAME)
    (zoo / NAME / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"is missing and its entry has no urls; .* SEGDECONV_ZOO_URL"):
        find_weights(NAME)
    for address in ("www", str(tmp_path / "www"), (tmp_path / "www").as_uri() + "/"):
        monkeypatch.setenv("SEGDECONV_ZOO_URL", address)
        path = find_weights(NAME)
        assert path.parent == tmp_path / "cache" / "zoo"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry.sha256
        path.unlink()
    assert (tmp_path / "www" / NAME / "entry.json").read_text() == entry_json(entry)


def test_urls_are_tried_in_order(zoo: Path, tmp_path: Path) -> None:
    url = move_weights(zoo, NAME, tmp_path / "far" / "a.safetensors")
    change(zoo, NAME, urls=("file:///nowhere/a", url))
    load_checkpoint(NAME)
    publish(str(tmp_path / "www"), [NAME])  # also of weights that are not committed
    assert (tmp_path / "www" / NAME / WEIGHTS).stat().st_size == read_entry(NAME).bytes


def test_damaged_own_weights(zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = move_weights(zoo, NAME, tmp_path / "a.safetensors")
    (zoo / NAME / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"is not the file that entry\.json names"):
        find_weights(NAME)
    change(zoo, NAME, urls=(url,))
    load_checkpoint(NAME)
    assert "trying elsewhere" in capsys.readouterr().err


def test_downloaded_pickles_are_not_run(zoo: Path, tmp_path: Path) -> None:
    evil = pickle.dumps(Hostile())
    (tmp_path / "evil").write_bytes(evil)
    (zoo / NAME / WEIGHTS).unlink()
    sha256 = hashlib.sha256(evil).hexdigest()
    change(zoo, NAME, urls=((tmp_path / "evil").as_uri(),), bytes=len(evil), sha256=sha256)
    with pytest.raises(UserError, match="not a safetensors file"):
        segdeconv.load(NAME)
    assert not (tmp_path / "hostile-was-run").exists()


# What is refused.


def test_verify_finds_a_false_claim(zoo: Path) -> None:
    assert verify(NAME).again == measured(NAME)["miou"]
    scores = measured(NAME)
    (zoo / NAME / "metrics.json").write_text(json.dumps(scores | {"miou": scores["miou"] + 0.01}))
    with pytest.raises(UserError, match=r"miou is 0\.\d+ here, but the entry says"):
        verify(NAME)
    change(zoo, NAME, parameters=7)
    with pytest.raises(UserError, match=r"entry\.json says 7"):
        verify(NAME)


def test_verify_without_the_data(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise UserError("data/toy: no such folder")

    monkeypatch.setattr("segdeconv.zoo.open_samples", missing)
    verdict = verify(NAME)
    assert (verdict.again, verdict.reason) == (None, "data/toy: no such folder")
    with pytest.raises(UserError, match="data/toy"):
        verify(NAME, root="data/toy")


BAD_RUNS = {
    "no checkpoint": (lambda run: (run / "best.safetensors").unlink(), {}, "has no best.safetensors"),
    "not evaluated": (lambda run: (run / "eval.json").unlink(), {}, "has no eval.json; first segdeconv eval"),
    "not finished": (lambda run: (run / "metrics.jsonl").write_text(""), {}, "is not finished"),
    "evaluated before": (lambda run: edit(run / "eval.json", epoch=0), {}, "not of this checkpoint"),
    "another split": (lambda run: edit(run / "eval.json", split="train"), {}, "is of the split 'train'"),
    "eval.json damaged": (lambda run: (run / "eval.json").write_text("{"), {}, "not readable as JSON"),
    "there already": (lambda run: None, {"name": NAME}, "there is such an entry"),
    "no name": (lambda run: None, {"name": "../../x.nd_toy"}, "expected ARCH_ENCODER.nd_DATASET"),
    "name of the twin": (lambda run: None, {"name": "x.bn_toy"}, "says bn, but the run's model.norm is nd"),
    "unknown data": (lambda run: None, {"name": "x.nd_photos"}, "--data is missing"),
    "other data": (lambda run: None, {"name": "x.nd_camvid"}, "but the run's data.dataset is toy"),
    "averaged": (lambda run: edit(run / "eval.json", settings={"flip": True}), {}, "averaged over mirror"),
    "no split": (lambda run: edit(run / "eval.json", split=None), {}, "not as segdeconv eval writes it"),
    "no score": (lambda run: edit(run / "eval.json", miou=None), {}, "not as segdeconv eval writes it"),
    "no settings": (lambda run: edit(run / "eval.json", settings=[]), {}, "not as segdeconv eval writes it"),
}  # fmt: skip


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("case", BAD_RUNS)
def test_runs_that_make_no_entry(zoo: Path, runs: Path, tmp_path: Path, case: str) -> None:
    spoil, options, message = BAD_RUNS[case]
    run = tmp_path / "run"
    shutil.copytree(runs / "nd", run)
    spoil(run)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        add(run, **{"name": "new.nd_toy", **options})
    assert "\n" not in str(error.value)
    assert entry_names() == [TWIN, NAME]


def test_nothing_is_added_to_an_installed_package(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segdeconv.zoo.zoo_folder", lambda: tmp_path / "zoo_entries")
    with pytest.raises(UserError, match="the zoo lies in an installed package"):
        add(runs / "nd")
    assert not list(tmp_path.iterdir())


def test_an_entry_that_cannot_be_measured_is_not_made(
    zoo: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise UserError("data/toy: no such folder")

    monkeypatch.setattr("segdeconv.zoo.evaluate_run", missing)
    with pytest.raises(UserError, match="measured on what is stored, which failed: data/toy: no such folder"):
        add(runs / "nd", "new.nd_toy", half=True)
    assert {path.name for path in zoo.iterdir()} == {NAME, TWIN}


def test_an_entry_that_another_process_adds_meanwhile(
    zoo: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quicker(*arguments: Any, **options: Any) -> dict[str, Any]:
        shutil.copytree(zoo / NAME, zoo / "new.nd_toy")
        return evaluate_run(*arguments, **options)

    for killed, age in ((".adding.old", 90_000), (".adding.young", 60)):
        (zoo / killed / "new.nd_toy").mkdir(parents=True)
        os.utime(zoo / killed, (time.time() - age,) * 2)
    monkeypatch.setattr("segdeconv.zoo.evaluate_run", quicker)
    with pytest.raises(UserError, match=r"new\.nd_toy: there is such an entry; remove it first, or choose"):
        add(runs / "nd", "new.nd_toy", half=True)
    assert {path.name for path in zoo.iterdir()} == {NAME, TWIN, "new.nd_toy", ".adding.young"}


def test_names_that_are_none(zoo: Path, call: Call) -> None:
    for asked in (read_entry, find_checkpoint):
        with pytest.raises(UserError, match=rf"did you mean '{re.escape(NAME)}'\?"):
            asked("UNet_LCNet_50.nd_toy")
    code, _, error = call("zoo", "info", "nothing")
    assert code == 2
    assert "no entry of the zoo is called 'nothing'" in error
    (zoo / NAME / "entry.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"entry\.json: not an entry of the zoo \("):
        read_entry(NAME)


@pytest.mark.parametrize("to", ["", "https://example.org/zoo", "hf:/a/b", "hf://alone", "hf://a/b/c"])
def test_places_that_cannot_be_published_to(zoo: Path, to: str) -> None:
    with pytest.raises(UserError, match="expected"):
        publish(to)


def test_homes_of_nobody(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGDECONV_ZOO_URL", "~nobody$/zoo")
    with pytest.raises(UserError, match=r"^SEGDECONV_ZOO_URL '~nobody\$/zoo': there is no such home folder"):
        find_weights(NAME)
    monkeypatch.delenv("SEGDECONV_ZOO_URL")
    with pytest.raises(UserError, match=r"^--to '~nobody\$/zoo': there is no such home folder; write"):
        publish("~nobody$/zoo")


def test_publishing_looks_before_it_writes(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"no entry of the zoo is called '\.\./wrong'"):
        publish("www", [NAME, "../wrong"])
    assert {path.name for path in tmp_path.iterdir()} == {"zoo"}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    publish("~/www", [NAME])
    assert (tmp_path / "home" / "www" / NAME / WEIGHTS).exists()
    monkeypatch.setenv("SEGDECONV_OFFLINE", "1")
    with pytest.raises(UserError, match="SEGDECONV_OFFLINE or HF_HUB_OFFLINE forbids"):
        publish("hf://me/zoo", [NAME])


def test_publishing_to_the_hub(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, list[str]] = {}

    class Api:
        def create_repo(self, repository: str, exist_ok: bool) -> None:
            assert exist_ok

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
            pushed[repo_id] = sorted(str(path.relative_to(folder_path)) for path in files)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    publish("hf://me/zoo", [NAME])
    names = ("card.md", "entry.json", "metrics.json", WEIGHTS, "overlay.jpg", "recipe.yaml")
    assert pushed == {"me/zoo": [f"{NAME}/{name}" for name in names]}
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("401\nwho?")))
    with pytest.raises(UserError, match=r"the hub refused \(401 who\?\)"):
        publish("hf://me/zoo")


# The wheel.


def test_an_installed_wheel_lists_the_zoo(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("segdeconv", "zoo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True)
    modules = {path.relative_to(source) for path in (source / "segdeconv").rglob("*.py")}
    assert {path.relative_to(site) for path in (site / "segdeconv").rglob("*.py")} == modules
    environment = {**os.environ, "PYTHONPATH": str(site), "SEGDECONV_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "segdeconv", "zoo", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    names, listing = entry_names(), run("list")
    assert re.findall(r"[\w-]+\.(?:nd|bn)_\w+", listing) == names
    assert run("download", names[0]).strip() == str(site / "segdeconv" / "zoo_entries" / names[0] / WEIGHTS)
    assert entries.zoo_folder() == ROOT / "zoo"


def test_own_weights_of_the_same_length_are_hashed(zoo: Path) -> None:
    path = zoo / NAME / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is not the file that entry\.json names"):
        find_weights(NAME)


def test_a_mirror_is_asked_first(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = move_weights(zoo, NAME, tmp_path / "www" / NAME / WEIGHTS)
    change(zoo, NAME, urls=(url,))
    asked = []
    fetch = lambda target, sources, *_: asked.extend(sources) or target  # noqa: E731
    monkeypatch.setattr("segdeconv.entries.fetch", fetch)
    monkeypatch.setenv("SEGDECONV_ZOO_URL", "https://mirror.example/zoo/")
    find_weights(NAME)
    assert asked == [f"https://mirror.example/zoo/{NAME}/{WEIGHTS}", url]

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import multiprocessing
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from networks import scramble_batch_norms
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segdeconv import layers, models
from segdeconv import train as train_module
from segdeconv import trainer as trainer_module
from segdeconv.checkpoint import (
    build_started,
    create_run_folder,
    load_checkpoint,
    read_info,
    save_checkpoint,
    save_state,
)
from segdeconv.config import Recipe, TrainConfig, load_recipe
from segdeconv.data import open_samples, train_loader
from segdeconv.errors import UserError
from segdeconv.evaluate import evaluate_run, table, write_scores
from segdeconv.export import export_onnx
from segdeconv.interface import Interface
from segdeconv.layers import Whitened
from segdeconv.losses import loss_of
from segdeconv.progress import Bar
from segdeconv.train import _Run, dry_run, pick_device, train
from segdeconv.trainer import Trainer, first_bad_layer, lr_factor, make_optimizer, seed_everything

TINY = [
    "model.encoder=lcnet_050",
    "model.options={encoder_depth: 3, decoder_channels: [16, 16, 8]}",
    "model.network_deconv.block_size=8",
    "data.size=[32, 64]",
    "data.count=[12, 4]",
    "train.batch_size=4",
    "train.epochs=2",
    "train.eval_every=1",
]


def tiny(*changes: str) -> Recipe:
    return load_recipe("demo", [*TINY, *changes])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(99)  # what came before must not matter
    train(tiny(), out)
    return out


def test_a_run_leaves_what_it_promises(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    files = (
        "recipe.yaml conversion.txt metrics.jsonl last.safetensors best.safetensors curves.png tensorboard "
        "state.safetensors state.previous.safetensors .lock"
    )
    assert names == set(files.split())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all({"loss", "lr", "seconds", "miou", "pixel_acc"} <= set(line) for line in lines)
    assert Image.open(run / "curves.png").size[0] > 800
    assert list((run / "tensorboard").iterdir())
    assert load_recipe(run / "recipe.yaml") == tiny()
    report = (run / "conversion.txt").read_text()
    assert "swapped segmentation_head.0" in report


@pytest.mark.parametrize(
    ("changes", "device", "missing"),
    [
        ((), "cuda", "train.compile=true and train.cuda_graphs=true"),
        (("train.compile=true",), "cuda", "train.cuda_graphs=true"),
        (("train.compile=true", "train.cuda_graphs=true"), "cuda", None),
        (("model.norm=bn",), "cuda", None),
        (("model.network_deconv.mode=exact",), "cuda", None),
        ((), "cpu", None),
    ],
)
def test_what_would_make_it_fast_on_a_gpu_is_said(
    changes: tuple[str, ...], device: str, missing: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_module._prepare(tiny(*changes), torch.device("cpu"))
    run.device = torch.device(device)
    train_module._announce(run)
    said = re.search(r"batch norm's\s+speed\s+with\s+(.*)", capsys.readouterr().out, re.DOTALL)
    assert (" ".join(said[1].split()) if said else None) == missing


def test_the_progress_shows_how_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = []

    class Noted(Bar[Any]):
        def __iter__(self) -> Iterator[Any]:
            for item in self.items:
                yield item
                notes.append(self.note)

    monkeypatch.setattr(train_module, "Bar", Noted)
    train(tiny("train.epochs=1"), tmp_path / "run")
    assert len(notes) == 3
    for note in notes:
        assert re.fullmatch(r"loss \d\.\d{4}, lr 0\.\d+, \d+\.\d images/s, \d+ MiB", note)


def test_a_graph_of_another_fixed_size(run: Path, tmp_path: Path) -> None:
    model, info = load_checkpoint(run)
    export_onnx(model, info, tmp_path / "m.onnx", Interface(static=(1, 64, 64)))
    with pytest.raises(UserError, match=r"m.onnx: takes pictures of \(64, 64\) only, these are \(32, 64\)"):
        evaluate_run(run, onnx=tmp_path / "m.onnx")


def test_a_seed_gives_the_same_run(run: Path, tmp_path: Path) -> None:
    train(tiny(), tmp_path / "again")
    first, again = (load_file(path / "last.safetensors") for path in (run, tmp_path / "again"))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    other = train(tiny("train.seed=1", "train.epochs=1"), tmp_path / "other")
    assert other["loss"] != json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_evaluation_repeats_what_training_logged(run: Path, tmp_path: Path) -> None:
    scores = evaluate_run(run)
    write_scores(tmp_path, scores)  # other tests may look into the run's own folder after this one
    logged = max(json.loads(line)["miou"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert scores["miou"] == logged
    written = json.loads((tmp_path / "eval.json").read_text())
    assert written["miou"] == logged
    assert written["samples"] == 4
    assert np.array(written["confusion"]).sum() == 4 * 32 * 64
    assert table(scores, "segmentation").row_count == 8 + 3


@pytest.mark.parametrize(
    "changes",
    [
        ["model.norm=bn"],
        ["train.optimizer=adamw", "train.lr=0.001", "train.schedule=poly", "train.amp=bf16"],
        ["model.network_deconv.mode=reference", "train.amp=fp16"],
        # At the demo's rate it is so wild after three steps that rounding turns a pixel.
        [
            "model.architecture=lraspp_mobilenet_v3_large",
            "model.encoder=null",
            "model.options={}",
            "train.lr=0.01",
        ],
    ],
)
def test_other_roads(changes: list[str], tmp_path: Path) -> None:
    line = train(tiny("train.epochs=1", *changes), tmp_path / "run")
    assert math.isfinite(line["loss"])
    assert evaluate_run(tmp_path / "run")["miou"] == line["miou"]  # in the same precision


def test_auxiliary_head(tmp_path: Path) -> None:
    changes = ["model.architecture=deeplabv3_mobilenet_v3_large", "model.encoder=null", "model.options={}"]
    train(tiny("train.epochs=1", *changes), tmp_path / "run")
    model, _ = load_checkpoint(tmp_path / "run")
    assert set(model(torch.zeros(1, 3, 64, 64))) == {"out", "aux"}


def test_classification(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name, level in (("dark", 60), ("light\udce9", 190)):  # not every file's name is UTF-8
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                picture = rng.normal(level, 20, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / split / name / f"{i}.png")
    recipe = load_recipe(
        "cifar10_resnet18",
        [f"data.root={tmp_path}", "train.batch_size=4", "train.epochs=2", "model.network_deconv.block_size=8",
         "model.architecture=mobilenetv3_small_050", "train.lr=0.02"],
    )  # fmt: skip
    train(recipe, tmp_path / "run")
    best = max(
        json.loads(line)["top1"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    )
    assert evaluate_run(tmp_path / "run")["top1"] == best
    assert table(evaluate_run(tmp_path / "run"), "classification").row_count == 3


def test_a_run_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.*: safetensors takes no path that is not UTF-8; rename it"):
        train(tiny(), tmp_path / "run\udce9")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"cannot be locked \(.*\.lock.*choose another --out"):
        train(tiny(), tmp_path)


def test_warm_start_from_the_batch_norm_twin(tmp_path: Path) -> None:
    """A deconvolved run with init starts from the twin's function, whatever became of the twin."""
    train(tiny("model.norm=bn"), tmp_path / "bn")
    twin = evaluate_run(tmp_path / "bn")["miou"]
    changes = [f"model.init={tmp_path / 'bn'}", "train.epochs=1", "train.lr=1.0e-12"]
    train(tiny(*changes), tmp_path / "nd")
    shutil.rmtree(tmp_path / "bn")
    model, _ = load_checkpoint(tmp_path / "nd")
    assert any(isinstance(m, Whitened) for m in model.modules())
    assert evaluate_run(tmp_path / "nd")["miou"] == pytest.approx(twin, abs=0.005)  # 0.026 apart without


@pytest.mark.parametrize("keep", [(), ("encoder",)])
def test_a_pretrained_encoder_keeps_its_function(
    keep: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The decoder, which is new, starts as in a run from scratch."""
    call, made = models._call, []

    def pretrained(*args: Any) -> torch.nn.Module:
        options = dict(args[3])
        assert options.pop("encoder_weights") == "imagenet"
        made.append(scramble_batch_norms(call(*args[:3], options, args[4])))
        return copy.deepcopy(made[0])

    monkeypatch.setattr(models, "_call", pretrained)
    recipe = tiny("data.mean=[0.4, 0.4, 0.4]")
    options = recipe.model.options | {"encoder_weights": "imagenet"}
    run = train_module._prepare(
        dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options=options, keep=keep)),
        torch.device("cpu"),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "know pictures of data.mean = [0.485, 0.456, 0.406] and data.std" in said
    run.out = tmp_path
    create_run_folder(tmp_path, run.recipe)
    run._begin()
    model, x = run.trainer.model.eval(), next(iter(run.loader))[0]
    with torch.no_grad():
        for a, b in zip(model.encoder(x), made[0].eval().encoder(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    new = [module for module in model.decoder.modules() if isinstance(module, Whitened)]
    assert len(new) == 6
    assert not any(module.num_batches_tracked for module in new)
    for module in new:
        norms = module.weight.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_a_deconvolved_run_goes_on_with_other_data(tmp_path: Path) -> None:
    """The first run's function is where the second begins."""
    first = train(tiny("train.epochs=2"), tmp_path / "first")
    changes = [f"model.init={tmp_path / 'first'}", "train.epochs=1", "train.lr=1.0e-12"]
    train(tiny(*changes), tmp_path / "second")
    assert evaluate_run(tmp_path / "second")["miou"] == pytest.approx(first["miou"], abs=0.01)


def test_as_many_other_classes_are_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiny(), tmp_path / "first")
    model, info = load_checkpoint(tmp_path / "first")
    other = dataclasses.replace(info, classes=tuple(f"other {name}" for name in info.classes))
    save_checkpoint(tmp_path / "first" / "best.safetensors", model, other)
    train(tiny(f"model.init={tmp_path / 'first'}", "data.mean=[0.5, 0.5, 0.5]"), tmp_path / "second")
    said = " ".join(capsys.readouterr().out.split())
    assert "know pictures of data.mean = [0.485, 0.456, 0.406]" in said
    assert "first has other classes, but as many; its last layer is taken over" in said


def test_a_network_that_cannot_take_the_batches_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot train on batches of shape \(4, 3, 32, 64\)"):
        train(tiny("model.encoder=null", "model.architecture=dpt", "model.options={}"), tmp_path / "run")


NO_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "^DataLoader worker"),
        (torch.OutOfMemoryError(), "the device ran out of memory; lower"),
        (RuntimeError(NO_MEMORY), "the device ran out of memory; lower"),
        (MemoryError("Unable to allocate 6 GiB for an array"), "the device ran out of memory; lower"),
    ],
    ids=repr,
)
def test_what_is_not_put_down_to_the_network(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_forward_backward", fails)
    with pytest.raises((RuntimeError, UserError), match=says):
        train(tiny(), tmp_path / "run")


def test_a_dry_run_leaves_no_process_behind() -> None:
    dry_run(tiny("data.num_workers=1"))
    assert not multiprocessing.active_children()


def test_averaged_weights_have_the_counters_of_the_network(tmp_path: Path) -> None:
    train(tiny("train.ema_decay=0.9"), tmp_path / "run")
    averaged, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("last", "state"))
    counters = [name for name in averaged if name.endswith(("num_batches_tracked", "num_refreshes"))]
    assert counters
    for name in counters:
        assert averaged[name] == last[f"model.{name}"], name


def test_init_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        train(tiny("model.init=nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_compiled_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, with a graph for steps that refresh and one for those that do not. The same schedule that
    is not compiled is the first judge, layers that decide for themselves, one step earlier, the second.
    """
    aot_eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(layers, "_STEPS_AN_INTERVAL", 1)
    changes = ("model.encoder=resnet10t", "model.network_deconv.refresh_every=2")
    recipe = tiny(*changes, "train.compile=true")
    plain = train(tiny(*changes), tmp_path / "plain")
    monkeypatch.setattr(torch, "compile", lambda model: model)
    want = train(recipe, tmp_path / "scheduled")
    monkeypatch.setattr(torch, "compile", aot_eager)
    torch._dynamo.reset()
    counters["stats"].clear()
    got = train(recipe, tmp_path / "compiled")
    assert counters["stats"]["unique_graphs"] == 2
    assert got["loss"] == pytest.approx(want["loss"], rel=1e-3)
    assert got["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert got["miou"] == pytest.approx(want["miou"], abs=5e-3)
    weights = [load_file(tmp_path / run / "last.safetensors") for run in ("plain", "compiled")]
    assert weights[0].keys() == weights[1].keys()


def test_a_network_that_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with pytest.raises(UserError, match=r"no compiler found.*start a run with train\.compile=false"):
        train(tiny("train.compile=true"), tmp_path / "run")


def test_a_diverged_loss_stops_the_run_with_advice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss became nan|the loss became inf") as caught:
        train(tiny("train.lr=1.0e30", "train.warmup_epochs=0"), tmp_path / "run")
    message = str(caught.value)
    assert re.search(r"at step \d of epoch 1; first (the weights of )?[\w.]+ (were|put out)", message)
    assert "lower train.lr" in message


@pytest.mark.parametrize("check_every", [1, 10])  # of the CPU; of a GPU, which looks at the epoch's end here
@pytest.mark.parametrize("what", ["weights", "output", "images"])
def test_the_layer_that_went_first_is_named(
    what: str, check_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer, or the pictures of one step, is made infinite in the second of three steps."""
    step, name = Trainer.train_step, "decoder.blocks.0.conv1.0"

    def poisoned(self: Trainer, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.check_every = check_every
        layer = self.model.get_submodule(name)
        if self.step == 1 and what == "weights":
            layer.weight.data[0] = torch.inf
        elif self.step == 1 and what == "output":
            layer.register_forward_hook(lambda module, inputs, output: output * torch.inf)
        return step(self, images * torch.inf if self.step == 1 and what == "images" else images, targets)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    says = {
        "weights": f"first the weights of {name} were not finite",
        "output": rf"first {name} put out values that are not finite \(its largest input [\d.]+\)",
        "images": r"first encoder.model.conv_stem put out values that are not finite",
    }
    with pytest.raises(UserError, match=rf"the loss became nan at step 2 of epoch 1; {says[what]}"):
        train(tiny(), tmp_path / "run")


def test_the_probe_runs_in_the_precision_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows in half precision only is found in half precision."""
    step, name = Trainer.train_step, "decoder.blocks.0.conv1.0"

    def poisoned(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        layer = self.model.get_submodule(name)
        layer.register_forward_hook(lambda module, inputs, output: output * 1e4 * 1e4)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(UserError, match=f"first {name} put out values that are not finite"):
        train(tiny("train.amp=fp16"), tmp_path / "run")


def test_a_bad_gradient_is_told_from_what_it_spoils() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(4)))
    for layer in model[:3]:
        layer.weight.data.fill_(torch.nan)
    assert first_bad_layer(model, torch.zeros(1, 2)) == "first the weights of 2 were not finite"


def test_task_and_data_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is for classification, but"):
        train(tiny("model.architecture=resnet18", "model.encoder=null", "model.options={}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("poly", [0.5, 1.0, 1.0, 0.75**0.9, 0.5**0.9, 0.25**0.9]),
        (
            "cosine",
            [0.5, 1.0, 1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(math.pi * 3 / 4)) / 2],
        ),
        ("constant", [0.5, 1.0, 1, 1, 1, 1]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    got = [lr_factor(step, 6, 2, schedule, 0.9) for step in range(6)]
    assert got == pytest.approx(expected, abs=1e-15)
    assert lr_factor(6, 6, 2, schedule, 0.9) == pytest.approx(
        1.0 if schedule == "constant" else 0.0, abs=1e-15
    )


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        assert all(x.dtype != torch.float64 for x in tree_leaves(out) if isinstance(x, torch.Tensor)), op
        return out


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_training_step_needs_no_float64(mode: str) -> None:
    """Apple's GPUs have none."""
    recipe = tiny(f"model.network_deconv.mode={mode}", "train.ohem=0.3", "train.dice_weight=0.5")
    model, _ = build_started(recipe.model, 3)
    images, targets = torch.rand(2, 3, 32, 64), torch.randint(3, (2, 32, 64))
    optimizer = make_optimizer(model, recipe.train)
    with NoFloat64():
        for _ in range(2):
            loss_of(model(images), targets, recipe.train, 255).backward()
            optimizer.step()


def test_optimizers() -> None:
    model = torch.nn.Linear(2, 2)
    assert isinstance(make_optimizer(model, TrainConfig(optimizer="adamw")), torch.optim.AdamW)
    sgd = make_optimizer(model, TrainConfig(lr=0.3, momentum=0.8, weight_decay=0.2))
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.3, 0.8, 0.2)


@pytest.mark.parametrize("name", ["gpu", "cuda:97", "mps:9"])
def test_devices(name: str) -> None:
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=f"--device {name}: not available here"):
        pick_device(name)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("before", "device", "amp", "inside"),
    [
        ("highest", CUDA, True, "high"),
        ("highest", CUDA, False, "highest"),
        ("highest", torch.device("cpu"), True, "highest"),
        ("medium", CUDA, True, "medium"),
    ],
)
def test_products_in_tf32(before: str, device: torch.device, amp: bool, inside: str) -> None:
    try:
        torch.set_float32_matmul_precision(before)
        with trainer_module.tf32_matmul(device, amp):
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_products_in_a_precision_set_the_new_way() -> None:
    """Which torch refuses to tell those who ask the old way."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with trainer_module.tf32_matmul(CUDA, True):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("optimizer", "decay"), [("sgd", None), ("adamw", 0.8)])
def test_a_run_is_a_plain_loop(optimizer: str, decay: float | None, tmp_path: Path) -> None:
    """Its weights, and their average, are those of torch's own optimiser in a loop over the loader."""
    changes = ["model.norm=bn", "train.seed=3", f"train.ema_decay={decay or 'null'}", "train.clip_grad=0.2"]
    changes += [f"train.optimizer={optimizer}", "train.lr=0.01", "train.weight_decay=0.5"]
    changes += ["train.schedule=poly", "train.poly_power=1", "train.warmup_epochs=0.67"]
    recipe = tiny(*changes)
    train(recipe, tmp_path / "run")

    samples = open_samples(recipe.data, "train")
    seed_everything(3)
    model, _ = build_started(recipe.model, len(samples.classes))
    loader = train_loader(samples, recipe.data, 4, 3, 1)
    if optimizer == "sgd":
        made: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, weight_decay=0.5)
    else:
        made = torch.optim.AdamW(model.parameters(), weight_decay=0.5)
    average: dict[str, torch.Tensor] = {}
    rates = iter([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        for images, targets in loader:
            made.param_groups[0]["lr"] = next(rates)
            made.zero_grad()
            loss_of(model(images), targets, recipe.train, 255).backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            assert norm > 0.2
            made.step()
            now = {name: value.detach().clone() for name, value in model.named_parameters()}
            average = {name: value.lerp(average.get(name, value), decay or 0) for name, value in now.items()}
    state, last = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("state", "last"))
    for name, value in average.items():
        torch.testing.assert_close(state[f"model.{name}"], now[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(last[name], value, rtol=1e-4, atol=1e-6)


def test_a_loss_scale_does_not_change_what_is_clipped() -> None:
    changes = ["train.clip_grad=0.01", "train.weight_decay=0", "train.warmup_epochs=0", "train.amp=fp16"]
    run = train_module._prepare(tiny(*changes), torch.device("cpu"))
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = copy.deepcopy(run.trainer.model)
    run.trainer.train_step(*next(iter(run.loader)))
    pairs = zip(run.trainer.model.parameters(), before.parameters(), strict=True)
    moved = math.hypot(*((p - b).norm().item() for p, b in pairs))
    assert moved == pytest.approx(0.01 * run.recipe.train.lr, rel=0.01)


def test_every_step_and_rank_has_random_numbers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_module._prepare(tiny(), torch.device("cpu"))
    trainer, drawn = run.trainer, []

    def draw(*_: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(()).item())
        return torch.zeros(())

    monkeypatch.setattr(trainer, "forward_backward", draw)
    for trainer.step, number in ((0, 0), (1, 0), (0, 1), (0, 0)):
        monkeypatch.setattr(trainer_module, "rank", lambda number=number: number)
        trainer.train_step(*next(iter(run.loader)))
    assert len(set(drawn)) == 3
    assert drawn[3] == drawn[0]


def test_the_last_epoch_is_scored_whatever_eval_every_is(tmp_path: Path) -> None:
    assert "miou" in train(tiny("train.eval_every=3"), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count("miou") == 1


def test_states_are_left_by_the_minute_and_training_time_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 40 seconds. The first run ends in its first validation."""
    step, now, saved = Trainer.train_step, 0.0, []

    def slow(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        nonlocal now
        now += 40
        return step(self, *batch)

    def noted(run: Path, tensors: dict, values: dict) -> None:
        saved.append(values["step"])
        save_state(run, tensors, values)

    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(train_module, "save_state", noted)
    monkeypatch.setattr(Trainer, "train_step", slow)
    recipe = tiny("train.checkpoint_minutes=1")
    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_score", lambda run, epoch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "run")
    assert saved == [0, 2, 3]
    assert train(recipe, tmp_path / "run", resume=True)["seconds"] == pytest.approx(240)
    assert saved == [0, 2, 3, 3, 3, 5, 6, 6]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["train.class_weights=[1, 2]"], "class_weights has 2 values for 8 classes; give one each"),
    ],
)
def test_settings_that_the_data_does_not_fit(changes: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(train_module.UserError, match=says):
        train(tiny(*changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_state_holds_the_loss_scale(tmp_path: Path) -> None:
    """Which else would be found anew, at the cost of steps that overflow and are left out."""
    run, again = (train_module._prepare(tiny("train.amp=fp16"), torch.device("cpu")) for _ in range(2))
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    run.out = again.out = tmp_path
    create_run_folder(tmp_path, run.recipe)
    run.save_state()
    again.load_state()
    assert again.trainer.scaler.get_scale() == 512.0


def test_tensorboard_shows_scores_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    line = train(tiny(), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [3, 6]
    assert events.Scalars("miou")[-1].value == pytest.approx(line["miou"])
    assert "iou/road" in events.Tags()["scalars"]
    assert events.Tags()["images"] == ["val"]


def test_weights_of_another_seed_are_others(tmp_path: Path) -> None:
    one, other = (train_module._prepare(tiny(f"train.seed={seed}"), torch.device("cpu")) for seed in (0, 1))
    assert not torch.equal(*(run.trainer.model.segmentation_head[0].weight for run in (one, other)))


def test_the_best_checkpoint_is_of_the_best_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.3, 0.5, 0.4, 0.5])
    monkeypatch.setattr(_Run, "_score", lambda run, epoch: {"miou": next(scores)})
    train(tiny("train.epochs=4"), tmp_path / "run")
    files = (tmp_path / "run" / f"{name}.safetensors" for name in ("best", "last"))
    assert [read_info(file).epoch for file in files] == [2, 4]

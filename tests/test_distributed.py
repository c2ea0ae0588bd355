"""N processes with a share of the batch each against one process with all of it."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors.torch import load_file
from test_layers import config
from test_resume import assert_same_run
from torch import Tensor, nn

from segdeconv import distributed, layers
from segdeconv.checkpoint import has_state, load_state
from segdeconv.config import NetworkDeconvConfig, TrainConfig
from segdeconv.evaluate import evaluate_run, score
from segdeconv.layers import WhitenedConv2d, WhitenedLinear
from segdeconv.losses import loss_of
from segdeconv.schedule import RefreshSchedule

STEPS = 3
CASES = {
    "fast conv": (lambda: WhitenedConv2d(8, 6, 3, padding=1), (8, 8, 9, 10)),
    "fast conv on maps of which every third row counts": (lambda: WhitenedConv2d(8, 6, 3), (8, 8, 34, 5)),
    "fast grouped conv": (lambda: WhitenedConv2d(8, 6, 3, stride=2, groups=2), (8, 8, 9, 10)),
    "fast depthwise conv": (lambda: WhitenedConv2d(8, 8, 3, groups=8), (8, 8, 9, 10)),
    "fast linear": (lambda: WhitenedLinear(6, 5), (8, 6)),
    "exact conv": (lambda: WhitenedConv2d(8, 6, 3, padding=1, config=CONFIG["exact"]), (8, 8, 9, 10)),
    # A rank with 5 of 8 images that takes them for half of the batch would choose a larger stride.
    "exact conv on small maps": (
        lambda: WhitenedConv2d(8, 6, 3, padding=1, config=CONFIG["exact"]),
        (8, 8, 12, 11),
    ),
    "reference conv": (lambda: WhitenedConv2d(8, 6, 3, config=CONFIG["reference"]), (8, 8, 9, 10)),
    "exact linear": (lambda: WhitenedLinear(6, 5, config=CONFIG["exact"]), (8, 6)),
}
CONFIG = {mode: NetworkDeconvConfig(mode=mode, block_size=4) for mode in ("exact", "reference")}
SPLITS = {2: (5, 3), 4: (2, 2, 2, 2)}


def run_case(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Outputs, gradients and running values after some steps."""
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make().double()
    split = SPLITS.get(world, (shape[0],))
    begin, end = sum(split[:rank]), sum(split[: rank + 1])
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1)[begin:end].requires_grad_()
        out = layer(x)
        probe = torch.randn(shape[0], *out.shape[1:], generator=generator, dtype=torch.float64)[begin:end]
        (out * probe).sum().backward()
        assert x.grad is not None
        if "exact" in name:
            (first,) = torch.autograd.grad((layer(x) * probe).sum(), x, create_graph=True)
            found[f"second {step}"] = torch.autograd.grad(first.square().sum(), x)[0]
        found |= {f"out {step}": out.detach(), f"grad {step}": x.grad}
    found |= {f"weight {key}": p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
    return found | {f"buffer {key}": value.clone() for key, value in layer.named_buffers()}


LOSSES: dict[str, dict[str, Any]] = {
    "weights": {"class_weights": (0.5, 2.0, 1.0)},
    "ohem": {"ohem": 0.2},
    "ohem, weights and dice": {"ohem": 0.4, "class_weights": (0.5, 2.0, 1.0), "dice_weight": 0.5},
}


def run_loss(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """The loss and the gradient of this rank's share, whose pictures are not equally hard or labelled."""
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1.0, 9)[:, None, None]
    logits = torch.randn(8, 3, 6, 7, generator=generator) * size[:, None]
    targets = torch.randint(0, 3, (8, 6, 7), generator=generator)
    targets[torch.rand(8, 6, 7, generator=generator) * 12 < size] = 255
    split = SPLITS.get(world, (8,))
    here = slice(sum(split[:rank]), sum(split[: rank + 1]))
    logits = logits[here].requires_grad_()
    loss = loss_of(logits, targets[here], TrainConfig(**LOSSES[name]), 255)
    loss.backward()
    assert logits.grad is not None
    return {"loss": loss.detach(), "grad": logits.grad / world}


def map_of(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 4, 6 + rank, 9 - rank, generator=generator, dtype=torch.float64) + rank


def run_sizes(rank: int) -> dict[str, Tensor]:
    """Running values after a step in which every rank has maps of a size of its own."""
    torch.manual_seed(0)
    layer = WhitenedConv2d(4, 3, 3, padding=1).double()
    layer(map_of(rank))
    return {key: value.clone() for key, value in layer.named_buffers()}


def run_scheduled(rank: int, world: int) -> dict[str, Tensor]:
    """As `run_case`, of a network with a schedule of refreshes; two processes compile it, four do not."""
    torch.manual_seed(0)
    config = NetworkDeconvConfig(refresh_every=2)
    network = nn.Sequential(
        WhitenedConv2d(4, 8, 3, padding=1, config=config),
        nn.ReLU(),
        WhitenedConv2d(8, 6, 3, stride=2, groups=2, config=config),
        nn.Flatten(),
        WhitenedLinear(6 * 4 * 3, 5, config=config),
    ).double()
    if world == 2:
        network.compile(backend="aot_eager", fullgraph=True)
    refreshes = RefreshSchedule(network)
    split = SPLITS.get(world, (8,))
    here = slice(sum(split[:rank]), sum(split[: rank + 1]))
    found: dict[str, Tensor] = {}
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, 9, 8, generator=generator, dtype=torch.float64) * 3 + 1
        probe = torch.randn(8, 5, generator=generator, dtype=torch.float64)[here]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "_STEPS_AN_INTERVAL", 1)
            measures = refreshes.step()
        assert measures == (step not in (3, 5),)
        network.zero_grad()
        out = network(x[here])
        (out * probe).sum().backward()
        found[f"out {step}"] = out.detach()
        found |= {f"weight {step} {key}": p.grad.clone() for key, p in network.named_parameters()}
    return found | {f"buffer {key}": value.clone() for key, value in network.named_buffers()}


def run_score(rank: int) -> dict[str, Tensor]:
    """Scores of one picture, which rank 0 has; the others have none."""

    class Faces:
        task, classes = "classification", tuple("abcdefghi")

    loader = [(torch.arange(9.0)[None], torch.tensor([5]))] if rank == 0 else []
    scores = score(lambda images: images, loader, Faces(), -100, "cpu")
    return {key: torch.tensor(scores[key]) for key in ("top1", "top5")}


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meet", timedelta(minutes=1), rank=rank, world_size=world
    )
    found = {name: run_case(name, rank, world) for name in CASES}
    found |= {name: run_loss(name, rank, world) for name in LOSSES}
    found["scheduled"] = run_scheduled(rank, world)
    found["sizes"] = run_sizes(rank)
    found["score"] = run_score(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SPLITS))
def shares(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), request.param)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", [*CASES, "scheduled"])
def test_layers_compute_what_one_process_does(name: str, shares: list[dict]) -> None:
    want = run_case(name, 0, 1) if name in CASES else run_scheduled(0, 1)
    for key, value in want.items():
        parts = [share[name][key] for share in shares]
        if key.startswith("buffer"):  # the same on all ranks, to the bit
            assert all(torch.equal(part, parts[0]) for part in parts), key
            got = parts[0]
        else:
            got = sum(parts) if key.startswith("weight") else torch.cat(parts)
        assert torch.allclose(got, value, rtol=0, atol=1e-10 * value.abs().max().item()), key


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_that_of_the_whole_batch(name: str, shares: list[dict]) -> None:
    want = run_loss(name, 0, 1)
    for share in shares:
        assert share[name]["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-6)
    got = torch.cat([share[name]["grad"] for share in shares])
    torch.testing.assert_close(got, want["grad"], rtol=1e-5, atol=1e-9)


def test_maps_of_different_sizes(shares: list[dict]) -> None:
    """Running values are the same on all ranks, to the bit, and their mean is that of all values."""
    for share in shares[1:]:
        for key, value in share["sizes"].items():
            assert torch.equal(value, shares[0]["sizes"][key]), key
    values = torch.cat([map_of(rank).transpose(0, 1).flatten(1) for rank in range(len(shares))], 1)
    mean = shares[0]["sizes"]["running_moments"][0]
    torch.testing.assert_close(mean, values.mean(1), rtol=0, atol=1e-12)


def test_ranks_without_pictures_score_as_the_others(shares: list[dict]) -> None:
    assert [share["score"] for share in shares] == [{"top1": 0, "top5": 1}] * len(shares)


TINY = [
    "model.encoder=lcnet_050",
    "model.network_deconv.block_size=8",
    "model.options={encoder_depth: 3, decoder_channels: [16, 16, 8]}",
    "data.size=[32, 64]",
    "data.count=[12, 5]",
    "train.batch_size=3",
    "train.epochs=2",
    "train.dice_weight=1",
    "train.lr=0.005",  # rounding grows from step to step, the faster the larger the steps
]


SCORES = ("miou", "pixel_acc", "iou")


def launch(processes: int, out: Path, *changes: str) -> subprocess.Popen[str]:
    torchrun = ["torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "-m"]
    command = [sys.executable, "-m", *(torchrun if processes > 1 else []), "segdeconv", "train", "demo"]
    command += [
        "--resume",
        "--out",
        str(out),
        *(part for change in (*TINY, *changes) for part in ("--set", change)),
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str], code: int = 0, timeout: int = 240) -> tuple[str, str]:
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err
    return out, err


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Batches of three over two processes: uneven shares, loss over both, each picture counted once."""
    one, two = tmp_path / "one", tmp_path / "two"
    jobs = launch(1, one), launch(2, two)
    finish(jobs[0])
    out, _ = finish(jobs[1])
    assert out.count("epoch 1/2: loss") == 1  # only rank 0 speaks
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    for want, mine in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(want["loss"], rel=1e-5)
    # Five pictures over two processes: the counts are those of the whole, so the scores are to the bit.
    scores, scored = evaluate_run(two / "last.safetensors"), lines[1][-1]
    assert {key: scores[key] for key in SCORES} == {key: scored[key] for key in SCORES}
    assert scored["miou"] == pytest.approx(
        lines[0][-1]["miou"], abs=1e-3
    )  # with other rounding in the weights
    weights, want = (load_file(run / "last.safetensors") for run in (two, one))
    for key, value in want.items():
        # Channels-last kernels sum up in float32, to 1e-5, and other shares have other sums. That the two are
        # the same but for rounding is tested in float64 above.
        atol = 5e-3 * max(value.abs().max().item(), 0.01)
        assert torch.allclose(weights[key], value, rtol=0, atol=atol), key
    state = load_file(two / "state.safetensors")
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in weights.items())


@pytest.mark.slow
def test_two_compiled_processes_train_as_one_that_is_not(tmp_path: Path) -> None:
    """Which refreshes its whitening one step earlier."""
    changes = ("train.batch_size=4", "train.epochs=3")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(launch(1, one, *changes))
    out, _ = finish(launch(2, two, *changes, "train.compile=true"), timeout=900)
    assert "no effect" not in out
    want, got = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    )
    assert got == pytest.approx(want, rel=0.05)


def test_batch_norms_that_are_kept_validate_as_rank_0_has_them(tmp_path: Path) -> None:
    """Each rank has statistics of its own share, but the scores are those of the network that is saved."""
    changes = ("model.keep=[encoder.model.bn1]", "train.ema_decay=0.5", "train.epochs=1")
    out, _ = finish(launch(2, tmp_path / "run", *changes))
    assert "batch norm takes its statistics from each process's own share" in out
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    scores = evaluate_run(tmp_path / "run")
    assert {key: scores[key] for key in SCORES} == {key: line[key] for key in SCORES}


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun has started."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        job.kill()
        pytest.skip("needs /proc to find the ranks")
    return [int(child) for child in children.read_text().split()]


def says_no_more_than_sentences(err: str) -> bool:
    """torchrun shows a traceback of its own."""
    return not re.search(r'File ".*segdeconv/\w+\.py"', err)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = launch(2, run, "train.epochs=500", "train.checkpoint_minutes=0")
    while not (run / "metrics.jsonl").exists():
        assert job.poll() is None
        time.sleep(0.2)
    ranks = ranks_of(job)
    os.kill(ranks[-1], signal.SIGKILL)
    _, err = finish(job, code=1)
    assert "rank 0: another process of this run ended" in err
    assert says_no_more_than_sentences(err)
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert (run / "state.safetensors").exists()


def test_a_folder_that_another_run_holds_is_refused_by_all(tmp_path: Path) -> None:
    """Rank 0 alone looks at the lock; the other one waits for it at a barrier."""
    with filelock.FileLock(tmp_path / ".lock"):
        _, err = finish(launch(2, tmp_path), code=1)
    assert "another process trains in this folder" in err
    assert "rank 1: another process of this run ended" in err
    assert says_no_more_than_sentences(err)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_two_processes_resume_from_their_validation(tmp_path: Path, number: int) -> None:
    """Asked to stop they finish it first; killed, they have left a state before it."""
    changes = ["model.norm=bn", "train.ema_decay=0.9", "data.count=[12, 500]", "data.num_workers=1"]
    changes += ["train.eval_every=1"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    finish(launch(2, whole, *changes))
    job = launch(2, run, *changes)
    while not (has_state(run) and load_state(run)[1]["step"] == 4):  # of four steps an epoch
        assert job.poll() is None
        time.sleep(0.05)
    if number == signal.SIGKILL:
        for process in (job.pid, *ranks_of(job)):
            os.kill(process, number)
    else:
        job.send_signal(number)
    out, _ = finish(job, code=-9 if number == signal.SIGKILL else 1)  # torchrun's, whatever the ranks say
    values = load_state(run)[1]
    if number == signal.SIGKILL:
        assert (values["step"], values["finished_epochs"]) == (4, 0)
    else:
        assert f"stopped by a signal at step {values['step']}" in out
    finish(launch(2, run, *changes))
    assert_same_run(run, whole)


@pytest.fixture
def doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a second process did the same with the same images."""
    for module in (distributed, layers):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda values: values.mul_(2))


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_two_processes_lose_no_small_variance(mode: str, request: pytest.FixtureRequest) -> None:
    """Of channels far from zero, in float32: squares are summed in float64."""
    alone, shared = (WhitenedLinear(4, 3, config=config(mode=mode)) for _ in range(2))
    x = torch.randn(64, 4) + 300
    alone(x)
    request.getfixturevalue("doubled")
    shared(x)
    for name in ("running_moments",) if mode == "fast" else ("running_mean", "running_whitening"):
        torch.testing.assert_close(shared.get_buffer(name), alone.get_buffer(name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_two_processes_sample_as_one_with_all_images(mode: str, request: pytest.FixtureRequest) -> None:
    """On a grid that is chosen by the images of both."""
    alone = WhitenedConv2d(4, 6, 1, config=config(mode=mode, block_size=4)).double()
    shared, x = copy.deepcopy(alone), torch.randn(4, 4, 9, 10, dtype=torch.float64)
    alone(torch.cat((x, x)))
    request.getfixturevalue("doubled")
    shared(x)
    for name, value in alone.named_buffers():
        torch.testing.assert_close(shared.get_buffer(name), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.usefixtures("doubled")
def test_an_empty_batch_of_one_process_is_refused(mode: str) -> None:
    layer = WhitenedConv2d(3, 4, 3, config=NetworkDeconvConfig(mode=mode))
    with pytest.raises(RuntimeError, match=r"an empty batch, .* on one of 2 processes"):
        layer(torch.zeros(0, 3, 8, 8))


def test_means_over_ranks_are_float64() -> None:
    assert distributed.mean_over_ranks(3, torch.ones(2))[0][0].dtype == torch.float64

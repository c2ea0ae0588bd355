"""A stopped run goes on bit for bit, however it was stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Call
from safetensors.torch import load_file, save_file
from test_train import tiny

from segdeconv import train as train_module
from segdeconv.checkpoint import STATE_FORMAT, load_state, save_state
from segdeconv.errors import UserError
from segdeconv.train import only_process, train
from segdeconv.trainer import Trainer

TIMES = ("seconds", "images_per_second", "loader_share", "memory_mib")  # what no run repeats


def weights_and_lines(run: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return load_file(run / "last.safetensors"), [
        {key: value for key, value in line.items() if key not in TIMES} for line in lines
    ]


def assert_same_run(one: Path, other: Path) -> None:
    (weights, lines), (want, want_lines) = weights_and_lines(one), weights_and_lines(other)
    assert lines == want_lines
    assert weights.keys() == want.keys()
    assert all(torch.equal(value, want[key]) for key, value in weights.items())
    best, want_best = (load_file(run / "best.safetensors") for run in (one, other))
    assert all(torch.equal(value, want_best[key]) for key, value in best.items())


@pytest.mark.parametrize(
    ("changes", "stops", "number"),
    [
        ([], [2], signal.SIGTERM),  # three steps an epoch, two epochs
        (["train.ema_decay=0.9", "train.optimizer=adamw", "train.lr=0.001"], [1, 3, 4], signal.SIGINT),
        (["train.amp=fp16", "model.norm=bn", "train.clip_grad=1"], [3], signal.SIGTERM),
        (["data.num_workers=1", "model.network_deconv.mode=exact"], [5], signal.SIGTERM),
        (["model.architecture=fpn", "model.options={}"], [4], signal.SIGTERM),  # it has dropout
        (["train.schedule=poly"], [3, 6], signal.SIGTERM),  # an epoch's last step: only its line is missing
        (["train.compile=true"], [1, 2, 4], signal.SIGTERM),  # matrices are made at the next step
    ],
)  # fmt: skip
def test_a_signal_leaves_a_state_to_resume_from(
    changes: list[str], stops: list[int], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda model: model)  # a minute a run; the schedule is what counts
    recipe = tiny(*changes)
    train(recipe, tmp_path / "whole")
    step = Trainer.train_step
    pending = list(stops)

    def stopping(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = step(self, *batch)
        if pending and self.step == pending[0]:
            os.kill(os.getpid(), number)
            pending.pop(0)
        return loss

    monkeypatch.setattr(Trainer, "train_step", stopping)
    for _ in stops:
        with pytest.raises(SystemExit) as left:
            train(recipe, tmp_path / "stopped", resume=True)
        assert left.value.code == (130 if number == signal.SIGINT else 0)
        assert not multiprocessing.active_children()  # though ``left`` holds the run
    train(recipe, tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    # A finished run has nothing left to do, and says what it came to.
    assert train(recipe, tmp_path / "stopped", resume=True)["epoch"] == recipe.train.epochs
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_validation_that_is_cut_short_costs_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny("train.epochs=1", "train.schedule=poly"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_score", lambda run, epoch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny("train.epochs=1", "train.schedule=poly"), tmp_path / "run")
    monkeypatch.setattr(Trainer, "train_step", None)  # none is left to make
    train(tiny("train.epochs=1", "train.schedule=poly"), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


KILLED = ("train.epochs=4", "train.checkpoint_minutes=0", "train.ema_decay=0.9")


def child(out: str, workers: int) -> None:
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # loaders shall not inherit this process's forkserver
    train(tiny(*KILLED, f"data.num_workers={workers}"), Path(out), resume=True)


@pytest.mark.parametrize(
    ("wanted", "workers"),
    [(4, 0), pytest.param(25, 0, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_kill_9_at_any_moment(wanted: int, workers: int, tmp_path: Path) -> None:
    """Kills at random moments, over as many runs as that takes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    rng, kills, runs = random.Random(wanted), 0, 0

    def start(out: Path) -> multiprocessing.Process:
        process = context.Process(target=child, args=(str(out), workers))
        process.start()
        return process

    whole = start(tmp_path / "whole")
    begin = time.monotonic()
    whole.join()
    took = time.monotonic() - begin
    assert whole.exitcode == 0
    while kills < wanted:
        out, runs = tmp_path / f"killed {runs}", runs + 1
        while True:
            process = start(out)
            process.join(rng.uniform(0, 0.7 * took) if kills < wanted else None)
            if process.exitcode is not None:
                assert process.exitcode == 0
                break
            process.kill()
            process.join()
            kills += 1
        assert_same_run(out, tmp_path / "whole")
        assert not list(out.glob(".*tmp*"))


@pytest.mark.parametrize(
    ("name", "goes"),
    [
        (".tmpNkOvDq", True),  # safetensors has temporary names of its own
        (".state.new.0123456789abcdef.tmp.safetensors", True),
        (".curves.0123456789abcdef.tmp.png", True),
        (".last.0123456789abcdef.tmp.onnx", False),  # another command's, which may be alive
        (".mine.tmp", False),
    ],
)
def test_what_a_killed_training_was_writing_goes(name: str, goes: bool, tmp_path: Path) -> None:
    folder = tmp_path / ".last.0123456789abcdef.tmp.safetensors"
    folder.mkdir()
    (tmp_path / name).write_text("half")
    with only_process(tmp_path):
        assert (tmp_path / name).exists() != goes
    assert folder.is_dir()


def test_a_damaged_state_falls_back_to_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save_state(tmp_path, {"a": torch.full((3,), float(step))}, {"step": step})
    assert load_state(tmp_path)[1] == {"step": 2}
    newest = tmp_path / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    capsys.readouterr()
    tensors, values = load_state(tmp_path)
    assert values == {"step": 1}
    assert "going on from the state before, state.previous.safetensors" in capsys.readouterr().out
    assert tensors["a"].tolist() == [1, 1, 1]
    (tmp_path / "state.previous.safetensors").unlink()
    with pytest.raises(UserError, match=r"no state to resume from.*state.safetensors"):
        load_state(tmp_path)


def other_run(state: Path) -> None:
    tensors, values = load_state(state.parent)
    save_state(state.parent, tensors, values | {"recipe": "another"})


def changed(state: Path, old: bytes, new: bytes) -> None:
    content = state.read_bytes()
    assert old in content
    state.write_bytes(content.replace(old, new, 1))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (other_run, "is the state of a run with another recipe"),
        (lambda state: changed(state, state.read_bytes()[-5000:-4996], b"\1\2\3\4"), "is damaged"),
        (lambda state: changed(state, b"scaler", b"scxler"), "is damaged"),
    ],
)
def test_a_state_that_is_not_this_runs_or_not_whole_is_not_taken(
    spoil: Callable[[Path], None], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, state = tiny("train.epochs=1"), tmp_path / "state.safetensors"
    train(recipe, tmp_path)
    weights = load_file(tmp_path / "last.safetensors")
    spoil(state)
    capsys.readouterr()
    assert train(recipe, tmp_path, resume=True)["epoch"] == 1
    told = " ".join(capsys.readouterr().out.split())
    assert f"{says}; going on from the state before" in told
    assert all(
        torch.equal(value, weights[key]) for key, value in load_file(tmp_path / "last.safetensors").items()
    )
    assert load_state(tmp_path)[1]["finished_epochs"] == 1


def test_older_states_have_no_hashes(tmp_path: Path) -> None:
    recipe, state = tiny("train.epochs=1"), tmp_path / "state.safetensors"
    line = train(recipe, tmp_path)
    tensors, values = load_state(tmp_path)
    del values["recipe"]
    save_file(tensors, state, {"format": STATE_FORMAT, "values": json.dumps(values)})
    assert train(recipe, tmp_path, resume=True) == line
    del values["scaler"]
    save_file(tensors, state, {"format": STATE_FORMAT, "values": json.dumps(values)})
    with pytest.raises(
        UserError, match=r"its state does not fit the network \(it lacks 'scaler'\); choose another"
    ):
        train(recipe, tmp_path, resume=True)


def child_with_small_files(out: str) -> None:
    import resource

    torch.set_num_threads(1)
    size = Path(out, "state.safetensors").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(UserError, match=r"state\.new\.safetensors: cannot be written"):
        train(tiny("train.epochs=2"), Path(out), resume=True)


def test_a_write_that_the_system_refuses_leaves_the_state_before(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    train(tiny("train.epochs=2"), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._Run, "_score", lambda run, epoch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny("train.epochs=2"), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")}
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=child_with_small_files, args=(str(tmp_path / "run"),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.safetensors")} == before
    train(tiny("train.epochs=2"), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_lost_lines_do_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics.jsonl is on the disk before the state that follows it; and if it is not, a run goes on."""
    synced, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    train(tiny("train.epochs=2"), tmp_path / "run")
    metrics, state = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "state.safetensors"
    assert synced.count(metrics.stat().st_ino) == 2
    assert state.stat().st_ino in synced[synced.index(metrics.stat().st_ino) :]
    metrics.write_text("")
    assert train(tiny("train.epochs=2"), tmp_path / "run", resume=True) == {}


def test_resume_wants_the_same_recipe(tmp_path: Path) -> None:
    train(tiny("train.epochs=1"), tmp_path / "run")
    with pytest.raises(UserError, match=r"was begun with train.lr = .*, now it is 0.5; resume it with"):
        train(tiny("train.epochs=1", "train.lr=0.5"), tmp_path / "run", resume=True)
    with pytest.raises(UserError, match="go on with --resume"):
        train(tiny("train.epochs=1"), tmp_path / "run")
    train(tiny("train.epochs=1", "data.num_workers=1"), tmp_path / "run", resume=True)


def test_resume_wants_the_same_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny("train.epochs=2"), run)
    tensors, values = load_state(run)
    pictures = values["pictures"]
    assert [count for count, _ in pictures.values()] == [12, 4]
    for split, was, says in (
        ("training", [10, pictures["training"][1]], "10 training pictures, now there are 12,"),
        ("validation", [4, "another"], "4 validation pictures, now some have other names,"),
    ):
        save_state(run, tensors, values | {"finished_epochs": 1, "pictures": pictures | {split: was}})
        with pytest.raises(UserError, match=f"was begun with {says}.*restore them"):
            train(tiny("train.epochs=2"), run, resume=True)
    del values["pictures"]  # as states from before they were noted
    save_state(run, tensors, values | {"finished_epochs": 1})
    assert train(tiny("train.epochs=2"), run, resume=True)["epoch"] == 2


@pytest.mark.parametrize("norm", ["nd", "bn"])
def test_resume_needs_nothing_of_what_the_run_started_from(norm: str, tmp_path: Path) -> None:
    train(tiny(f"model.norm={norm}", "train.epochs=1"), tmp_path / "first")
    recipe = tiny(f"model.norm={norm}", f"model.init={tmp_path / 'first'}", "train.epochs=1")
    line = train(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "first")
    assert train(recipe, tmp_path / "run", resume=True)["epoch"] == line["epoch"] == 1


def test_one_process_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def second(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        code = "import sys; from segdeconv.cli import main; main()"
        other = [sys.executable, "-c", code, "train", "demo", "--out", str(tmp_path / "run")]
        other += ["--resume", "--set", "data.count=[12, 4]"]
        done = subprocess.run(other, capture_output=True, text=True)
        assert done.returncode == 2
        assert "another process trains in this folder" in done.stderr
        monkeypatch.setattr(Trainer, "train_step", step)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", second)
    train(tiny("train.epochs=1"), tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["train.momentum=0"],
        ["train.optimizer=adamw", "train.lr=0.001", "train.ema_decay=0.9"],
    ],
)
def test_no_room_is_said_at_once(changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for three states and three checkpoints, less what is there already; also when a run goes on."""
    every_layer = "model.options={encoder_depth: 5, decoder_channels: [16, 16, 8, 8, 8]}"  # has momenta
    recipe, out, wanted = tiny("train.epochs=1", every_layer, *changes), tmp_path / "run", 0
    bytes_wanted, usage, free = train_module._Run.bytes_wanted, shutil.disk_usage(tmp_path), 1000

    def noted(run: train_module._Run) -> int:
        nonlocal wanted
        wanted = bytes_wanted(run)
        return wanted

    monkeypatch.setattr(train_module._Run, "bytes_wanted", noted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(UserError, match=r"the run's checkpoints need about [\d.]+ MiB, and 0.0 MiB are free"):
        train(recipe, out)
    assert not list(out.glob("*.safetensors"))
    free = wanted
    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_score", lambda run, epoch: 1 / 0)  # so that there is more to do
        with pytest.raises(ZeroDivisionError):
            train(recipe, out)
    free = wanted - sum(path.stat().st_size for path in out.glob("*.safetensors")) - 1
    with pytest.raises(UserError, match="make room"):
        train(recipe, out, resume=True)
    free += 1
    train(recipe, out, resume=True)
    free = 0
    train(recipe, out, resume=True)  # which has nothing left to write
    state, last = (
        sum(value.nbytes for value in load_file(out / f"{name}.safetensors").values())
        for name in ("state", "last")
    )
    assert wanted == pytest.approx(3 * (state + last), rel=0.01)


def test_a_full_disk_leaves_the_last_state_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segdeconv import checkpoint

    train(tiny("train.epochs=2"), tmp_path / "whole")
    save_file, calls = checkpoint.save_file, []

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        calls.append(path)
        if len(calls) == 7:  # begin; state, last, best, state of the first epoch; state, last of the second
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        train(tiny("train.epochs=2"), tmp_path / "run")
    train(tiny("train.epochs=2"), tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.chdir(tmp_path)
    _, out, _ = call("train", "demo", "--set", "data.count=[12, 4]", "--dry-run")
    for word in (
        "architecture: unet",
        "swapped",
        "GFLOP an image forward",
        "step 2: loss",
        "kept for the backward",
    ):
        assert word in out
    assert not list(tmp_path.iterdir())

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from test_runtime import handmade

from segdeconv.bench import Timing, bench, interleave, machine, table
from segdeconv.errors import UserError


@pytest.mark.parametrize(("visible", "asked"), [(None, "1"), ("3, GPU-5f", "GPU-5f"), ("3", None)])
def test_the_gpu_is_the_one_that_cuda_counts(
    visible: str | None, asked: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvidia-smi has never heard of CUDA_VISIBLE_DEVICES."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "GPU number $4"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine("cuda:1")["device_name"] == (f"GPU number {asked}" if asked else "an unknown GPU")
    program.unlink()
    assert machine("cuda:1")["device_name"] == "an unknown GPU"


def test_arms_take_turns_and_percentiles_are_right() -> None:
    calls = []

    def arm(name: str, factor: float):
        def call() -> tuple[float, float, float]:
            calls.append(name)
            step = factor * calls.count(name)  # the n-th call takes n times the first
            return 0.1 * step, 0.7 * step, 0.2 * step

        return call

    first, second = interleave({"a": arm("a", 0.001), "b": arm("b", 0.003)}, runs=4, batch=2, warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab" + "ba"
    times = np.array([2, 3, 4, 5])  # milliseconds; the first call was the warm-up
    assert [first.p50, first.p95, first.p99] == pytest.approx(np.percentile(times, [50, 95, 99]))
    assert [first.pre, first.inference, first.post] == pytest.approx([0.35, 2.45, 0.7])
    assert first.images_per_s == pytest.approx(4 * 2 / 0.014)
    assert (first.ratio, second.ratio) == pytest.approx((1, 3))
    assert second.p50 == pytest.approx(3 * first.p50)


def test_ratios_over_other_arms() -> None:
    arms = {
        name: (lambda s=seconds: (0.0, s, 0.0)) for name, seconds in zip("abc", (1.0, 2.0, 8.0), strict=True)
    }
    timings = interleave(arms, runs=2, batch=1, warm_up=0, over={"c": "b"})
    assert [timing.ratio for timing in timings] == [1, 2, 4]


def test_bench(tmp_path: Path) -> None:
    paths = [handmade(tmp_path / "a.onnx"), handmade(tmp_path / "b.onnx", ("logits",))]
    result = bench(paths, (40, 60), batch=2, threads=1, runs=3, device="cpu")
    assert (result["batch"], result["size"], result["threads"], result["runs"]) == (2, [40, 60], 1, 3)
    assert result["device"] == "cpu"
    first, second = result["timings"]
    assert set(first) == {*asdict(Timing("", *[0.0] * 8)), "peak_mib"}
    assert (first["name"], second["name"]) == tuple(map(str, paths))
    assert first["ratio"] == 1
    assert 0 < first["p50"] <= first["p95"] <= first["p99"]
    assert 20 < first["peak_mib"] < 2000
    lines = table(result).splitlines()
    assert result["device_name"] in lines[0]
    assert len(lines) == 4 + 2
    assert {line.count("|") for line in lines[2:]} == {9}


def test_the_size_is_that_of_the_recipe_by_default(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a.onnx", resize=[24, 36])
    assert bench([path], runs=1, device="cpu")["size"] == [24, 36]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"runs": 0}, "--runs 0"), ({"batch": 0}, "--batch 0"), ({"threads": 0}, "--threads 0")],
)
def test_wrong_numbers(changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        bench([handmade(tmp_path / "a.onnx")], (8, 8), device="cpu", **changes)


def test_graphs_of_one_size(tmp_path: Path) -> None:
    path = handmade(tmp_path / "a.onnx", sides=(1, 3, 24, 36))
    assert bench([path], runs=1, device="cpu")["size"] == [24, 36]
    with pytest.raises(UserError, match=r"a.onnx: takes pictures of \(24, 36\) only"):
        bench([path], (24, 40), runs=1, device="cpu")


def test_the_same_graph_twice(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        bench([handmade(tmp_path / "a.onnx")] * 2, (8, 8))

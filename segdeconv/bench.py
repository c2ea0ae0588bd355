"""What a picture costs in onnxruntime: several graphs in turns, so that a slow minute meets all of them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segdeconv.errors import UserError
from segdeconv.markdown import markdown_table
from segdeconv.runtime import Segmenter, import_onnxruntime, usable_cores

Stages = tuple[float, float, float]  # seconds: preparing the pictures, the graph, its output to labels

_WARM_UP = 3
_DEFAULT_SIZE = (512, 1024)


@dataclass(frozen=True)
class Timing:
    """What one arm of a comparison costs. Times are milliseconds a batch.

    Attributes:
        p50, p95, p99: percentiles of a whole call.
        images_per_s: pictures a second, over all runs.
        pre, inference, post: medians of the stages; see `Stages`.
        ratio: median over rounds of this arm's time divided by another's (the first's, unless said
            otherwise) in the same round.
    """

    name: str
    p50: float
    p95: float
    p99: float
    images_per_s: float
    pre: float
    inference: float
    post: float
    ratio: float


def interleave(
    arms: Mapping[str, Callable[[], Stages]],
    runs: int,
    batch: int,
    warm_up: int = _WARM_UP,
    over: Mapping[str, str] | None = None,
) -> list[Timing]:
    """Call every arm ``runs`` times, in turns and in changing order, after ``warm_up`` calls not counted.

    Args:
        batch: pictures a call.
        over: the arm that another's ratio is over, where it is not the first.
    """
    names = list(arms)
    over = dict.fromkeys(names, names[0]) | dict(over or {})
    for _ in range(warm_up):
        for name in names:
            arms[name]()
    taken: dict[str, list[Stages]] = {name: [] for name in names}
    for turn in range(runs):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(arms[name]())
    seconds = {name: np.array(taken[name]) for name in names}
    return [_timing(name, seconds[name], seconds[over[name]].sum(1), batch) for name in names]


def _timing(name: str, stages: NDArray[np.float64], other: NDArray[np.float64], batch: int) -> Timing:
    """From seconds (runs, 3) of an arm, and seconds (runs,) of the one that its ratio is over."""
    whole = stages.sum(1)
    p50, p95, p99 = 1000 * np.percentile(whole, (50, 95, 99))
    pre, inference, post = 1000 * np.median(stages, axis=0)
    numbers = (p50, p95, p99, batch / whole.mean(), pre, inference, post, np.median(whole / other))
    return Timing(name, *map(float, numbers))


def stages(segmenter: Segmenter, pictures: NDArray[np.uint8]) -> Callable[[], Stages]:
    """Label pictures (n, H, W, 3) and time the stages. They have the size the graph is to run at: the
    recipe's resize is not part of it.
    """

    def call() -> Stages:
        start = time.perf_counter()
        batch = segmenter.preprocess(pictures)
        prepared = time.perf_counter()
        found = segmenter.infer(batch)
        inferred = time.perf_counter()
        segmenter.postprocess(found, pictures.shape[1:3])
        return prepared - start, inferred - prepared, time.perf_counter() - inferred

    return call


def bench(
    paths: list[Path],
    size: tuple[int, int] | None = None,
    batch: int = 1,
    threads: int | None = None,
    runs: int = 50,
    device: str = "auto",
    allow_cpu: bool = False,
) -> dict[str, Any]:
    """Time exported graphs against each other on noise.

    Args:
        paths: the ONNX files; ratios are over the first.
        size: height and width; by default the first graph's own, see `default_size`.
        batch: pictures a call.
        threads, device, allow_cpu: as `Segmenter` takes them.
        runs: measured calls of each graph.

    Returns:
        The machine and the settings, and under ``timings`` a `Timing` of every graph as a dictionary.

    Raises:
        UserError: a graph cannot be opened or run, two are the same, or a number makes no sense.
    """
    if len({str(path) for path in paths}) < len(paths):
        raise UserError("the same graph is named twice")
    if min(batch, runs) < 1:
        raise UserError(f"--batch {batch}, --runs {runs}: expected at least 1 of each")
    segmenters = {str(path): Segmenter(path, device, allow_cpu=allow_cpu, threads=threads) for path in paths}
    first = next(iter(segmenters.values()))
    size = size or default_size(first)
    for name, segmenter in segmenters.items():
        if segmenter.size not in (None, tuple(size)):
            raise UserError(f"{name}: takes pictures of {segmenter.size} only; give --size so")
    height, width = size
    if not (min(size) >= 1 and batch * height * width < 2**30):
        raise UserError(f"--size {height},{width}, --batch {batch}: expected 1 to {2**30} pixels in all")
    pictures = noise(batch, height, width)
    timings = interleave({name: stages(made, pictures) for name, made in segmenters.items()}, runs, batch)
    where = first.device
    del segmenters, segmenter, first  # their memory is not to count
    memory = [peak_mib(path, where, threads, (batch, height, width)) for path in paths]
    return {
        **machine(where),
        "onnxruntime": import_onnxruntime().__version__,
        "threads": threads,
        "batch": batch,
        "size": [height, width],
        "runs": runs,
        "timings": [asdict(t) | {"peak_mib": mib} for t, mib in zip(timings, memory, strict=True)],
    }


def default_size(segmenter: Segmenter) -> tuple[int, int]:
    """Height and width that a graph was exported for, or that its recipe has, or 512 x 1024."""
    known = segmenter.metadata
    return tuple(segmenter.size or known["resize"] or known.get("central_crop") or _DEFAULT_SIZE)


def machine(device: str) -> dict[str, Any]:
    """The device, its name, and the number of cores this process may use."""
    name = _cpu_name() if device == "cpu" else _nvidia_smi("name", device) or "an unknown GPU"
    return {"device": device, "device_name": name, "cores": usable_cores()}


_TITLES = (
    "model",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "images/s",
    "pre / inference / post ms",
    "peak MiB",
    "ratio",
)


def table(result: dict[str, Any]) -> str:
    """What `bench` found: a line about the machine and a Markdown table."""
    threads = f"{result['threads']} threads" if result["threads"] else "onnxruntime's choice of threads"
    height, width = result["size"]
    where = (
        f"{result['device_name']} ({result['device']}, {result['cores']} cores), {threads}, "
        f"onnxruntime {result['onnxruntime']}, batch {result['batch']}, {height}x{width}, "
        f"{result['runs']} runs"
    )
    rows = [
        (
            row["name"],
            *(f"{row[part]:.1f}" for part in ("p50", "p95", "p99")),
            f"{row['images_per_s']:.2f}",
            f"{row['pre']:.1f} / {row['inference']:.1f} / {row['post']:.1f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
            f"{row['ratio']:.3f}",
        )
        for row in result["timings"]
    ]
    return f"{where}\n\n{markdown_table(_TITLES, rows)}"


def noise(batch: int, height: int, width: int) -> NDArray[np.uint8]:
    """Pictures (n, H, W, 3), the same ones every time."""
    return np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)


def peak_mib(path: Path, device: str, threads: int | None, shape: tuple[int, int, int]) -> float | None:
    """Peak memory of a process of its own that runs the graph on ``shape`` (batch, height, width), MiB."""
    arguments = [str(path), device, str(threads or 0), *map(str, shape)]
    code = "import sys; from segdeconv.bench import _memory_of_this_process as f; print(f(*sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["the process was killed"])[-1]
        raise UserError(f"{path}: no memory could be measured ({reason})")
    last = done.stdout.split()[-1]
    return None if last == "None" else float(last)


def _memory_of_this_process(path: str, device: str, threads: str, *shape: str) -> float | None:
    before = _gpu_used(device)
    segmenter = Segmenter(path, device, threads=int(threads) or None)
    stages(segmenter, noise(*map(int, shape)))()
    after = _gpu_used(device)
    if before is not None and after is not None:
        return after - before  # onnxruntime's arena does not shrink, so the end is the peak
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _gpu_used(device: str) -> float | None:
    used = None if device == "cpu" else _nvidia_smi("memory.used", device)
    return None if used is None else float(used.split()[0])


def _nvidia_smi(query: str, device: str) -> str | None:
    """None where it cannot be asked."""
    number = device.partition(":")[2]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # of which nvidia-smi knows nothing
    try:
        place = visible.split(",")[int(number)].strip() if visible else number
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", place]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, IndexError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""What deployed networks cost, network deconvolution beside batch norm: writes docs/latency.md.

    python tools/bench_deploy.py                   # six networks at two sizes: hours on a CPU
    python tools/bench_deploy.py unet_mobilenet_v2 --sizes 512,1024 --engines onnxruntime eager --runs 5
    python tools/bench_deploy.py --device cuda     # adds the CUDA rows
    python tools/bench_deploy.py --table           # the page again, from what was measured

The networks are untrained, with 19 classes, folded after their statistics have seen some noise: weights do
not change what a layer costs. int8 is calibrated on noise, with every layer in int8. All arms of a network
and size take turns in one process. Each network and size leaves a JSON file in runs/latency, and is not
measured again with the same options, so a stopped run goes on where it was. The ratio nd/bn is the median
over the rounds; folded, both are the same layers, so it should be within 2% of 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx.shape_inference import infer_shapes
from torch import nn

from segdeconv.bench import Stages, interleave, machine, noise, peak_mib, stages
from segdeconv.checkpoint import CheckpointInfo
from segdeconv.config import load_recipe
from segdeconv.errors import one_sentence
from segdeconv.export import finish, network_graph, preparation_of, write_graph
from segdeconv.files import make_folder, to_json, write_text
from segdeconv.fold import fold_network_deconv
from segdeconv.interface import Interface
from segdeconv.markdown import markdown_table
from segdeconv.models import build_model, main_output
from segdeconv.precision import find_ranges, to_fp16, to_int8
from segdeconv.runtime import Segmenter, import_onnxruntime
from segdeconv.train import pick_device

NETWORKS = {
    "unet_mobilenet_v2": "U-Net, MobileNetV2",
    "deeplabv3plus_resnet50": "DeepLabV3+, ResNet-50",
    "fcn_resnet50": "FCN, ResNet-50",
    "pspnet_resnet50": "PSPNet, ResNet-50",
    "fpn_resnet50": "FPN, ResNet-50",
    "segformer_mit_b0": "SegFormer, MiT-B0",
}
ENGINES = ("onnxruntime", "eager", "compiled")
CLASSES = 19
RESULTS = Path("runs/latency")


def make(architecture: str, norm: str, side: int = 128) -> tuple[nn.Module, CheckpointInfo]:
    """A network with running values, of pictures of ``side`` pixels, in evaluation mode."""
    changes = {
        "model.architecture": architecture,
        "model.encoder": "null",
        "model.options": "{}",
        "model.norm": norm,
        "data.size": "null",
    }
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in changes.items()])
    torch.manual_seed(0)
    model, _ = build_model(recipe.model, CLASSES)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, side, side))
    names = tuple(f"class {number}" for number in range(CLASSES))
    palette = tuple((number, number, number) for number in range(CLASSES))
    return model.eval(), CheckpointInfo(recipe, "segmentation", names, palette, 1, {})


def torch_stages(model: nn.Module, pictures: np.ndarray, device: torch.device) -> Callable[[], Stages]:
    """As `segdeconv.bench.stages`, in PyTorch."""
    mean, std = 127.5, 64.0

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def call() -> Stages:
        start = time.perf_counter()
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device, torch.float32)
        images = ((images - mean) / std).contiguous()
        prepared = now()
        logits = main_output(model(images))
        inferred = now()
        logits.argmax(1).to(torch.uint8).cpu().numpy()
        return prepared - start, inferred - prepared, now() - inferred

    return call


def write_graphs(model: nn.Module, info: CheckpointInfo, folder: Path) -> dict[str, Path]:
    """The network as fp32, fp16 and int8 graphs of any size, by the name of what computes them."""
    interface, preparation = Interface(), preparation_of(info, model)
    core = infer_shapes(network_graph(model, interface, preparation))
    planes = np.random.default_rng(0).standard_normal((1, 3, 256, 256), np.float32)
    graphs = {
        "fp32": core,
        "fp16": to_fp16(core),
        "int8": to_int8(core, find_ranges(core, [planes], "MinMax")),
    }
    paths = {}
    for precision, graph in graphs.items():
        path = folder / f"{precision}_{info.recipe.model.norm}.onnx"
        write_graph(finish(graph, info, interface, preparation, precision=precision), path)
        paths[f"onnxruntime {precision}"] = path
    return paths


def measure(architecture: str, size: tuple[int, int], options: argparse.Namespace) -> dict[str, Any]:
    """All arms of one network at one size: a dictionary for JSON."""
    pictures, device = noise(options.batch, *size), torch.device(options.device)
    arms: dict[str, Callable[[], Stages]] = {}
    memory: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for norm in ("bn", "nd"):
            model, info = make(architecture, norm)
            if "onnxruntime" in options.engines:
                shape = (options.batch, *size)
                for engine, path in write_graphs(model, info, Path(folder)).items():
                    segmenter = Segmenter(path, options.device, threads=options.threads)
                    name = f"{engine} {norm}"
                    arms[name] = stages(segmenter, pictures)
                    memory[name] = peak_mib(path, segmenter.device, options.threads, shape)
            folded = fold_network_deconv(model).eval().to(device)
            if "eager" in options.engines:
                arms[f"PyTorch eager fp32 {norm}"] = torch_stages(folded, pictures, device)
            if "compiled" in options.engines:
                compiled: Any = torch.compile(folded, dynamic=False)
                arms[f"PyTorch compiled fp32 {norm}"] = torch_stages(compiled, pictures, device)
        over = {name: name[:-2] + "bn" for name in arms}
        timings = interleave(arms, options.runs, options.batch, warm_up=1, over=over)
    return {
        **machine("cpu" if device.type == "cpu" else f"cuda:{device.index or 0}"),
        "network": architecture,
        "size": list(size),
        "batch": options.batch,
        "threads": options.threads,
        "runs": options.runs,
        "engines": list(options.engines),
        "onnxruntime": import_onnxruntime().__version__,
        "torch": torch.__version__,
        "timings": [asdict(timing) | {"peak_mib": memory.get(timing.name)} for timing in timings],
    }


def _as_asked(result: dict[str, Any], options: argparse.Namespace) -> bool:
    wanted = (options.batch, options.threads, options.runs, list(options.engines))
    return tuple(result.get(key) for key in ("batch", "threads", "runs", "engines")) == wanted


def page(results: list[dict[str, Any]]) -> str:
    """docs/latency.md."""
    runs: dict[str, set[int]] = {}
    for result in results:
        runs.setdefault(_conditions(result), set()).add(result["runs"])
    lines = [
        "# Latency",
        "",
        "Written by `python tools/bench_deploy.py`, which says how it measures. Times are of one call with "
        "preparation of the picture and labels at the end, in milliseconds. Peak memory is that of a process "
        "of its own, or what it takes of the GPU's."
        + _near_one(results)
        + ("" if any(result["device"] != "cpu" for result in results) else " Not measured on a GPU yet."),
        "",
    ]
    if any(result["runs"] < 20 for result in results):
        lines[2] += " p95 of so few runs is nearly the slowest."
    lines += [f"- {where}, {', '.join(map(str, sorted(n)))} runs" for where, n in sorted(runs.items())]
    for architecture, title in NETWORKS.items():
        for result in (r for r in results if r["network"] == architecture and r["device"] == "cpu"):
            height, width = result["size"]
            on_gpu = [
                r
                for r in results
                if (r["network"], r["size"]) == (architecture, result["size"]) and r["device"] != "cpu"
            ]
            rows = [_row("CPU", timing) for timing in _by_engine(result["timings"])]
            rows += [_row("CUDA", timing) for timing in _by_engine(on_gpu[0]["timings"] if on_gpu else [])]
            lines += ["", f"## {title}, {height}x{width}", "", markdown_table(_TITLES, rows).rstrip()]
    return "\n".join(lines) + "\n"


def _near_one(results: list[dict[str, Any]]) -> str:
    """How far the ratios are from what they should be, which is how exact the page is."""
    timings = [timing for result in results for timing in result["timings"]]
    ratios = [round(timing["ratio"], 3) for timing in timings if timing["name"].endswith(" nd")]
    if not ratios:
        return ""
    near = sum(0.98 <= ratio <= 1.02 for ratio in ratios)
    return (
        " Folded, twins are the same layers, so nd/bn, the median over rounds in turns, should be 1: "
        f"{near} of {len(ratios)} are within 2% of it, the lowest is {min(ratios):.3f}, the highest "
        f"{max(ratios):.3f}."
    )


_TITLES = ("device", "engine", "norm", "p50", "p95", "images/s", "nd/bn", "peak MiB")


def _by_engine(timings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both norms of an engine together, engines as they came."""
    engines = [timing["name"][:-3] for timing in timings]
    return sorted(timings, key=lambda timing: engines.index(timing["name"][:-3]))


def _conditions(result: dict[str, Any]) -> str:
    threads = f"{result['threads']} threads" if result["threads"] else "threads as the engines choose"
    return (
        f"{result['device_name']} ({result['device']}, {result['cores']} cores), {threads}, batch "
        f"{result['batch']}, onnxruntime {result['onnxruntime']}, PyTorch {result['torch']}"
    )


def _row(device: str, timing: dict[str, Any]) -> tuple[str, ...]:
    engine, _, norm = timing["name"].rpartition(" ")
    ratio = f"{timing['ratio']:.3f}" if norm == "nd" else ""
    peak = f"{timing['peak_mib']:.0f}" if timing["peak_mib"] else ""
    times = (f"{timing['p50']:.0f}", f"{timing['p95']:.0f}", f"{timing['images_per_s']:.2f}")
    return device, engine, norm, *times, ratio, peak


def height_and_width(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(","))  # argparse says which value it is where this fails
    return height, width


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", choices=[*NETWORKS, []], help=", ".join(NETWORKS))
    sizes = [(512, 1024), (1024, 2048)]
    parser.add_argument("--sizes", nargs="+", type=height_and_width, default=sizes, metavar="H,W")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of both engines")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--out", type=Path, default=Path("docs/latency.md"))
    options = parser.parse_args()
    if min(options.runs, options.batch, options.threads or 1) < 1:
        parser.error("--runs, --batch and --threads must be positive")
    options.device = str(pick_device(options.device))
    if options.threads:
        torch.set_num_threads(options.threads)
    make_folder(RESULTS)
    for architecture in [] if options.table else options.networks or NETWORKS:
        for height, width in options.sizes:
            path = RESULTS / f"{architecture}_{height}x{width}_{options.device.partition(':')[0]}.json"
            if path.exists() and _as_asked(json.loads(path.read_text()), options):
                continue
            result = measure(architecture, (height, width), options)
            write_text(path, to_json(result, indent=2))
            for timing in result["timings"]:
                print(architecture, f"{height}x{width}", *_row(options.device, timing), flush=True)
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    write_text(options.out, page(found))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

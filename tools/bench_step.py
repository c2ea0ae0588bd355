"""What a training step costs: network deconvolution beside batch norm, interleaved in one run.

    python tools/bench_step.py                                   # the three target networks
    python tools/bench_step.py resnet18_cifar --batch 128 --arms bn fast exact
    python tools/bench_step.py unet_resnet18 --batch 8 --size 160 224

A step is forward, loss, backward and optimiser, on the GPU where there is one. A cycle is twenty steps, in
which the fast mode refreshes every layer's whitening matrix once. The arms take turns step by step, on a GPU
cycle by cycle (training does not wait for it at every step), so that a slow minute of the machine meets all.
Printed are the median cycle's time over batch norm's (lowest and highest cycle in brackets), floating-point
operations counted a step, and peak memory: of the GPU, or of a process of its own. On a GPU also the time
that it works a step and how many kernels that takes, by torch's profiler; what is left of the step it waits.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from segdeconv.config import ModelConfig, NetworkDeconvConfig, TrainConfig
from segdeconv.errors import UserError, one_sentence
from segdeconv.graphs import StepGraphs
from segdeconv.layers import Whitened
from segdeconv.losses import loss_of
from segdeconv.models import build_model, resolve
from segdeconv.schedule import RefreshSchedule
from segdeconv.train import make_optimizer, pick_device, tf32_matmul


@dataclass(frozen=True)
class Network:
    architecture: str
    batch: int
    size: tuple[int, int]
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False
    graphs: bool = False


TARGETS = {
    "resnet18_cifar": Network("cifar_resnet18", 64, (32, 32)),
    "unet_mobilenet_v2_camvid": Network(
        "unet_mobilenet_v2", 8, (160, 224), {"decoder_channels": [128, 64, 48, 32, 16]}
    ),
    "deeplabv3_resnet50_cityscapes": Network("deeplabv3_resnet50", 2, (512, 1024)),
}
ARMS = ("bn", "fast", "exact", "reference")
CLASSES = 19
CYCLE = NetworkDeconvConfig().refresh_every


def stepper(network: Network, arm: str, device: torch.device, amp: bool) -> Callable[[], None]:
    """One training step on random images, past the warm-up of the fast mode's schedule.

    Two are done already, in the first of which every layer refreshes its whitening: that is where memory
    peaks. Where there is something to compile or to record it is two cycles, and on a GPU two more, in which
    memory is counted anew, without what choosing kernels takes once.
    """
    config = ModelConfig(network.architecture, norm="bn", options=network.options)
    if arm != "bn":
        config = replace(config, norm="nd", network_deconv=NetworkDeconvConfig(mode=arm))  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model(config, CLASSES)[0].to(device).train()
    recipe = TrainConfig()
    optimizer = make_optimizer(model, recipe)
    images = torch.randn(network.batch, 3, *network.size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)  # as the loaders make them
    labels = (network.batch, *(network.size if resolve(config)[0].task == "segmentation" else ()))
    targets = torch.randint(CLASSES, labels, device=device)

    forward = torch.compile(model, fullgraph=True) if network.compiled else model
    dtype = torch.bfloat16 if amp and network.compiled else None
    refreshes = RefreshSchedule(model, dtype) if network.compiled else None

    def gradients(images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            output = forward(images)
        loss = loss_of(output, targets, recipe, 255)
        loss.backward()
        return loss.detach()

    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = gradients

    def step() -> None:
        if refreshes is not None:
            refreshes.step()
        optimizer.zero_grad(set_to_none=True)
        compute(images, targets)
        optimizer.step()

    step()
    for layer in model.modules():
        if isinstance(layer, Whitened):
            layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": torch.tensor(1000)})
    for _ in range(1 + (device.type == "cuda")):
        compute, refreshes = gradients, None  # nothing holds graphs that were recorded before
        optimizer.zero_grad(set_to_none=True)
        if network.graphs:
            compute, refreshes = StepGraphs(model, gradients, dtype), None  # which has a schedule of its own
        elif network.compiled:
            refreshes = RefreshSchedule(model, dtype)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        # Makes both graphs; without any, every layer refreshes on its own step of a cycle.
        many = network.graphs or network.compiled or device.type == "cuda"
        for _ in range(2 * CYCLE + 1 if many else 1):
            step()
    return step


def _of_convolution_backward(
    grad: list[int], x: list[int], weight: list[int], bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, wanted: list[bool], **_: Any,
) -> int:  # fmt: skip
    return sum(wanted[:2]) * conv_flop_count(x, weight, grad, transposed)


def operations(step: Callable[[], object], times: int = 1) -> float:
    """Floating-point operations a step, a multiplication and an addition being two."""
    # torch 2.14 counts a grouped convolution's weight gradient as many times too high as there are groups.
    right = {torch.ops.aten.convolution_backward: _of_convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=right)
    with counter:
        for _ in range(times):
            step()
    return counter.get_total_flops() / times


def seconds(step: Callable[[], None], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gpu_work(step: Callable[[], None]) -> tuple[float, float]:
    """How long the GPU works a step, ms, and how many kernels and copies that takes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CYCLE):
            step()
        torch.cuda.synchronize()
    work = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return sum(event.time_range.elapsed_us() for event in work) / CYCLE / 1e3, len(work) / CYCLE


def stepper_and_peak_mib(
    network: Network, arm: str, device: torch.device, amp: bool
) -> tuple[Callable[[], None], float]:
    """`stepper`, and on a GPU the peak memory of its steps: a compiled network is not made twice for that."""
    if device.type != "cuda":
        return stepper(network, arm, device, amp), 0.0
    torch.ones(8, 8, device=device).matmul(torch.ones(8, 8, device=device))  # cuBLAS takes its memory once
    gc.collect()  # compiled networks refer to themselves
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = stepper(network, arm, device, amp)
    return step, (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_mib(name: str, network: Network, arm: str, amp: bool) -> float:
    """Peak memory of the training steps on the CPU, MiB, beyond what the imports take."""
    command = [sys.executable, __file__, name, "--arms", arm, "--memory-of-this-process"]
    command += ["--batch", str(network.batch), "--size", *map(str, network.size)]
    command += ["--amp"] * amp + ["--compile"] * network.compiled  # the CPU has no CUDA graphs
    command += ["--threads", str(torch.get_num_threads())]
    # glibc would keep freed activations: without a threshold every large block goes back at once.
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def memory_of_this_process(network: Network, arm: str, amp: bool) -> float:
    def status(key: str) -> float:
        with open("/proc/self/status") as file:
            return next(float(line.split()[1]) / 1024 for line in file if line.startswith(key))

    before = status("VmRSS")
    stepper(network, arm, torch.device("cpu"), amp)()
    return status("VmHWM") - before


def bench(name: str, network: Network, arms: list[str], cycles: int, device: torch.device, amp: bool) -> None:
    height, width = network.size
    print(f"\n{name}: batch {network.batch}, {height}x{width}", flush=True)
    torch.compiler.reset()  # or code of the networks before counts as versions of this one's
    steps, peaks = {}, {}
    for arm in arms:
        steps[arm], peaks[arm] = stepper_and_peak_mib(network, arm, device, amp)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    at_a_time = CYCLE if device.type == "cuda" else 1
    for number in range(cycles):
        cycle = dict.fromkeys(arms, 0.0)
        for turn in range(number, number + CYCLE // at_a_time):
            for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                cycle[arm] += seconds(steps[arm], at_a_time, device) / CYCLE
        for arm in arms:
            times[arm].append(cycle[arm])
    work = {arm: gpu_work(steps[arm]) if device.type == "cuda" else None for arm in arms}
    if network.graphs or network.compiled:  # whose operations nobody sees
        plain = replace(network, graphs=False, compiled=False)
        steps = {arm: stepper(plain, arm, device, amp) for arm in arms}
    gflop = {arm: operations(steps[arm], CYCLE if arm == "fast" else 1) / 1e9 for arm in arms}
    if device.type != "cuda":
        steps.clear()
        peaks = {arm: peak_mib(name, network, arm, amp) for arm in arms}
    base = arms[0]
    print(f"  {'':10} {'ms a step':>9} {f'over {base}':>22} {'GFLOP':>9} {'':>7} {'MiB':>7}")
    for arm in arms:
        ratios = [t / b for t, b in zip(times[arm], times[base], strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(
            f"  {arm:10} {1e3 * statistics.median(times[arm]):9.2f} {spread:>22} {gflop[arm]:9.1f} "
            f"{gflop[arm] / gflop[base]:6.2f}x {peaks[arm]:7.0f} {peaks[arm] / peaks[base]:5.2f}x",
            flush=True,
        )
    for arm, found in work.items():
        if found is not None:
            print(f"  {arm:10} {found[0]:9.2f} ms of work for the GPU in {found[1]:.0f} kernels", flush=True)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"{', '.join(TARGETS)} or any architecture of a recipe")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["bn", "fast"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--amp", action="store_true", help="bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile, both twins")
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs, as train.cuda_graphs")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--memory-of-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers = (arguments.cycles, arguments.batch, arguments.threads, *(arguments.size or ()))
    if min(number for number in numbers if number is not None) < 1:
        parser.error("--cycles, --batch, --size and --threads must be at least 1")
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    if arguments.graphs and device.type != "cuda":
        raise UserError("--graphs needs a GPU")
    for name in arguments.networks or TARGETS:
        network = TARGETS.get(name) or Network(name, 8, (160, 224))
        network = replace(
            network,
            batch=arguments.batch or network.batch,
            size=tuple(arguments.size) if arguments.size else network.size,
            compiled=arguments.compile,
            graphs=arguments.graphs,
        )
        if arguments.memory_of_this_process:
            print(memory_of_this_process(network, arguments.arms[0], arguments.amp))
        else:
            with tf32_matmul(device, arguments.amp):
                bench(name, network, arguments.arms, arguments.cycles, device, arguments.amp)


if __name__ == "__main__":
    main()

"""What a training step costs: network deconvolution beside batch norm, interleaved in one run.

    python tools/bench_step.py                                   # the three target networks
    python tools/bench_step.py resnet18_cifar --batch 128 --arms bn fast exact
    python tools/bench_step.py unet_resnet18 --batch 8 --size 160 224

A step is forward, loss, backward and optimiser, on the GPU where there is one. A cycle is twenty steps, in
which the fast mode refreshes every layer's whitening matrix once. Every arm is a process of its own. They
take turns step by step, on a GPU cycle by cycle (training does not wait for it at every step), so that a slow
minute of the machine meets all. Compiling for a GPU takes minutes, so all networks do it at once, before the
first is measured. Printed are the median cycle's time over batch norm's (lowest and highest cycle in
brackets), floating-point operations counted a step, and peak memory, of the GPU or of the process. On a GPU
also the time that it works a step and how many kernels that takes, by torch's profiler; what is left of the
step it waits.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from segdeconv.config import ModelConfig, NetworkDeconvConfig, TrainConfig
from segdeconv.errors import UserError, one_sentence
from segdeconv.graphs import StepGraphs
from segdeconv.layers import Whitened
from segdeconv.losses import loss_of
from segdeconv.models import build_model, resolve
from segdeconv.schedule import RefreshSchedule
from segdeconv.train import pick_device
from segdeconv.trainer import make_optimizer, tf32_matmul


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
    if device.type == "cpu":
        time.sleep(0.02)  # threads of the arm before spin a while for more work
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


class Arm:
    """An arm's steps in a process of its own: arms compile beside each other, and share no memory."""

    def __init__(self, network: Network, arm: str, device: torch.device, amp: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        arguments = (theirs, torch.get_num_threads(), network, arm, device, amp)
        self.process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.name = arm
        self.peak: float | None = None

    def peak_mib(self) -> float:
        """Peak memory of its first steps, of the GPU or of the process. Waits until they are done."""
        if self.peak is None:
            self.peak = float(self._answer())
        return self.peak

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of the step and the arguments returns there."""
        self.peak_mib()  # the first answer
        self.pipe.send((function, arguments))
        return self._answer()

    def end(self) -> None:
        self.pipe.close()
        self.process.join()

    def _answer(self) -> Any:
        try:
            answer = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"{self.name}: its process has ended; the reason is above") from None
        if isinstance(answer, UserError):
            raise answer
        return answer


Prepared = tuple[str, Network, dict[str, Arm]]


def _serve(
    pipe: Connection, threads: int, network: Network, arm: str, device: torch.device, amp: bool
) -> None:
    """The process of an `Arm`, which ends with it."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        ones = torch.ones(8, 8, device=device)
        ones.matmul(ones)  # cuBLAS takes its memory once
    with contextlib.suppress(EOFError, BrokenPipeError), tf32_matmul(device, amp):
        try:
            before = memory_mib(device, peak=False)
            step = stepper(network, arm, device, amp)
            step()
            pipe.send(memory_mib(device, peak=True) - before)
        except UserError as error:
            pipe.send(error)
            return
        while True:
            function, arguments = pipe.recv()
            pipe.send(function(step, *arguments))


def memory_mib(device: torch.device, peak: bool) -> float:
    """Memory of the GPU that tensors take, or memory of this process; now, or at most."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
    with open("/proc/self/status") as file:
        key = "VmHWM" if peak else "VmRSS"
        return next(float(line.split()[1]) / 1024 for line in file if line.startswith(key))


def bench(
    name: str, network: Network, arms: dict[str, Arm], cycles: int, device: torch.device, amp: bool
) -> None:
    height, width = network.size
    print(f"\n{name}: batch {network.batch}, {height}x{width}", flush=True)
    names = list(arms)
    peaks = {arm: steps.peak_mib() for arm, steps in arms.items()}
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    at_a_time = CYCLE if device.type == "cuda" else 1
    for number in range(cycles):
        cycle = dict.fromkeys(arms, 0.0)
        for turn in range(number, number + CYCLE // at_a_time):
            for arm in names[turn % len(names) :] + names[: turn % len(names)]:
                cycle[arm] += arms[arm](seconds, at_a_time, device) / CYCLE
        for arm in arms:
            times[arm].append(cycle[arm])
    work = {arm: steps(gpu_work) if device.type == "cuda" else None for arm, steps in arms.items()}
    if network.graphs or network.compiled:  # whose operations nobody sees
        for steps in arms.values():
            steps.end()
        plain = replace(network, graphs=False, compiled=False)
        arms = {arm: Arm(plain, arm, device, amp) for arm in names}
    gflop = {arm: steps(operations, CYCLE if arm == "fast" else 1) / 1e9 for arm, steps in arms.items()}
    for steps in arms.values():
        steps.end()
    for arm in names if device.type != "cuda" else ():
        # glibc would keep freed activations: without a threshold every large block goes back at once.
        with mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"):
            steps = Arm(network, arm, device, amp)
        peaks[arm] = steps.peak_mib()
        steps.end()
    base = names[0]
    print(f"  {'':10} {'ms a step':>9} {f'over {base}':>22} {'GFLOP':>9} {'':>7} {'MiB':>7}")
    for arm in names:
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
    names = arguments.networks or TARGETS
    prepared: Iterable[Prepared] = (prepare(name, arguments, device) for name in names)
    if arguments.compile and device.type == "cuda":  # minutes each, of one core
        prepared = list(prepared)
        for name, _, arms in prepared:
            for steps in arms.values():
                print(f"{name}: {steps.name} is ready, {steps.peak_mib():.0f} MiB", flush=True)
    for name, network, arms in prepared:
        bench(name, network, arms, arguments.cycles, device, arguments.amp)


def prepare(name: str, arguments: argparse.Namespace, device: torch.device) -> Prepared:
    network = TARGETS.get(name) or Network(name, 8, (160, 224))
    network = replace(
        network,
        batch=arguments.batch or network.batch,
        size=tuple(arguments.size) if arguments.size else network.size,
        compiled=arguments.compile,
        graphs=arguments.graphs,
    )
    return name, network, {arm: Arm(network, arm, device, arguments.amp) for arm in arguments.arms}


if __name__ == "__main__":
    main()

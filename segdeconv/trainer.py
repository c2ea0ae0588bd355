"""Training steps: what turns a batch into the next weights. The run around them is in `segdeconv.train`."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import timm.layers
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from segdeconv.checkpoint import named, restore_training, training_tensors
from segdeconv.config import TrainConfig
from segdeconv.distributed import rank, says_a_process_is_gone, world_size
from segdeconv.errors import UserError, first_line, out_of_memory, shortage
from segdeconv.evaluate import AMP
from segdeconv.graphs import StepGraphs
from segdeconv.losses import loss_of
from segdeconv.schedule import RefreshSchedule


class Trainer:
    """The network, its optimiser and whatever else a training step changes.

    It knows nothing of folders, logs, signals or validation. A step, in order:

    1. seeds the random numbers, by the run's seed, the step and the rank, and sets its learning rate;
    2. makes the whitening matrices that are due, where the layers do not see to it themselves;
    3. computes the loss and its gradients, on the network as it is, compiled, or recorded as CUDA graphs;
    4. looks at the losses since it last did, every ``check_every`` steps and at an epoch's end;
    5. clips the gradients, updates the weights and the scale of the loss, and averages the weights.

    Args:
        model: on its device. With several processes, and GPUs, its batch norms become synchronised ones.
        steps_per_epoch: for the learning rate, and to name a step whose loss is not finite.
        ignore_index: the target that does not count.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, steps_per_epoch: int, ignore_index: int
    ) -> None:
        self.model, self.config = model, config
        self.steps_per_epoch, self.ignore_index = steps_per_epoch, ignore_index
        self.step = 0  # how many are made
        self.device = device = next(model.parameters()).device
        # The twin's, or those in model.keep.
        self.has_batch_norm = any(isinstance(module, _BatchNorm) for module in model.modules())
        self.optimizer = make_optimizer(model, config)
        self.amp = AMP[config.amp]
        # Processes with batches of different shapes would compile graphs that may sum in different orders.
        self.compiles = config.compile and config.batch_size % world_size() == 0
        self.records = config.cuda_graphs and world_size() == 1 and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(model, config.ema_decay) if config.ema_decay else None
        self.parallel: Callable[..., Any] = self._parallel()
        self.forward_backward: Callable[[Tensor, Tensor], Tensor] = self._forward_backward
        self.refreshes: RefreshSchedule | None = None
        # Losses not looked at yet, with their images: on a GPU looking means waiting.
        self.check_every = 1 if device.type == "cpu" else 10
        self.unchecked: list[tuple[Tensor, Tensor]] = []

    def _parallel(self) -> nn.Module:
        """The network as steps call it; validation, whose pictures have other sizes, calls the plain one."""
        several, on_gpu = world_size() > 1, self.device.type != "cpu"
        if several and on_gpu and self.has_batch_norm:
            self.model = timm.layers.convert_sync_batchnorm(self.model)
        if several and self.compiles:  # DDP's optimiser cuts graphs, which older torch cannot do with ours
            torch._dynamo.config.optimize_ddp = False
        network = cast(nn.Module, torch.compile(self.model)) if self.compiles else self.model
        if not several:
            return network
        with warnings.catch_warnings():  # newer torch has another name for broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(
                network,
                device_ids=[self.device] if on_gpu else None,
                # Whitened layers have the same running values on all ranks; batch norm on the CPU does not.
                broadcast_buffers=self.has_batch_norm,
                static_graph=True,
            )

    @property
    def evaluated(self) -> nn.Module:
        """The network that is scored and kept: the averaged one, where there is an average."""
        return self.model if self.ema is None else self.ema.module

    def state_tensors(self) -> dict[str, Tensor]:
        """Network, optimiser and average as named tensors. A state needs `step` and `scaler` besides."""
        average = {} if self.ema is None else self.ema.state_dict()
        tensors = training_tensors(self.model, self.optimizer)
        return tensors | {f"ema.{key}": value for key, value in average.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `state_tensors` made. Raises RuntimeError if the network is another."""
        restore_training(tensors, self.model, self.optimizer)
        if self.ema is not None:
            self.ema.load_state_dict(named("ema", tensors))

    def start(self) -> None:
        """Once, with the state loaded, before the first step: a schedule of refreshes, which compiled steps
        and CUDA graphs need. Without it layers decide for themselves and nothing is recorded: a dry run.
        """
        if self.records:  # the graphs have a schedule of their own
            dtype = self.amp if self.compiles else None
            self.forward_backward = StepGraphs(self.model, self._forward_backward, dtype)
        elif self.compiles:
            self.refreshes = RefreshSchedule(self.model, self.amp)

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0 over all epochs."""
        config = self.config
        steps, warmup = (round(n * self.steps_per_epoch) for n in (config.epochs, config.warmup_epochs))
        return config.lr * lr_factor(step, steps, warmup, config.schedule, config.poly_power)

    def train_step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step on this process's share of a batch: images (n, 3, H, W), labels (n, H, W) or (n,).

        Returns:
            The loss of the whole batch before the step, (); to read it is to wait for the device.

        Raises:
            UserError: a loss is not finite, or the network cannot take the batch.
        """
        config = self.config
        seed_everything(int(np.random.SeedSequence((config.seed, self.step, rank())).generate_state(1)[0]))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with self.explained(images):
            self.optimizer.zero_grad(set_to_none=True)
            # Training only: validation is to score what `segdeconv eval` does.
            with tf32_matmul(self.device, self.amp is not None):
                if self.refreshes is not None:
                    self.refreshes.step()
                # A blocking copy would wait for the step before.
                batch = (part.to(self.device, non_blocking=True) for part in (images, targets))
                loss = self.forward_backward(*batch)
            self.unchecked.append((loss, images))
            if len(self.unchecked) == self.check_every or (self.step + 1) % self.steps_per_epoch == 0:
                self._check_finite()
            if config.clip_grad is not None:
                self.scaler.unscale_(self.optimizer)
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.ema is not None:
                self.ema.update(self.model, self.step + 1)  # after the first step it is the network itself
        self.step += 1
        return loss

    def _forward_backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of a batch; its gradients are added to those there are."""
        with self._autocast():
            output = self.parallel(images)
        loss = loss_of(output, targets, self.config, self.ignore_index)
        self.scaler.scale(loss).backward()
        if self.check_every > 1:  # not looked at yet: a bad loss must not spoil what `_check_finite` looks at
            bad = ~loss.detach().isfinite()
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.masked_fill_(bad, 0)
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    def _check_finite(self) -> None:
        """Look at the losses not looked at yet; the last is the current step's."""
        finite = torch.stack([loss for loss, _ in self.unchecked]).isfinite()
        if not finite.all():
            first = int(finite.int().argmin())
            loss, images = self.unchecked[first]
            epoch, done = divmod(self.step + 1 - len(self.unchecked) + first, self.steps_per_epoch)
            with self._autocast():
                where = first_bad_layer(self.model, images.to(self.device))
            raise UserError(
                f"the loss became {loss.item()} at step {done + 1} of epoch {epoch + 1}; {where}; try "
                f"a lower train.lr (now {self.config.lr}), a longer train.warmup_epochs, "
                "train.clip_grad, or train.amp: off"
            )
        self.unchecked.clear()

    @contextlib.contextmanager
    def explained(self, images: Tensor) -> Iterator[None]:
        """Around what the network does with a batch: a UserError of one sentence if it cannot take it."""
        try:
            yield
        except UserError:
            raise
        except (MemoryError, RuntimeError, ValueError, AssertionError) as error:
            if out_of_memory(error):
                raise UserError("the device ran out of memory; lower train.batch_size or data.crop") from None
            if self.config.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
                reason = first_line(getattr(error, "inner_exception", error))
                raise UserError(
                    f"torch.compile cannot compile the network ({reason}); on a CPU it needs a C++ compiler; "
                    "start a run with train.compile=false"
                ) from error
            after_a_step = self.step > 0 and isinstance(error, RuntimeError)  # so the network takes batches
            if after_a_step or shortage(error) or says_a_process_is_gone(error):
                raise
            raise UserError(
                f"the network cannot train on batches of shape {tuple(images.shape)} "
                f"({first_line(error)}); check train.batch_size, data.crop and model.options"
            ) from error


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str, power: float) -> float:
    """The learning rate at ``step`` of ``steps`` over its peak: linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "poly":
        return (1 - t) ** power
    if schedule == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    return 1.0


@contextlib.contextmanager
def tf32_matmul(device: torch.device, amp: bool) -> Iterator[None]:
    """Multiply float32 matrices in TF32 on a GPU, as convolutions are by default. For training in 16 bits,
    which rounds whitening matrices further anyway. A precision that the program has chosen itself stays.
    """
    try:
        undecided = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # chosen by torch's newer settings, which it does not let be read as an older one
        undecided = False
    if not (amp and device.type == "cuda" and undecided):
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of ``config``, of the parameters that are trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


@torch.no_grad()
def first_bad_layer(model: nn.Module, images: Tensor) -> str:
    """The first layer whose weights or output are not finite in a forward pass of ``images``, in words."""
    weights: list[str] = []
    outputs: list[str] = []

    def look(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not all(p.isfinite().all() for p in module.parameters(recurse=False)):
                weights.append(f"first the weights of {name} were not finite")
            elif isinstance(output, Tensor) and not output.isfinite().all():
                largest = max(
                    (x.abs().max().item() for x in inputs if isinstance(x, Tensor)), default=math.nan
                )
                outputs.append(
                    f"first {name} put out values that are not finite (its largest input {largest:.3g})"
                )

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if name and not next(module.children(), None):
                hooks.enter_context(module.register_forward_hook(look(name, module)))
        model(images)
    # A bad gradient spoils the weights of all layers before the one where it arose: the last is nearest.
    found = weights[-1:] or outputs
    return found[0] if found else "every layer's output is finite, so it was the loss itself"

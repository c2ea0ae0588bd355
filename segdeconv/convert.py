"""From a network with batch norm to its deconvolved twin.

`convert_to_network_deconv` swaps convolutions and linear layers for whitened ones and removes the batch norms
that belonged to them (structure.py says which); `calibrate` lets a trained network start as a deconvolved one
that computes the same function. Nothing here makes a network plain again: see fold.py.

Source: Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926), section 3.3.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from segdeconv.config import NetworkDeconvConfig
from segdeconv.distributed import world_size
from segdeconv.errors import UserError
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.structure import (
    HOOKS,
    NEVER_WHITENED,
    NORMS,
    STATIC_PADDING,
    TRANSPOSED,
    WEIGHTED,
    Structure,
    is_of_fixed_class,
    is_plain_layer,
    is_plain_norm,
    modes_kept,
    qualified_class,
    read_structure,
    set_to_evaluation,
)
from segdeconv.whitening import in_float64

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class LayerReport:
    """What happened to one module: ``action`` is 'swapped', 'removed' or 'kept'."""

    name: str
    kind: str
    action: str
    reason: str


@dataclass
class ConversionReport:
    """Every convolution, linear layer and batch norm of the network, and every module fx could not trace."""

    layers: list[LayerReport] = field(default_factory=list)
    untraced: list[tuple[str, str]] = field(default_factory=list)

    def count(self, action: str) -> int:
        return sum(layer.action == action for layer in self.layers)

    def removed(self) -> list[str]:
        return [layer.name for layer in self.layers if layer.action == "removed"]

    def summary(self) -> str:
        """Counts, and how often each reason for keeping a layer was given, on a line each."""
        reasons: collections.Counter[str] = collections.Counter()
        for layer in self.layers:
            if layer.action == "kept":
                named = layer.reason.startswith(("follows ", "feeds "))
                reasons[f"{layer.kind}: {'belongs to a kept layer' if named else layer.reason}"] += 1
        kept = [f"  kept {count} x {reason}" for reason, count in reasons.items()]
        return "\n".join([self._counts(), *kept, *self._untraced_lines()])

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"  {x.action:7} {x.name:{width}} {x.kind}: {x.reason}" for x in self.layers]
        return "\n".join([self._counts(), *lines, *self._untraced_lines()])

    def _counts(self) -> str:
        return ", ".join(f"{self.count(action)} {action}" for action in ("swapped", "removed", "kept"))

    def _untraced_lines(self) -> list[str]:
        return [
            f"  untraced {name or '(the network)'}: {reason}; its own layers are paired by module order, and "
            "those whose weight its forward pass reads itself have to be kept by name"
            for name, reason in self.untraced
        ]


def convert_to_network_deconv(
    model: nn.Module,
    config: NetworkDeconvConfig | None = None,
    filter: Filter | None = None,
    warm_start: bool | Filter = False,
) -> tuple[nn.Module, ConversionReport]:
    """Turn a network with batch norm into its deconvolved twin, in place.

    Convolutions and linear layers become `WhitenedConv2d` and `WhitenedLinear` with the same Parameters, and
    the batch norm behind each (or before it, in pre-activation networks) goes; the activation of a batch norm
    that carries one stays. Biases are added where there are none, and a warm start makes Parameters anew, so
    make the optimiser afterwards. Kept, with a reason in the report: transposed, 1d and 3d convolutions,
    layers that see 1x1 maps, layers in a part of the network that another norm looks after, layers before a
    frozen batch norm, subclasses with a forward of their own, what the forward pass does not use, and the
    batch norms of kept layers.

    Args:
        filter: ``(module, qualified name) -> bool``, asked for every 2d convolution, linear layer and batch
            norm; what it says no to is kept.
        warm_start: keep the function the network computes in evaluation: batch norms are folded into the
            layers before them, or stay as a depthwise 1x1 convolution where there is none. Follow with
            `calibrate`. Without it the network is to be trained from scratch: filters whose batch norm goes
            are brought to ``config.filter_norm``, and the other weights stay as they are. Where a part is
            trained and the rest is new, ``(module, qualified name) -> bool``, asked for what ``filter`` is
            asked for, says yes to what is in that part, and ``calibrate(model.encoder, batches)`` follows.
            Running values that are not those of a new batch norm are warned of where nothing keeps them.

    Returns:
        ``model`` itself and the report.

    Raises:
        UserError: a batch norm has no convolution or linear layer next to it, so that removing or keeping it
            would silently change the network; there is nothing to convert; parameters are lazy or of
            torch.inference_mode; or config is something else. The network is unchanged.
    """
    config = NetworkDeconvConfig() if config is None else config
    _check_convertible(model, config)
    modules: dict[str, Any] = dict(model.named_modules())
    # Asked before anything changes: it is the caller's and may fail.
    warm = {
        name
        for name, module in modules.items()
        if isinstance(module, (*WEIGHTED, _BatchNorm))
        and (warm_start(module, name) if callable(warm_start) else warm_start)
    }
    structure = read_structure(model)
    report = _plan(model, modules, structure, filter, warm)
    _warn_of_lost(report, modules, warm)
    # Nothing below can fail, so an error leaves the network as it was.
    swaps = _replace_batch_norms(report, modules, structure, config, warm)
    swaps |= _whiten(report, modules, structure, config, warm)
    for name in structure.in_place:
        modules[name].inplace = False
    transform(swaps)
    return model, report


def _check_convertible(model: nn.Module, config: NetworkDeconvConfig) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model is {model!r}; expected a torch.nn.Module, as segdeconv.load(...) returns")
    if not isinstance(config, NetworkDeconvConfig):
        raise UserError(
            f"config is {config!r}; expected a NetworkDeconvConfig, as NetworkDeconvConfig(mode='exact')"
        )
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    lazy = next((name for name, tensor in tensors if is_lazy(tensor)), None)
    if lazy is not None:
        raise UserError(f"{lazy} has no shape yet; bring one batch through {type(model).__name__} first")
    if torch.is_inference_mode_enabled() or any(p.is_inference() for p in model.parameters()):
        raise UserError(
            f"{type(model).__name__} was made or is converted under torch.inference_mode and so cannot be "
            "changed or trained; do both outside, or under torch.no_grad"
        )


def _plan(
    model: nn.Module,
    modules: dict[str, Any],
    structure: Structure,
    filter: Filter | None,
    warm: set[str],
) -> ConversionReport:
    """What is to happen to every layer; `_whiten` adds what it makes of those that are swapped."""
    kept = {}
    for name, module in modules.items():
        reason = _reason_to_keep(name, module, modules, structure, filter)
        if reason:
            kept[name] = reason
    norms = [name for name, module in modules.items() if isinstance(module, _BatchNorm)]
    _refuse_lonely([name for name in norms if name not in kept], structure)
    report = ConversionReport(untraced=structure.untraced)
    for name, module in modules.items():
        if isinstance(module, (*WEIGHTED, *NEVER_WHITENED)):
            entry = ("kept", kept[name]) if name in kept else ("swapped", "")
        elif isinstance(module, _BatchNorm):
            entry = _plan_batch_norm(name, module, structure, kept, name in warm)
        else:
            continue
        report.layers.append(LayerReport(name, type(module).__name__, *entry))
    if not report.count("swapped"):
        why = next((f"; {layer.name} is kept: {layer.reason}" for layer in report.layers), "")
        raise UserError(f"{type(model).__name__} has no convolution or linear layer to whiten{why}")
    return report


def _warn_of_lost(report: ConversionReport, modules: dict[str, Any], warm: set[str]) -> None:
    lost = [name for name in report.removed() if name not in warm and _has_run(modules[name])]
    if lost:
        warnings.warn(
            f"the running values of {len(lost)} batch norms, as {lost[0]}, are those of a trained network, "
            "whose function is lost; convert_to_network_deconv(..., warm_start=True) and calibrate keep it",
            stacklevel=3,
        )


def _has_run(norm: Any) -> bool:
    mean, var = norm.running_mean, norm.running_var
    return mean is not None and not mean.is_meta and bool(mean.any() or (var != 1).any())


def _replace_batch_norms(
    report: ConversionReport,
    modules: dict[str, Any],
    structure: Structure,
    config: NetworkDeconvConfig,
    warm: set[str],
) -> dict[nn.Module, nn.Module]:
    """What replaces each removed batch norm: its activation, and in a warm start an affine not folded."""
    swaps: dict[nn.Module, nn.Module] = {}
    for name in report.removed():
        module = modules[name]
        swaps[module] = leftover(module)
        shares_its_input = name in structure.norm_before or name in structure.guessed
        for part in swaps[module].modules() if shares_its_input else ():
            if getattr(part, "inplace", False):
                part.inplace = False  # type: ignore[assignment]
        if name in warm:
            if name in structure.norm_after and name not in structure.guessed:
                fold_batch_norm(modules[structure.norm_after[name]], module)
            else:
                swaps[module] = nn.Sequential(_as_affine(module), swaps[module]).train(module.training)
        elif name in structure.norm_after and structure.norm_after[name] not in warm:
            _bring_filters_to(config.filter_norm, modules[structure.norm_after[name]])
    return swaps


def _whiten(
    report: ConversionReport,
    modules: dict[str, Any],
    structure: Structure,
    config: NetworkDeconvConfig,
    warm: set[str],
) -> dict[nn.Module, nn.Module]:
    """The whitened layer for each swapped one; the report says what it does."""
    # Frozen batch norms are in evaluation, in a network that trains: so is the layer that takes their place.
    modes: dict[str, bool] = {}
    for name in report.removed():
        after, before = structure.norm_after.get(name), structure.norm_before.get(name, [])
        modes |= dict.fromkeys(before if after is None else [after], modules[name].training)
    normalised = {structure.norm_after.get(name) for name in report.removed()}
    owners = collections.Counter(p for module in modules.values() for p in module.parameters(recurse=False))
    swaps: dict[nn.Module, nn.Module] = {}
    for offset, layer in enumerate(report.layers):
        module = modules[layer.name]
        if layer.action != "swapped":
            continue
        if isinstance(module, nn.Linear):
            whitened: Any = WhitenedLinear.from_linear(module, config)
            if layer.name not in normalised and owners[module.weight] == 1:
                whitened.hold_back(keep_function=layer.name in warm)
        else:
            whitened = WhitenedConv2d.from_conv(module, config)
        whitened.train(modes.get(layer.name, module.training))
        whitened.refresh_offset = offset
        report.layers[offset] = replace(layer, reason=_what_it_does(whitened))
        padded = qualified_class(module) == STATIC_PADDING
        swaps[module] = nn.Sequential(module.static_padding, whitened) if padded else whitened
        swaps[module].train(whitened.training)
    return swaps


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Measure every whitened layer's statistics and rewrite its weights so that the function stays the same.

    In evaluation, so layers that only run in training (GoogLeNet's auxiliary heads) stay as they are. Where
    several processes train together, all of them call it, with as many batches each: statistics are of all.

    W <- W D^-1 and b <- b + w'·μ, so that folding gives back what the layer computed before. Together with
    ``convert_to_network_deconv(model, warm_start=True)`` a trained batch-norm network becomes a deconvolved
    one that computes, in evaluation, what the batch-norm network did.

    Args:
        model: a freshly converted network (whitening at identity) or an already trained one.
        batches: image batches (n, C, H, W) on the model's device, in the form it is trained on. Some dozens
            of images serve; in fast mode a single one not where a linear layer reads one value per feature.

    Returns:
        ``model``, in the mode it was in.

    Raises:
        UserError: no batch was given or one is no images, the network holds no whitened layer, one of them
            shares its weight or bias with another layer or has none of its own, saw no more than one value
            per channel, or statistics are not finite.
        ValueError: a layer cannot take an input of that shape.
        In either case the network is unchanged.
    """
    if isinstance(batches, Tensor):  # or each of its images would count as a batch
        raise UserError("calibrate: batches is a single tensor; expected batches of images, as in [images]")
    layers = _rewritable_layers(model)
    # Copies observe, so that the network computes what it did while its statistics are measured.
    observers = {name: copy.deepcopy(layer, _no_hooks(layer)) for name, layer in layers.items()}
    for observer in observers.values():
        observer.reset_running_stats()

    def observe(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if not x.to(torch.promote_types(x.dtype, torch.float32)).square().sum().isfinite():
                raise UserError(f"calibrate: the statistics of {name} are not finite; check the input images")
            try:
                observers[name].observe(x)
            except ValueError as error:
                raise ValueError(f"calibrate: {name} got {error}") from None
            values[name] += x.numel() // math.prod(observers[name]._shape[:3])  # by all channels

        return hook

    count, values = 0, collections.Counter[str]()
    with modes_kept(model), contextlib.ExitStack() as hooks:
        set_to_evaluation(model)
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(observe(name), with_kwargs=True))
        for batch in batches:
            _check_images(batch)
            model(batch)
            count += 1
    if not count:
        raise UserError("calibrate: no batch was given; pass a few image batches")
    few = [name for name, seen in values.items() if seen == 1 and layers[name].config.mode == "fast"]
    if few and world_size() == 1:
        raise UserError(f"calibrate: {few[0]} saw a single value per channel; give more images")
    for name, layer in layers.items():
        if observers[name].num_batches_tracked > 0:
            layer.adopt_running_values(observers[name])
    return model


def _rewritable_layers(model: nn.Module) -> dict[str, Whitened]:
    """The whitened layers of a network, by name.

    Raises:
        UserError: there is none, or one has a weight or bias that is computed, missing or shared.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Whitened)}
    if not layers:
        raise UserError("calibrate: the network holds no whitened layer; convert it first")
    owners = collections.Counter(p for m in model.modules() for p in m.parameters(recurse=False))
    for name, layer in layers.items():
        for part, value in (("weight", layer.weight), ("bias", layer.bias)):
            if not isinstance(value, nn.Parameter):
                state = "missing" if value is None else "computed, not a parameter"
                raise UserError(f"calibrate: the {part} of {name} is {state}, so it cannot be rewritten")
            if owners[value] > 1:
                raise UserError(
                    f"calibrate: {name} shares its {part} with another layer but not its input's statistics"
                )
    return layers


def _check_images(batch: object) -> None:
    if isinstance(batch, Tensor) and batch.is_floating_point() and batch.numel():
        return
    what = f"{tuple(batch.shape)} {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
    raise UserError(
        f"calibrate: a batch is {what}; expected images (n, C, H, W) as floating-point numbers, without "
        "labels"
    )


def _what_it_does(layer: Whitened) -> str:
    groups, blocks, block, _ = layer._shape
    if not layer.decorrelates:
        return "standardises its input: depthwise"
    held = f", held back by {layer._held:.2f}" if layer._held < 1 else ""
    return f"whitens its input, {groups * blocks} x {block} channels{held}"


def _no_hooks(module: nn.Module) -> dict[int, Any]:
    """A memory with which `copy.deepcopy` leaves out the hooks: what they belong to may not be copyable."""
    held = [value for name, value in vars(module).items() if name.startswith(HOOKS)]
    return {id(value): type(value)() for value in held if isinstance(value, dict)}


def fold_batch_norm(layer: Any, norm: Any) -> None:
    """Fold evaluation-mode batch norm ``norm`` into the layer before it, in place."""
    scale, shift = _affine(norm)
    given, trained = layer.weight.detach(), bool(layer.weight.requires_grad)
    weight = in_float64(given)
    bias = 0 if layer.bias is None else in_float64(layer.bias.detach())
    if isinstance(layer, TRANSPOSED):  # (C, O of a group, kh, kw), groups along C
        grouped = weight.unflatten(0, (layer.groups, -1))
        scale_GO = scale.view(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))
        weight = (grouped * scale_GO).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(given), trained)
    layer.bias = nn.Parameter((bias * scale + shift).to(given), trained)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Evaluation-mode batch norm as scale and shift, float64."""
    mean, var = in_float64(norm.running_mean), in_float64(norm.running_var)
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * in_float64(norm.weight.detach())
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + in_float64(norm.bias.detach())


def _as_affine(norm: Any) -> nn.Module:
    """A batch norm with no layer before it to fold into, as a depthwise 1x1 convolution."""
    scale, shift = _affine(norm)
    place = {"device": norm.running_mean.device, "dtype": norm.running_mean.dtype}
    conv: Any = nn.Conv2d(len(scale), len(scale), 1, groups=len(scale), **place)
    with torch.no_grad():
        conv.weight.copy_(scale.view_as(conv.weight))
        conv.bias.copy_(shift)
    return conv


@torch.no_grad()
def _bring_filters_to(norm: float, layer: Any) -> None:
    """Give every filter this norm, in place.

    A batch norm made the scale of the filters before it irrelevant, and common initialisations leave norms
    from 0.04 to 3.5 in one network (depthwise and projecting layers of MobileNetV2). Without it their scale
    is that of the layer's output, beside biases and skip connections, and sets how fast the filters turn.
    """
    norms = layer.weight.flatten(1).norm(dim=1)
    factors = norm / torch.where(norms > 0, norms, 1)
    layer.weight.mul_(factors.view(-1, *(1,) * (layer.weight.ndim - 1)))


def leftover(norm: nn.Module) -> nn.Module:
    """What stays where a batch norm was: the dropout and activation of timm's layers that carry them, as
    children of the same names, since what is theirs (hooks, who else holds them) is not the norm's.
    """
    parts: dict[str, Any] = {name: getattr(norm, name, None) for name in ("drop", "act")}
    parts = {name: part for name, part in parts.items() if not isinstance(part, nn.Identity | None)}
    left = nn.Sequential(collections.OrderedDict(parts)) if parts else nn.Identity()
    return left.train(norm.training)


def transform(swaps: dict[nn.Module, nn.Module]) -> None:
    """Make each module the one it is to be, in place, so that whatever holds it holds that: registered, in
    plain lists and objects, or in a closure. Its forward and backward hooks stay.
    """
    for module, new in swaps.items():
        own = vars(module).items()
        hooks = {name: value for name, value in own if name.startswith(HOOKS) and value not in (None, {})}
        object.__setattr__(module, "__class__", type(new))  # its class may have a `__setattr__` of its own
        vars(module).clear()
        module.__setstate__({**vars(new), **hooks})  # whitened layers are found by a number of their own


def _reason_to_keep(
    name: str,
    module: Any,
    modules: dict[str, Any],
    structure: Structure,
    filter: Filter | None,
) -> str | None:
    if isinstance(module, TRANSPOSED):
        return "transposed convolution"
    if isinstance(module, NEVER_WHITENED):
        return "convolution of another dimension than two"
    if not isinstance(module, (*WEIGHTED, _BatchNorm)):
        return None
    if filter is not None and not filter(module, name):
        return "the filter said no"
    if isinstance(module, Whitened):
        return "whitened already"
    if name in structure.unused:
        return "not used by the forward pass"
    if isinstance(module, _BatchNorm):
        if not is_plain_norm(module):
            return _own_way(module)
        if name in structure.shared_in_place:
            return "its output is overwritten while its input is read elsewhere"
        if name in structure.escapes:
            return "what reads it could not be traced"
        return "its parameters are read by the forward pass itself" if name in structure.weight_read else None
    if not is_plain_layer(module):
        return _own_way(module)
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed, not a parameter"
    if not module.weight.numel():
        return "it has no weights"
    if module.weight.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"its weight is {module.weight.dtype}"
    if module.bias is not None and not isinstance(module.bias, nn.Parameter):
        return "its bias is computed, not a parameter"
    if name in structure.before_frozen:
        return f"followed by {structure.before_frozen[name]}, so it is not to be trained"
    if name in structure.weight_read:
        return "its weight is read by the forward pass itself"
    if name in structure.sees_1x1:
        return "sees a 1x1 map, which has too few samples"
    foreign = _foreign_norm(name, modules)
    return f"its part of the network is normalised by {foreign}" if foreign else None


def _own_way(module: nn.Module) -> str:
    what = "slots, so its class cannot change" if is_of_fixed_class(module) else "a forward of its own"
    return f"{type(module).__name__} has {what}"


def _foreign_norm(name: str, modules: dict[str, Any]) -> str | None:
    """The norm of the smallest part around a layer that has any, if it is not batch norm."""
    while name:
        name = name.rpartition(".")[0]
        norms = [m for m in modules[name].modules() if isinstance(m, NORMS) or _is_layer_norm(m)]
        if norms:
            return None if any(isinstance(m, _BatchNorm) for m in norms) else type(norms[0]).__name__
    return None


def _is_layer_norm(module: nn.Module) -> bool:
    return "LayerNorm" in type(module).__name__ or "RmsNorm" in type(module).__name__


def _refuse_lonely(norms: list[str], structure: Structure) -> None:
    """Raise UserError for batch norms without a layer that could take their place."""
    lonely = [
        name for name in norms if name not in structure.norm_after and not structure.norm_before.get(name)
    ]
    if not lonely:
        return
    more = f" and {len(lonely) - 8} more" if len(lonely) > 8 else ""
    names, traced = ", ".join(map(repr, lonely[:8])) + more, ""
    if structure.untraced:
        module, reason = structure.untraced[0]
        traced = f" as far as the network can be traced ({module or 'its own forward'}: {reason})"
    if len(lonely) == 1:
        what, own, feed, keep = f"batch norm {names} neither follows", "its", "feeds", "it"
    else:
        what, own, feed, keep = f"batch norms {names} neither follow", "their", "feed", "them"
    raise UserError(
        f"{what} a convolution or linear layer of {own} own nor {feed} only such layers{traced}, so the "
        f"network would change silently; to keep {keep}, name {keep} in model.keep (in Python: pass a filter "
        f"that says no to {keep})"
    )


def _plan_batch_norm(
    name: str,
    module: Any,
    structure: Structure,
    kept: dict[str, str],
    warm_start: bool,
) -> tuple[str, str]:
    """Action and reason."""
    if name in kept:
        return "kept", kept[name]
    layer = structure.norm_after.get(name)
    readers = structure.norm_before.get(name, [])
    if layer is not None and layer in kept:
        return "kept", f"follows {layer}, which is kept: {kept[layer]}"
    if any(reader in kept for reader in readers):
        return "kept", f"feeds {next(reader for reader in readers if reader in kept)}, which is kept"
    if not warm_start:
        return "removed", f"followed {layer}" if layer else f"fed {', '.join(readers)}"
    if module.running_mean is None:
        raise UserError(
            f"batch norm {name!r} keeps no running values, so it has no function to keep; convert without "
            "warm_start, or name it in model.keep (in Python: pass a filter that says no to it)"
        )
    if layer is not None and name not in structure.guessed:
        return "removed", f"followed {layer}"
    if not isinstance(module, nn.BatchNorm2d):
        return "kept", "there is no layer before it to fold it into"
    what = f"followed {layer} by module order" if layer else f"fed {', '.join(readers)}"
    return "removed", f"{what}; its affine stays as a 1x1 convolution"

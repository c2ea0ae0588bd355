"""The only module walker: from a network with batch norm to its deconvolved twin.

`convert_to_network_deconv` swaps convolutions and linear layers for whitened ones and removes the batch norms
that belonged to them; `calibrate` lets a trained network start as a deconvolved one that computes the same
function. Which batch norm belongs to which layer is read from `torch.fx` graphs; where a module cannot be
traced, its children are, and what is left is paired by module order. Nothing here folds: see fold.py.

Source: Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926), section 3.3.
"""

from __future__ import annotations

import collections
import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv.config import NetworkDeconvConfig
from segdeconv.errors import UserError
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.whitening import unfold_whitening

Filter = Callable[[nn.Module, str], bool]

_NORMS = (
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Conv2d, nn.Linear)
_STATIC_PADDING = "segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding"
_UNCHANGED = (nn.Identity, nn.modules.dropout._DropoutNd)  # a batch norm may sit behind one of these
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_BETWEEN = (  # what may stand between a batch norm and the layers it feeds
    *_UNCHANGED,
    _BatchNorm,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Flatten,
    nn.Upsample,
    nn.ZeroPad2d,
)
_FUNCTIONS_BETWEEN = {
    "relu", "relu_", "silu", "gelu", "hardswish", "leaky_relu", "elu", "mish", "sigmoid", "tanh", "dropout",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "flatten", "view", "reshape", "mean", "interpolate",
    "pad", "cat", "split", "chunk", "contiguous", "reshape_as", "permute", "transpose",
    "add", "iadd", "add_", "sub", "mul", "getitem", "getattr", "size",
}  # fmt: skip


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

    def __str__(self) -> str:
        head = ", ".join(f"{self.count(action)} {action}" for action in ("swapped", "removed", "kept"))
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"  {x.action:7} {x.name:{width}} {x.kind}: {x.reason}" for x in self.layers]
        untraced = [
            f"  untraced {name or '(the network)'}: {reason}; its own layers are paired by module order"
            for name, reason in self.untraced
        ]
        return "\n".join([head, *lines, *untraced])


def convert_to_network_deconv(
    model: nn.Module,
    config: NetworkDeconvConfig | None = None,
    filter: Filter | None = None,
    warm_start: bool = False,
) -> tuple[nn.Module, ConversionReport]:
    """Turn a network with batch norm into its deconvolved twin, in place.

    Convolutions and linear layers become `WhitenedConv2d` and `WhitenedLinear` with the same Parameters, and
    the batch norm behind it (or before it, in pre-activation networks) goes; the activation of a batch
    norm that carries one stays. Kept, with a reason in the report: transposed convolutions, layers that see
    1x1 maps, layers in a part of the network that another norm looks after, subclasses with a forward of
    their own, and the batch norms of kept layers.

    Args:
        filter: ``(module, qualified name) -> bool``, asked for every convolution, linear layer and batch
            norm; what it says no to is kept.
        warm_start: keep the function the network computes in evaluation: batch norms are folded into the
            layers before they are removed. Follow with `calibrate`. Without it the weights stay as they are
            and the network is to be trained from scratch.

    Returns:
        The network (``model`` itself, unless it is a single layer) and the report.

    Raises:
        UserError: a batch norm has no convolution or linear layer next to it, so that removing or keeping it
            would silently change the network; or there is nothing to convert. The network is unchanged.
    """
    config = config or NetworkDeconvConfig()
    modules: dict[str, Any] = dict(model.named_modules())
    structure = read_structure(model)
    report = ConversionReport(untraced=structure.untraced)

    kept: dict[str, str] = {}
    for name, module in modules.items():
        reason = _reason_to_keep(name, module, modules, structure, filter)
        if reason:
            kept[name] = reason

    swaps: dict[Any, nn.Module] = {}
    folds: list[tuple[str, str]] = []
    for name, module in modules.items():
        kind = type(module).__name__
        if isinstance(module, TRANSPOSED):
            report.layers.append(LayerReport(name, kind, "kept", "transposed convolution"))
        elif isinstance(module, _WEIGHTED):
            if name in kept:
                report.layers.append(LayerReport(name, kind, "kept", kept[name]))
            else:
                swaps[module] = nn.Identity()  # built below, once nothing can fail any more
                report.layers.append(LayerReport(name, kind, "swapped", "whitens its input"))
        elif isinstance(module, _BatchNorm):
            entry = _plan_batch_norm(name, module, modules, structure, kept, folds, warm_start)
            if entry.action != "kept":
                swaps[module] = leftover(module)
                if name in structure.norm_before and hasattr(swaps[module], "inplace"):
                    structure.in_place.add(f"{name}.act")
            report.layers.append(entry)
    if not any(isinstance(module, _WEIGHTED) for module in swaps):
        raise UserError(
            f"{type(model).__name__} holds no convolution or linear layer to whiten; report: {report}"
        )

    if warm_start:
        for norm_name, layer_name in folds:
            fold_batch_norm(modules[layer_name], modules[norm_name])
    for module in swaps:
        if _qualified(module) == _STATIC_PADDING:
            swaps[module] = nn.Sequential(module.static_padding, WhitenedConv2d.from_conv(module, config))
        elif isinstance(module, nn.Conv2d):
            swaps[module] = WhitenedConv2d.from_conv(module, config)
        elif isinstance(module, nn.Linear):
            swaps[module] = WhitenedLinear.from_linear(module, config)
        elif warm_start and module not in {modules[norm] for norm, _ in folds}:
            swaps[module] = nn.Sequential(_as_affine(module), swaps[module])
    for name in structure.in_place:
        modules[name].inplace = False
    return replace_modules(model, swaps), report


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Measure every whitened layer's statistics and rewrite its weights so that the function stays the same.

    W <- W D^-1 and b <- b + w'·μ, so that folding gives back what the layer computed before. Together with
    ``convert_to_network_deconv(model, warm_start=True)`` a trained batch-norm network becomes a deconvolved
    one that computes, in evaluation, what the batch-norm network did.

    Args:
        model: a freshly converted network (whitening at identity) or an already trained one.
        batches: image batches (n, C, H, W) on the model's device, in the form it is trained on. Some dozens
            of images serve.

    Returns:
        ``model``, in the mode it was in.

    Raises:
        UserError: no batch was given, the network holds no whitened layer, or statistics are not finite.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Whitened)}
    if not layers:
        raise UserError("calibrate: the network holds no whitened layer; convert it first")
    totals: dict[str, list[Any]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mean, cov, rows = layers[name].moments(args[0].double())
            # E[(x-m)(x-m)^T] over blocks about the batch mean; second moments about zero add up over batches.
            per_block = mean.expand(-1, layers[name].num_blocks, -1)
            second = cov + per_block.transpose(1, 2) @ per_block / layers[name].num_blocks
            if name not in totals:
                totals[name] = [rows, mean * rows, second * rows]
            else:
                for i, value in enumerate((rows, mean * rows, second * rows)):
                    totals[name][i] += value

        return hook

    was_training = model.training
    model.eval()
    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    count = 0
    try:
        for batch in batches:
            model(batch)
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not count:
        raise UserError("calibrate: no batch was given; pass a few image batches")

    for name, (rows, mean_sum, second_sum) in totals.items():
        layer = layers[name]
        mean = mean_sum / rows
        per_block = mean.expand(-1, layer.num_blocks, -1)
        cov = second_sum / rows - per_block.transpose(1, 2) @ per_block / layer.num_blocks
        whitening = layer.whitening_from(cov)
        if not (whitening.isfinite().all() and mean.isfinite().all()):
            raise UserError(f"calibrate: the statistics of {name} are not finite; check the input images")
        weight, bias = layer.folded_parameters()
        layer.running_mean.copy_(mean)
        layer.running_whitening.copy_(whitening)
        layer.num_batches_tracked.fill_(count)
        weight, bias = unfold_whitening(
            weight, bias, layer.running_whitening, layer.running_mean, layer.num_blocks, layer.interleaved
        )
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return model


def fold_batch_norm(layer: Any, norm: Any) -> None:
    """Fold evaluation-mode batch norm ``norm`` into the layer before it, in place."""
    scale, shift = _affine(norm)
    weight = layer.weight.detach().double()
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    dtype, trained = layer.weight.dtype, bool(layer.weight.requires_grad)
    if isinstance(layer, TRANSPOSED):  # (C, O of a group, kh, kw), groups along C
        grouped = weight.unflatten(0, (layer.groups, -1))
        scale_GO = scale.view(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))
        weight = (grouped * scale_GO).flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *(1,) * (weight.ndim - 1))
    layer.weight = nn.Parameter(weight.to(dtype), trained)
    layer.bias = nn.Parameter((bias * scale + shift).to(dtype), trained)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Evaluation-mode batch norm as scale and shift, float64."""
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.detach().double()


def _as_affine(norm: Any) -> nn.Module:
    """A batch norm with no layer before it to fold into, as a depthwise 1x1 convolution."""
    scale, shift = _affine(norm)
    conv: Any = nn.Conv2d(len(scale), len(scale), 1, groups=len(scale))
    conv.to(device=scale.device, dtype=norm.running_mean.dtype)
    with torch.no_grad():
        conv.weight.copy_(scale.view_as(conv.weight))
        conv.bias.copy_(shift)
    return conv


def leftover(norm: Any) -> nn.Module:
    """What stays where a batch norm was: the activation, for timm's layers that carry one."""
    return norm.act if isinstance(getattr(norm, "act", None), nn.Module) else nn.Identity()


def replace_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> nn.Module:
    """Replace modules wherever they are registered, shared ones in every place."""
    if model in swaps:
        return swaps[model]
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):  # named_children() skips repetitions
            if child in swaps:
                setattr(parent, key, swaps[child])
    return model


# ---- reading the structure of a network ----------------------------------------------------------------


@dataclass
class Structure:
    """What the graphs of a network say about its layers.

    Attributes:
        norm_after: batch norm -> the layer (convolution, linear, transposed) whose output alone it reads.
        norm_before: batch norm -> the layers that alone read what it puts out.
        in_place: activations that change what a ``norm_before`` batch norm puts out in place. Without the
            norm they would change its input, which others may read.
        sees_1x1: layers whose input is a globally pooled map.
        unused: layers and batch norms that a traced forward never calls.
        untraced: modules whose own forward could not be traced, with the reason.
    """

    norm_after: dict[str, str] = field(default_factory=dict)
    norm_before: dict[str, list[str]] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)
    sees_1x1: set[str] = field(default_factory=set)
    unused: set[str] = field(default_factory=set)
    untraced: list[tuple[str, str]] = field(default_factory=list)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = (*_NORMS, *_WEIGHTED, *TRANSPOSED, Whitened)
        return isinstance(m, known) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, nn.Sequential) and m not in set(self.root.modules()):
            return forward(*args, **kwargs)  # a slice made on the fly, as in smp's DPN encoders
        return super().call_module(m, forward, args, kwargs)


@contextlib.contextmanager
def _without_shape_checks(model: nn.Module) -> Iterator[None]:
    """smp compares the input's height with a number, which a traced value cannot answer."""
    checked: list[Any] = [m for m in model.modules() if getattr(m, "requires_divisible_input_shape", False)]
    for module in checked:
        module.requires_divisible_input_shape = False
    try:
        yield
    finally:
        for module in checked:
            del module.requires_divisible_input_shape  # the class attribute shows again


def read_structure(model: nn.Module) -> Structure:
    """Pair batch norms and layers, from fx graphs of the largest parts that trace."""
    structure = Structure()
    with _without_shape_checks(model):
        _read(model, "", structure)
    return structure


def _read(module: nn.Module, prefix: str, structure: Structure) -> None:
    if not any(module.children()):
        return  # a layer on its own says nothing about pairs
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # those have no forward
        try:
            graph = _Tracer().trace(module)
        except Exception as error:  # fx raises whatever the traced Python raises
            structure.untraced.append((prefix[:-1], _first_line(error)))
            _pair_by_order(module, prefix, structure)
        else:
            _read_graph(graph, module, prefix, structure)
            return
    for name, child in module.named_children():
        _read(child, f"{prefix}{name}.", structure)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _pair_by_order(module: nn.Module, prefix: str, structure: Structure) -> None:
    """Pair each batch norm among the direct children with the layer registered right before it."""
    previous: tuple[str, nn.Module] | None = None
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            if previous and _out_channels(previous[1]) == child.num_features:
                structure.norm_after[prefix + name] = prefix + previous[0]
            previous = None
        elif isinstance(child, (*_WEIGHTED, *TRANSPOSED)):
            previous = (name, child)
        elif not isinstance(child, _UNCHANGED):
            previous = None


def _out_channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _read_graph(graph: Any, root: nn.Module, prefix: str, structure: Structure) -> None:
    modules = dict(root.named_modules())
    calls = collections.Counter(node.target for node in graph.nodes if node.op == "call_module")

    structure.unused.update(
        prefix + name
        for name, module in modules.items()
        if isinstance(module, (*_WEIGHTED, _BatchNorm)) and name not in calls
    )

    def module_of(node: object) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return modules[str(node.target)]
        return None

    for node in graph.nodes:
        module = module_of(node)
        if isinstance(module, _BatchNorm):
            source = node.args[0]
            while _same_channels(source, module_of(source)) and len(_value_users(source)) == 1:
                source = source.args[0]
            once = calls[node.target] == 1 and calls[getattr(source, "target", None)] == 1
            if (
                isinstance(module_of(source), (*_WEIGHTED, *TRANSPOSED))
                and len(_value_users(source)) == 1
                and once
            ):
                structure.norm_after[prefix + str(node.target)] = prefix + str(source.target)
            else:
                readers = _readers(node, module_of)
                if readers:
                    structure.norm_before[prefix + str(node.target)] = [prefix + name for name in readers]
                    structure.in_place.update(prefix + name for name in _in_place(node, module_of))
        elif isinstance(module, _WEIGHTED) and _is_pooled(node, module_of):
            head = isinstance(module, nn.Linear) and not _gates(node)
            if not head:
                structure.sees_1x1.add(prefix + str(node.target))


def _same_channels(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a batch norm behind this node still belongs to the layer before it."""
    if module is not None:
        return isinstance(module, _UNCHANGED)
    # levit flattens tokens between a linear layer and its batch norm: (n, tokens, C) to (n·tokens, C).
    return isinstance(node, fx.Node) and node.target == "flatten" and tuple(node.args[1:]) == (0, 1)


def _value_users(node: fx.Node) -> list[fx.Node]:
    """Who reads the values of a node, and not just its shape."""
    return [user for user in node.users if not (user.target == "reshape_as" and user.args[0] is not node)]


def _readers(node: fx.Node, module_of: Callable[[object], nn.Module | None]) -> list[str] | None:
    """The layers that read ``node`` through activations and pooling; None if anything else reads it."""
    readers: list[str] = []
    seen: set[fx.Node] = set()
    queue = list(node.users)
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        module = module_of(user)
        if isinstance(module, _WEIGHTED):
            if _is_pooled(user, module_of) and _gates(user):
                queue.extend(user.users)  # squeeze-and-excite: its gate joins the map again
            else:
                readers.append(str(user.target))
        elif user.op == "output" or not _stands_between(user, module):
            return None
        else:
            queue.extend(user.users)
    return readers or None


def _in_place(node: fx.Node, module_of: Callable[[object], nn.Module | None]) -> list[str]:
    """The activation modules that would write into what ``node`` puts out."""
    found = []
    for user in node.users:
        if getattr(module_of(user), "inplace", False):
            found.append(str(user.target))
        elif isinstance(module_of(user), _UNCHANGED):
            found += _in_place(user, module_of)
    return found


def _stands_between(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        is_activation = type(module).__module__ == "torch.nn.modules.activation"
        return is_activation or isinstance(module, _BETWEEN)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _FUNCTIONS_BETWEEN


def _is_pooled(node: fx.Node, module_of: Callable[[object], nn.Module | None]) -> bool:
    """Whether the layer's input comes from a global pool through pointwise modules and 1x1 layers."""
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        module = module_of(source)
        if isinstance(module, _POOLS) or source.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            size = module.output_size if isinstance(module, _POOLS) else source.args[1]
            return size in (1, (1, 1), [1, 1])
        if source.target in ("mean", torch.mean) or source.target == "amax":
            dims = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim")
            return dims is not None and sorted(d % 4 for d in _as_tuple(dims)) == [2, 3]
        pointwise = (
            isinstance(module, (*_WEIGHTED, *_NORMS, *_UNCHANGED, nn.Flatten))
            or (module is not None and type(module).__module__ == "torch.nn.modules.activation")
            or getattr(source.target, "__name__", source.target)
            in ("relu", "silu", "flatten", "view", "reshape")
        )
        if not pointwise:
            return False
        source = source.args[0]
    return False


def _as_tuple(dims: Any) -> tuple[int, ...]:
    return tuple(dims) if isinstance(dims, tuple | list) else (dims,)


def _gates(node: fx.Node) -> bool:
    """Whether what the layer puts out ends up as a factor: squeeze-and-excite, not a classifier."""
    seen, queue = set(), list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in (operator.mul, torch.mul, "mul", "__mul__", operator.imul):
            return True
        queue.extend(user.users)
    return False


# ---- deciding ------------------------------------------------------------------------------------------


def _reason_to_keep(
    name: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    structure: Structure,
    filter: Filter | None,
) -> str | None:
    if not isinstance(module, (*_WEIGHTED, _BatchNorm)):
        return None
    if filter is not None and not filter(module, name):
        return "the filter said no"
    if isinstance(module, Whitened):
        return "whitened already"
    if name in structure.unused:
        return "not used by the forward pass"
    if isinstance(module, _WEIGHTED):
        if not is_plain(module):
            return f"{type(module).__name__} has a forward of its own"
        if name in structure.sees_1x1:
            return "sees a 1x1 map, which has too few samples"
        foreign = _foreign_norm(name, modules)
        if foreign:
            return f"its part of the network is normalised by {foreign}"
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether the layer computes what Conv2d or Linear do, if in its own way as some of timm's and smp's."""
    known = ("timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame", _STATIC_PADDING)
    return type(module) in _WEIGHTED or _qualified(module) in known


def _qualified(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _foreign_norm(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The norm of the smallest part around a layer that has any, if it is not batch norm."""
    while name:
        name = name.rpartition(".")[0]
        norms = [m for m in modules[name].modules() if isinstance(m, _NORMS) or _is_layer_norm(m)]
        if norms:
            return None if any(isinstance(m, _BatchNorm) for m in norms) else type(norms[0]).__name__
    return None


def _is_layer_norm(module: nn.Module) -> bool:
    return "LayerNorm" in type(module).__name__ or "RmsNorm" in type(module).__name__


def _plan_batch_norm(
    name: str,
    module: nn.Module,
    modules: dict[str, nn.Module],
    structure: Structure,
    kept: dict[str, str],
    folds: list[tuple[str, str]],
    warm_start: bool,
) -> LayerReport:
    kind = type(module).__name__
    if name in kept:
        return LayerReport(name, kind, "kept", kept[name])
    layer = structure.norm_after.get(name)
    if layer is not None:
        if isinstance(modules[layer], TRANSPOSED):
            return LayerReport(name, kind, "kept", f"follows the transposed convolution {layer}")
        if layer in kept:
            return LayerReport(name, kind, "kept", f"follows {layer}, which is kept")
        folds.append((name, layer))
        return LayerReport(name, kind, "removed", f"followed {layer}")
    readers = structure.norm_before.get(name)
    if readers:
        not_whitened = [reader for reader in readers if reader in kept]
        if not_whitened:
            return LayerReport(name, kind, "kept", f"feeds {not_whitened[0]}, which is kept")
        if warm_start and not isinstance(module, nn.BatchNorm2d):
            return LayerReport(name, kind, "kept", "there is no layer before it to fold it into")
        became = "; its affine stays as a 1x1 convolution" if warm_start else ""
        return LayerReport(name, kind, "removed", f"fed {', '.join(readers)}{became}")
    raise UserError(
        f"batch norm {name!r} neither follows a convolution or linear layer of its own nor feeds only such "
        "layers, so the network would change silently; to keep it, pass a filter that says no to it"
    )

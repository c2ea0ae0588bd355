"""Which batch norm belongs to which layer: read from `torch.fx` graphs, nothing is changed.

The largest parts of a network that trace are traced; those that something untraced calls, with their
optional arguments and without. Where a module's own forward cannot be traced, its children are, and batch
norms among its direct children are paired with the layer registered right before them: good enough to train
from scratch, but marked as a guess, on which nothing is folded. So are those among the direct children
of a Sequential in it.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

NORMS = (
    _BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NEVER_WHITENED = (nn.Conv1d, nn.Conv3d, *TRANSPOSED)  # but a batch norm behind one is its own
WEIGHTED = (nn.Conv2d, nn.Linear)
STATIC_PADDING = "segmentation_models_pytorch.encoders._efficientnet.Conv2dStaticSamePadding"

HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")  # torch's own attributes of a module
_UNCHANGED = (nn.Identity, nn.modules.dropout._DropoutNd)  # a batch norm may sit behind one of these
_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_BETWEEN = (  # what may stand between a batch norm and the layers it feeds, besides activations
    *_UNCHANGED,
    *NORMS,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Flatten,
    nn.Upsample,
    nn.ZeroPad2d,
)
_POINTWISE = {
    "relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "mish",
    "sigmoid", "tanh", "softplus", "dropout", "flatten", "view", "reshape", "reshape_as", "contiguous",
}  # fmt: skip
_FUNCTIONS_BETWEEN = _POINTWISE | {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "interpolate", "pad",
    "cat", "split", "chunk", "permute", "transpose", "add", "iadd", "add_", "sub", "mul", "getitem",
}  # fmt: skip
_VIEWS = {
    "flatten", "view", "reshape", "reshape_as", "contiguous", "split", "chunk", "permute", "transpose",
    "getitem", "dropout",
}  # fmt: skip
_FACTORS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_SHAPE_ONLY = ("size", "dim", "numel")


@dataclass
class Structure:
    """What the graphs of a network say about its layers, by qualified name.

    Attributes:
        norm_after: batch norm -> the layer (convolution or linear) whose output alone it reads.
        guessed: batch norms whose ``norm_after`` is not proven: it rests on module order or an unknown
            layout, does not hold in evaluation, has hooks in between, or the norm is one of several
            alternatives.
        norm_before: batch norm -> the layers that alone read what it puts out.
        in_place: activation modules that write into what a ``norm_before`` batch norm puts out, or may do so
            with a ``guessed`` one. Without the norm they would write into its input, which others may read.
        escapes: batch norms whose output leaves the part of the network that could be traced.
        shared_in_place: batch norms whose output a function overwrites while others read their input.
        sees_1x1: layers whose input is a globally pooled map, classifier heads excepted.
        weight_read: layers and batch norms whose weight the forward pass reads itself, as tied networks do.
        before_frozen: layers whose output a frozen batch norm reads -> its class.
        unused: layers and batch norms that no traced forward calls.
        untraced: modules whose own forward could not be traced, with the reason.
    """

    norm_after: dict[str, str] = field(default_factory=dict)
    guessed: set[str] = field(default_factory=set)
    norm_before: dict[str, list[str]] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)
    escapes: set[str] = field(default_factory=set)
    shared_in_place: set[str] = field(default_factory=set)
    sees_1x1: set[str] = field(default_factory=set)
    weight_read: set[str] = field(default_factory=set)
    before_frozen: dict[str, str] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    untraced: list[tuple[str, str]] = field(default_factory=list)


def read_structure(model: nn.Module) -> Structure:
    """Pair batch norms and layers, from fx graphs of the largest parts that trace.

    Traced in training mode, whatever mode the network is in, because auxiliary heads run only there; and in
    evaluation, in which what is folded has to be the same. A copy is traced, if there can be one, because
    tracing runs the forward pass, with whatever it leaves in the network.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    hooks = (v for m in model.modules() for k, v in vars(m).items() if k.startswith(HOOKS))
    shared = parameters | {id(value): value for value in hooks if value is not None}
    for memory in (parameters, shared):  # hooks keep what they see, but may belong to what cannot be copied
        with contextlib.suppress(Exception):  # of whatever the network holds besides modules
            model = copy.deepcopy(model, memory)
            break
    training, evaluation = _Reader(model), _Reader(model)
    with modes_kept(model), _without_shape_checks(model), torch.random.fork_rng(devices=[]):
        model.train()
        structure = training.read()
        set_to_evaluation(model)
        in_evaluation = evaluation.read()
    structure.unused &= in_evaluation.unused
    structure.weight_read |= in_evaluation.weight_read
    structure.sees_1x1 |= in_evaluation.sees_1x1
    structure.in_place |= in_evaluation.in_place
    # What a training pass left out: by chance (stochastic depth), or always.
    taken = set(structure.norm_after.values())
    for norm in evaluation.uses.keys() - training.uses.keys() - structure.norm_after.keys():
        layer = in_evaluation.norm_after.get(norm)
        if layer is not None and layer not in taken:
            structure.norm_after[norm] = layer
        if norm in in_evaluation.norm_before:
            structure.norm_before[norm] = in_evaluation.norm_before[norm]
        structure.guessed |= in_evaluation.guessed & {norm}
        structure.escapes |= in_evaluation.escapes & {norm}
        structure.shared_in_place |= in_evaluation.shared_in_place & {norm}
    structure.guessed |= {
        norm
        for norm, layer in structure.norm_after.items()
        if norm in evaluation.uses and in_evaluation.norm_after.get(norm) != layer
    }
    return structure


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module is afterwards in the mode it was in, training or evaluation."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def set_to_evaluation(model: nn.Module) -> None:
    """``model.eval()`` for all its modules, of which networks with a frozen part leave some as they are."""
    for module in model.modules():
        module.train(False)


def detached_copy(model: nn.Module) -> nn.Module:
    """A deep copy. Tensors that a forward pass left in modules, as computed weights are, lose their graph."""
    left = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, left)


def qualified_class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def is_plain_layer(module: nn.Module) -> bool:
    """Whether the layer computes what Conv2d or Linear do, if in its own way as some of timm's and smp's."""
    known = ("timm.layers.linear.Linear", "timm.layers.conv2d_same.Conv2dSame", STATIC_PADDING)
    plain = computes_as(module, WEIGHTED) or qualified_class(module) in known
    # Libraries that wrap it put a forward there.
    return plain and "forward" not in vars(module) and not is_of_fixed_class(module)


def computes_as(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of ``classes``, or of a subclass that changes nothing about what they compute, as
    those that transformers and torchvision construct in their own way. Not torch's: containers read their
    weights.
    """
    kind = type(module)
    if kind in classes or kind.__module__.startswith("torch."):
        return kind in classes
    methods = "forward", "_conv_forward", "__call__"
    return any(
        issubclass(kind, base) and all(getattr(kind, m, None) is getattr(base, m, None) for m in methods)
        for base in classes
    )


def is_plain_norm(module: nn.Module) -> bool:
    """Whether it computes what BatchNorm does, and at most the activation of timm's norm-with-activation."""
    torch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    known = ("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")
    plain = computes_as(module, torch_norms) or qualified_class(module) in known
    return plain and "forward" not in vars(module) and not is_of_fixed_class(module)


def is_of_fixed_class(module: nn.Module) -> bool:
    """Whether it cannot become of another class: there are slots, as `abc.ABC` has, among its bases."""
    try:
        object.__setattr__(object.__new__(type(module)), "__class__", nn.Identity)
    except TypeError:
        return True
    return False


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether it is what torchvision, timm, detectron2 and transformers make of a batch norm that is not to
    change.
    """
    return "FrozenBatchNorm" in type(module).__name__


def out_channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


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


# torch.fx replaces how modules are called, in the whole process and until it has traced.
_TRACING = threading.RLock()


class _Tracer(fx.Tracer):
    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.registered = set(root.modules())
        self.thread = threading.get_ident()
        try:
            with _TRACING:
                return super().trace(root, concrete_args)
        finally:
            # A cycle in torch keeps this tracer, which need not keep the network's parameters; it stays as it
            # should be for other threads, whose networks may still be passing through it.
            self.root, self.submodule_paths, self.registered = nn.Module(), {}, set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Whitened layers are Conv2d and Linear too. Pools of timm's compute with the input's size.
        leaves = (*NORMS, *WEIGHTED, *NEVER_WHITENED, nn.AvgPool2d, nn.MaxPool2d)
        leaf = isinstance(m, leaves) or is_frozen_norm(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: fx.Proxy) -> bool:
        # smp's Linknet asks whether a skip connection has channels; tensors of networks have.
        node = obj.node
        if node.target is operator.ne and node.args[1] == 0 and _is_shape(_input(node), operator.getitem):
            return True
        return bool(super().to_bool(obj))

    def iter(self, obj: Any) -> Iterator[Any]:
        # smp's Segformer walks over the height and width of a map, shape[2:].
        if obj.node.args[1:] == (slice(2, None, None),) and _is_shape(obj.node, operator.getitem):
            return iter((obj[0], obj[1]))
        return super().iter(obj)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)  # another network, which computes meanwhile
        if isinstance(m, nn.Sequential) and m not in self.registered:
            return forward(*args, **kwargs)  # a slice made on the fly, as in smp's DPN encoders
        return super().call_module(m, forward, args, kwargs)


def _trace(module: nn.Module, arguments: dict[str, Any] | None) -> fx.Graph:
    if "forward" in vars(module):
        raise TypeError("its forward is not that of its class, which is what torch.fx traces")
    return _Tracer().trace(module, arguments)


def _is_shape(node: fx.Node | None, function: Callable[..., Any]) -> bool:
    """Whether a node is ``function`` of some tensor's shape."""
    source = _input(node) if node is not None and node.target is function else None
    return source is not None and source.target is getattr and bool(source.args[1] == "shape")


@dataclass
class _Use:
    """One call of a batch norm: the layer it reads alone, and the layers that alone read it, if any."""

    after: str | None
    proven: bool
    readers: list[str] | None
    in_place: list[str]
    overwritten: bool


class _Reader:
    """Collects what each traced graph says, then draws the conclusions."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        first = {module: name for name, module in model.named_modules()}
        self.canonical = {name: first[m] for name, m in model.named_modules(remove_duplicate=False)}
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.layers_of: dict[int, list[str]] = collections.defaultdict(list)  # by what they hold, its id
        for name, module in self.modules.items():
            if isinstance(module, (*WEIGHTED, _BatchNorm)):
                for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    self.layers_of[id(value)].append(name)
        self.structure = Structure()
        self.calls: collections.Counter[str] = collections.Counter()
        self.uses: dict[str, list[_Use]] = collections.defaultdict(list)
        self.by_order: dict[str, str] = {}
        self.traced: set[str] = set()

    def read(self) -> Structure:
        self._visit(self.model, "")
        structure = self.structure
        structure.unused = {name for name in self.traced if not self.calls[name]}
        for norm, uses in self.uses.items():
            layers = {use.after for use in uses}
            layer = layers.pop() if len(layers) == 1 else None
            if layer is not None and self.calls[layer] == self.calls[norm]:
                structure.norm_after[norm] = layer
                if not all(use.proven for use in uses) or self._has_alternatives(norm):
                    structure.guessed.add(norm)
                    structure.in_place.update(name for use in uses for name in use.in_place)
            elif all(use.readers for use in uses):
                structure.norm_before[norm] = list(
                    dict.fromkeys(r for use in uses for r in use.readers or [])
                )
                structure.in_place.update(name for use in uses for name in use.in_place)
                if any(use.overwritten for use in uses):
                    structure.shared_in_place.add(norm)
        for norm, layer in self.by_order.items():
            if norm not in self.uses:
                structure.norm_after[norm] = layer
                structure.guessed.add(norm)
        claims = collections.Counter(structure.norm_after.values())
        for norm, layer in list(structure.norm_after.items()):
            if claims[layer] > 1:  # one layer, several norms: none of them is its own
                del structure.norm_after[norm]
        return structure

    def _has_alternatives(self, norm: str) -> bool:
        """Whether it is one of a list of norms, others of which the forward pass does not call by default."""
        container = norm.rpartition(".")[0]
        if type(self.modules[container]) not in (nn.ModuleList, nn.ModuleDict):
            return False
        return any(
            isinstance(other, _BatchNorm) and not self.calls[f"{container}.{name}"]
            for name, other in self.modules[container].named_children()
        )

    def _visit(self, module: nn.Module, prefix: str) -> None:
        if next(module.children(), None) is None or isinstance(module, (*NORMS, *WEIGHTED, *NEVER_WHITENED)):
            return  # a layer on its own says nothing about pairs
        if type(module) not in (nn.ModuleList, nn.ModuleDict):  # those have no forward
            try:
                defaults = _defaults(module)
                graphs = [_trace(module, None if prefix else defaults)]
            except Exception as error:  # fx raises whatever the traced Python raises
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                self.structure.untraced.append((prefix[:-1], reason))
                self._pair_by_order(module, prefix)
            else:
                if prefix and defaults:  # only what holds either way does
                    with contextlib.suppress(Exception):  # then its callers always give them
                        graphs.append(_trace(module, defaults))
                for graph in graphs:
                    self._read_graph(graph, module, prefix)
                return
        for name, child in module.named_children():
            self._visit(child, f"{prefix}{name}.")

    def _pair_by_order(self, module: nn.Module, prefix: str) -> None:
        previous: tuple[str, nn.Module] | None = None
        if any(isinstance(child, _BatchNorm) for child in module.children()):
            self.structure.in_place.update(
                self.canonical[prefix + name]
                for name, child in module.named_modules()
                if getattr(child, "inplace", False)
            )
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm):
                if previous and out_channels(previous[1]) == child.num_features:
                    self.by_order[self.canonical[prefix + name]] = self.canonical[prefix + previous[0]]
                previous = None
            elif previous and is_frozen_norm(child):
                layer = self.canonical[prefix + previous[0]]
                self.structure.before_frozen[layer] = type(child).__name__
            elif isinstance(child, (*WEIGHTED, *NEVER_WHITENED)):
                previous = (name, child)
            elif not isinstance(child, _UNCHANGED):
                previous = None

    def _read_graph(self, graph: fx.Graph, root: nn.Module, prefix: str) -> None:
        def name_of(node: fx.Node) -> str:
            return self.canonical[prefix + str(node.target)]

        def module_of(node: fx.Node | None) -> Any:
            return self.modules[name_of(node)] if node is not None and node.op == "call_module" else None

        for name, module in root.named_modules():
            if isinstance(module, (*WEIGHTED, _BatchNorm)):
                self.traced.add(self.canonical[prefix + name])
        for node in graph.nodes:
            module = module_of(node)
            if node.op == "get_attr" and _value_users(node):
                value = operator.attrgetter(str(node.target))(root)
                self.structure.weight_read.update(self.layers_of[id(value)])
            if module is None:
                continue
            self.calls[name_of(node)] += 1
            if isinstance(module, _BatchNorm):
                after, proven = _layer_before(node, module, module_of)
                # What could not be traced around a Sequential may call its modules one by one.
                proven = proven and not (
                    prefix and type(root) is nn.Sequential and "." not in str(node.target)
                )
                readers = _readers(node, module_of)
                if prefix and after is None and readers is None:
                    self.structure.escapes.add(name_of(node))
                self.uses[name_of(node)].append(
                    _Use(
                        after=None if after is None else name_of(after),
                        proven=proven,
                        readers=None if readers is None else [name_of(reader) for reader in readers],
                        in_place=[name_of(user) for user in _writers(node, module_of) if module_of(user)],
                        overwritten=_overwrites_shared_input(node, module_of),
                    )
                )
            elif isinstance(module, WEIGHTED) and _is_pooled(node, module_of):
                head = isinstance(module, nn.Linear) and not _gates(node)
                if not head:
                    self.structure.sees_1x1.add(name_of(node))
            elif is_frozen_norm(module) and isinstance(module_of(_input(node)), WEIGHTED):
                layer = name_of(node.all_input_nodes[0])
                self.structure.before_frozen[layer] = type(module).__name__


def _defaults(model: nn.Module) -> dict[str, Any]:
    """The defaults of what a network's forward takes besides its input: it is called without."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    return {
        p.name: p.default for p in others if p.default is None or isinstance(p.default, (int, float, str))
    }


_ModuleOf = Callable[[fx.Node | None], Any]


def _input(node: fx.Node) -> fx.Node | None:
    return node.all_input_nodes[0] if node.all_input_nodes else None


def _function(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _value_users(node: fx.Node) -> list[fx.Node]:
    """Who reads the values of a node, and not just its shape."""

    def shape_only(user: fx.Node) -> bool:
        if user.target is getattr:
            return user.args[1] in ("shape", "dtype", "device", "ndim")
        return user.target in _SHAPE_ONLY or (user.target == "reshape_as" and user.args[0] is not node)

    return [user for user in node.users if not shape_only(user)]


def _layer_before(node: fx.Node, norm: Any, module_of: _ModuleOf) -> tuple[fx.Node | None, bool]:
    """The call of the layer that batch norm ``node`` alone reads, and whether it certainly reads what the
    layer puts out, along its channels.
    """
    source, flattened = _input(node), False
    hooked = bool(norm._forward_pre_hooks)  # which may change what is between the two
    while source is not None and len(_value_users(source)) == 1:
        layer = module_of(source)
        hooks = "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"
        hooked = hooked or any(getattr(layer, name, None) for name in hooks)
        if isinstance(layer, (*WEIGHTED, *NEVER_WHITENED)):
            if out_channels(layer) != norm.num_features:
                return None, False
            # Behind a linear layer, (n, C) is normalised along C, but (n, L, C) along L.
            return source, not hooked and (flattened or not isinstance(layer, nn.Linear))
        # levit flattens tokens between a linear layer and its norm: (n, L, C) to (n·L, C).
        tokens = source.target == "flatten" and tuple(source.args[1:]) == (0, 1)
        flattened = flattened or tokens
        if not tokens and not isinstance(layer, _UNCHANGED):
            break
        hooked = hooked or (layer is not None and bool(layer._forward_pre_hooks))
        source = _input(source)
    return None, False


def _readers(node: fx.Node, module_of: _ModuleOf) -> list[fx.Node] | None:
    """The layers that read ``node`` through activations, pooling and sums; None if anything else reads it."""
    readers: list[fx.Node] = []
    seen: set[fx.Node] = set()
    queue = _value_users(node)
    while queue:
        user = queue.pop(0)
        if user in seen:
            continue
        seen.add(user)
        module = module_of(user)
        if isinstance(module, NEVER_WHITENED):
            readers.append(user)
        elif isinstance(module, WEIGHTED):
            if _is_pooled(user, module_of) and _gates(user):
                queue.extend(_value_users(user))  # squeeze-and-excite: its gate joins the map again
            else:
                readers.append(user)
        elif user.op == "output" or not _stands_between(user, module):
            return None
        else:
            queue.extend(_value_users(user))
    return readers or None


def _stands_between(node: fx.Node, module: Any) -> bool:
    if module is not None:
        return _is_activation(module) or isinstance(module, _BETWEEN)
    return _function(node) in _FUNCTIONS_BETWEEN


def _is_activation(module: Any) -> bool:
    return type(module).__module__ == "torch.nn.modules.activation"


def _writers(node: fx.Node, module_of: _ModuleOf) -> list[fx.Node]:
    """The calls that would write into what ``node`` puts out."""
    found = []
    for user in node.users:
        in_place_call = (
            getattr(module_of(user), "inplace", False)
            or user.kwargs.get("inplace") is True
            or (len(user.args) > 1 and user.args[1] is True)  # F.relu(x, True)
            or _function(user) in ("relu_", "add_", "mul_", "iadd", "imul")
        )
        if in_place_call and _input(user) is node:
            found.append(user)
        elif _is_view(user, module_of):
            found += _writers(user, module_of)
    return found


def _is_view(node: fx.Node, module_of: _ModuleOf) -> bool:
    """Whether what a node puts out may lie in the memory of its input."""
    module = module_of(node)
    return _function(node) in _VIEWS if module is None else isinstance(module, (*_UNCHANGED, nn.Flatten))


def _overwrites_shared_input(node: fx.Node, module_of: _ModuleOf) -> bool:
    """Whether a function would write into the norm's input, were the norm gone, while others read it, as
    they may read the input of the whole.
    """
    if all(module_of(user) is not None for user in _writers(node, module_of)):
        return False
    source = _input(node)
    while source is not None and source.op != "placeholder" and len(_value_users(source)) == 1:
        if not _is_view(source, module_of):
            return False
        source = _input(source)
    return source is not None


def _is_pooled(node: fx.Node, module_of: _ModuleOf) -> bool:
    """Whether the layer's input comes from a global pool through pointwise modules and 1x1 layers."""
    source = _input(node)
    while source is not None:
        module = module_of(source)
        if isinstance(module, _POOLS):
            return module.output_size in (1, (1, 1), [1, 1])
        if source.target in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d):
            size = source.args[1] if len(source.args) > 1 else source.kwargs.get("output_size")
            return size in (1, (1, 1), [1, 1])
        if source.target in ("mean", "amax", torch.mean, torch.amax):
            dims = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim")
            dims = dims if isinstance(dims, (tuple, list)) else (dims,)
            return all(isinstance(d, int) for d in dims) and sorted(d % 4 for d in dims) == [2, 3]
        pointwise = (
            _is_silu(source)
            or isinstance(module, (*WEIGHTED, *NORMS, *_UNCHANGED, nn.Flatten))
            or (module is not None and _is_activation(module))
            or _function(source) in _POINTWISE
        )
        if not pointwise:
            return False
        source = _input(source)
    return False


def _gates(node: fx.Node) -> bool:
    """Whether what the layer puts out ends up as a factor: squeeze-and-excite, not a classifier."""
    seen, queue = set(), list(node.users)
    while queue:
        user = queue.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in _FACTORS and not _is_silu(user):
            return True
        queue.extend(user.users)
    return False


def _is_silu(node: fx.Node) -> bool:
    """Whether a node is x·sigmoid(x), as some encoders of smp write it out."""
    if node.target not in _FACTORS or len(node.all_input_nodes) != 2:
        return False
    one, other = node.all_input_nodes
    pairs = ((one, other), (other, one))
    return any(_function(gate) == "sigmoid" and _input(gate) is x for x, gate in pairs)

"""From a trained network to a plain one: constants into weights, exactly.

A deconvolved network in evaluation is already a plain network, layer by layer: w' = w D and b' = b - w'·μ
(Ye et al., ICLR 2020, section 3.3). Batch norms fold into the layer before them likewise, so that a twin
deploys the same way. Nothing is approximated, and nothing is exported here: see export.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from segdeconv.convert import fold_batch_norm, leftover, transform
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.structure import (
    NEVER_WHITENED,
    computes_as,
    detached_copy,
    is_plain_layer,
    is_plain_norm,
    read_structure,
    set_to_evaluation,
)


def fold_network_deconv(model: nn.Module) -> nn.Module:
    """A plain copy of a network, in evaluation mode, that computes what ``model.eval()`` does.

    Whitened layers become Conv2d and Linear. A batch norm that provably follows a plain layer of its own is
    folded into it, leaving its activation; others stay, as plain operations.
    """
    model = detached_copy(model)
    set_to_evaluation(model)
    plain: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, Whitened):
            _settle_weight(module)
        if isinstance(module, WhitenedConv2d):
            plain[module] = module.to_conv()
        elif isinstance(module, WhitenedLinear):
            plain[module] = module.to_linear()
    transform(plain)

    modules: dict[str, Any] = dict(model.named_modules())
    structure = read_structure(model)
    gone: dict[nn.Module, nn.Module] = {}
    for norm_name, layer_name in structure.norm_after.items():
        norm, layer = modules[norm_name], modules[layer_name]
        proven = norm_name not in structure.guessed and not {norm_name, layer_name} & structure.weight_read
        plain_layer = is_plain_layer(layer) or computes_as(layer, NEVER_WHITENED)
        # What is computed, as by a parametrization, is not there to be changed.
        given = plain_layer and all(isinstance(x, nn.Parameter | None) for x in (layer.weight, layer.bias))
        if proven and given and is_plain_norm(norm) and norm.running_mean is not None:
            fold_batch_norm(layer, norm)
            gone[norm] = leftover(norm).eval()
    transform(gone)
    return model


def _settle_weight(layer: Whitened) -> None:
    """Make a Parameter of a weight that hooks compute before every call: pruning, and the norms of weights
    that are no parametrizations.
    """
    for hook in list(layer._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(layer, hook._tensor_name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(layer, hook.name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(layer, hook.name)

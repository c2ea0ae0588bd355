"""From a trained network to a plain one: constants into weights, exactly.

A deconvolved network in evaluation is already a plain network, layer by layer: w' = D w and b' = b - w'·μ
(Ye et al., ICLR 2020, section 3.3). Batch norms fold into the layer before them likewise, so that a twin
deploys the same way. Nothing is approximated, and nothing is exported here: see export.py.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv.convert import TRANSPOSED, fold_batch_norm, is_plain, leftover, read_structure, replace_modules
from segdeconv.layers import WhitenedConv2d, WhitenedLinear


def fold_network_deconv(model: nn.Module) -> nn.Module:
    """A plain copy of a network, in evaluation mode, that computes what ``model.eval()`` does.

    Whitened layers become Conv2d and Linear; a batch norm that follows a plain layer of its own is folded
    into it, leaving its activation. Batch norms that precede their convolution stay, as plain operations.
    """
    model = copy.deepcopy(model).eval()
    modules = dict(model.named_modules())
    swaps: dict[nn.Module, nn.Module] = {}
    for norm_name, layer_name in read_structure(model).norm_after.items():
        norm, layer = modules[norm_name], modules[layer_name]
        plain = is_plain(layer) or isinstance(layer, TRANSPOSED)
        if plain and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            fold_batch_norm(layer, norm)
            swaps[norm] = leftover(norm)
    for module in modules.values():
        if isinstance(module, WhitenedConv2d):
            swaps[module] = module.to_conv()
        elif isinstance(module, WhitenedLinear):
            swaps[module] = module.to_linear()
    return replace_modules(model, swaps)

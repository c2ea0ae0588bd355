"""Networks by name. Each is written, or taken from smp, torchvision or timm, once, with batch norm.

The deconvolved twin comes from `segdeconv.convert`; there is no second copy of any architecture.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from segdeconv.config import ModelConfig
from segdeconv.convert import ConversionReport, Filter, convert_to_network_deconv
from segdeconv.errors import UserError, did_you_mean, first_line
from segdeconv.models import cifar, classification, segmentation
from segdeconv.models.registry import Architecture, merge

ARCHITECTURES: dict[str, Architecture] = merge(
    segmentation.ARCHITECTURES, classification.ARCHITECTURES, cifar.ARCHITECTURES
)

# With these timm fetches and reads files from anywhere, and a stranger's recipe or checkpoint may say where.
_OPTIONS_OF_PLACES = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay")
# Options that ask for downloaded weights, and the part of the network these are for.
_PRETRAINED_OPTIONS = {
    "weights": "",
    "pretrained": "",
    "weights_backbone": "backbone",
    "encoder_weights": "encoder",
}


def resolve(config: ModelConfig) -> tuple[Architecture, str | None]:
    """The architecture and encoder a model configuration names.

    A name in `ARCHITECTURES` wins; then ``ARCHITECTURE_ENCODER`` is split; then timm's classifiers are tried.

    Raises:
        UserError: nothing is called that; the message names what is near.
    """
    name = config.architecture
    if name in ARCHITECTURES:
        architecture, encoder = ARCHITECTURES[name], config.encoder
    else:
        # The longest architecture name first: unetplusplus before unet.
        heads = sorted((a for a in ARCHITECTURES if name.startswith(a + "_")), key=len, reverse=True)
        heads = [head for head in heads if ARCHITECTURES[head].takes_encoder]
        if heads and config.encoder is not None:
            raise UserError(
                f"model.architecture = {name!r} names its encoder, so model.encoder = {config.encoder!r} "
                "must go (--set model.encoder=null)"
            )
        if heads:
            architecture, encoder = ARCHITECTURES[heads[0]], name[len(heads[0]) + 1 :]
        elif timm.is_model(name):
            architecture, encoder = classification.timm_architecture(name), None
        else:
            others = f"known are {', '.join(segmentation.ARCHITECTURES)} and torchvision's and timm's"
            hint = did_you_mean(name, [*ARCHITECTURES, *timm.list_models()], others)
            raise UserError(f"no architecture is called {name!r}; {hint}")
    if architecture.takes_encoder:
        encoder = segmentation.check_encoder(encoder or architecture.default_encoder)
    elif encoder is not None:
        raise UserError(f"{name} takes no encoder, so model.encoder = {encoder!r} must go")
    return architecture, encoder


def trained_part(config: ModelConfig) -> str | None:
    """The name of the part that begins with trained weights, whose function a conversion must keep: '' where
    that is the whole network, None where nothing is.
    """
    if config.init is not None:
        return ""
    asked = [part for option, part in _PRETRAINED_OPTIONS.items() if config.options.get(option)]
    return min(asked, default=None)  # '' if it is among them


def normalisation_of_weights(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation of the pictures on which the weights that ``config.options`` asks for were
    trained, as smp and timm say; None where they do not, or nothing is asked for.
    """
    _, encoder = resolve(config)
    weights = config.options.get("encoder_weights")
    if encoder is not None and weights:
        said = smp.encoders.get_preprocessing_params(encoder, weights)
        if said["input_range"] != [0, 1]:
            return None
        return tuple(said["mean"]), tuple(said["std"])
    if config.options.get("pretrained"):
        of_timm = timm.get_pretrained_cfg(config.architecture)
        return None if of_timm is None else (tuple(of_timm.mean), tuple(of_timm.std))
    return None


def build_model(
    config: ModelConfig, num_classes: int, pretrained: bool = True, warm_start: bool | Filter | None = None
) -> tuple[nn.Module, ConversionReport | None]:
    """Build the network a recipe describes, converted when ``config.norm`` is 'nd'. ``config.init`` does not
    count here; see `segdeconv.checkpoint.build_started`.

    Args:
        num_classes: outputs of the head.
        pretrained: False ignores options that ask for downloaded weights; used before a checkpoint is loaded.
        warm_start: where the conversion keeps the network's function; by default in its `trained_part`.

    Returns:
        The network, in training mode, and what the conversion did (None for 'bn').

    Raises:
        UserError: unknown architecture, encoder or option; ``config.keep`` matches no layer, or nothing is
            left to whiten.
    """
    architecture, encoder = resolve(config)
    options = dict(config.options)
    for key in _OPTIONS_OF_PLACES:
        if options.get(key) is not None:
            raise UserError(f"model.options.{key}: files are not named here; start from one with model.init")
    if not pretrained:
        implied = architecture.with_weights if options.get("weights") else {}
        asked = {key: value for key, value in options.items() if key not in _PRETRAINED_OPTIONS}
        options = implied | asked
    model = _call(architecture, encoder, num_classes, options, config.architecture)
    if warm_start is None:
        part = trained_part(config)

        def warm_start(module: nn.Module, name: str) -> bool:
            return part is not None and name.startswith(part)

    return as_configured(model, config, warm_start)


def as_configured(
    model: nn.Module, config: ModelConfig, warm_start: bool | Filter
) -> tuple[nn.Module, ConversionReport | None]:
    """A batch-norm network of ``config``, converted when its norm is 'nd', and what the conversion did.

    Raises:
        UserError: ``config.keep`` matches no layer, or nothing is left to whiten.
    """
    if config.norm == "bn":
        return model, None

    names = [name for name, _ in model.named_modules()]
    for pattern in config.keep:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"model.keep: {pattern!r} matches no layer of {config.architecture}")

    patterns = [*config.keep, *(f"{pattern}.*" for pattern in config.keep)]  # a part, and what is in it

    def wanted(module: nn.Module, name: str) -> bool:
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    return convert_to_network_deconv(model, config.network_deconv, wanted, warm_start)


def _call(
    architecture: Architecture, encoder: str | None, num_classes: int, options: dict[str, Any], name: str
) -> nn.Module:
    try:
        return architecture.build(num_classes, encoder, options)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, OSError) as error:
        what = f"{name} with encoder {encoder}" if encoder else name
        raise UserError(
            f"{what} cannot be built with model.options = {options}: {first_line(error)}"
        ) from None


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def size_multiple(model: nn.Module) -> int:
    """What height and width of the network's input must be a multiple of, in pixels."""
    if getattr(model, "requires_divisible_input_shape", False):  # smp says so itself
        return int(model.encoder.output_stride)  # type: ignore[union-attr,arg-type]
    return 1


def main_output(output: Any) -> torch.Tensor:
    """The logits of a network that may return auxiliary ones beside them."""
    return split_output(output)[0]


def split_output(output: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Main and auxiliary logits, of networks that return a tensor, a dictionary or a tuple (GoogLeNet)."""
    if isinstance(output, dict):
        return output["out"], [output["aux"]] if "aux" in output else []
    if isinstance(output, tuple):
        return output[0], [logits for logits in output[1:] if logits is not None]
    return output, []

"""Turn a checkpoint of the authors' code (github.com/yechengxi/deconvolution) into one of ours.

    python tools/convert_reference_checkpoint.py AUTHORS.pth --recipe RECIPE.yaml --out model.safetensors

The recipe says which of our networks theirs is, with ``model.network_deconv.mode: reference`` and the block
size they trained with; layers in which they kept batch norm (the shortcuts of their ResNets) are named in
``model.keep``. Layers are matched by name, or in order where names differ, and every shape is checked. The
result evaluates to the same numbers: `segdeconv eval model.safetensors`.

Their layout, per whitened layer: ``weight``, ``bias``, ``running_mean`` (k·k·B entries; groups · k·k·B for a
grouped convolution) and ``running_deconv`` (k·k·B square; one per group).
"""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from segdeconv.checkpoint import CheckpointInfo, save_checkpoint
from segdeconv.config import load_recipe
from segdeconv.data import open_samples
from segdeconv.errors import UserError, one_sentence
from segdeconv.layers import Whitened
from segdeconv.models import build_model, resolve


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, by name, read without running any code from it.

    Raises:
        UserError: the file is missing or damaged, or holds anything but tensors and plain values.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first = str(error).split("\n")[0][:160]
        raise UserError(f"{path}: not a file of plain tensors, so it is not loaded ({first})") from None
    for key in ("state_dict", "net", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def load_reference_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a state dict of the authors' network into ours, in reference mode.

    Raises:
        UserError: the networks have different layers; the message names the first that differs.
    """
    theirs = [key.removesuffix(".running_deconv") for key in state if key.endswith(".running_deconv")]
    ours = {name: module for name, module in model.named_modules() if isinstance(module, Whitened)}
    if len(theirs) != len(ours):
        raise UserError(f"their network has {len(theirs)} whitened layers, the recipe's has {len(ours)}")
    pairs = (
        [(name, name) for name in theirs]
        if set(theirs) == set(ours)
        else list(zip(theirs, ours, strict=True))
    )
    renamed: dict[str, Tensor] = {}
    for source, target in pairs:
        layer = ours[target]
        renamed[f"{target}.weight"] = state[f"{source}.weight"]
        # Their linear layers may have no bias; ours always do.
        renamed[f"{target}.bias"] = state.get(f"{source}.bias", torch.zeros(len(layer.weight)))
        deconv, mean = state[f"{source}.running_deconv"], state[f"{source}.running_mean"]
        if deconv.numel() != layer.running_whitening.numel() or mean.numel() != layer.running_mean.numel():
            raise UserError(
                f"their {source} whitens {deconv.shape[-1]} features, our {target} "
                f"{layer.running_whitening.shape[-1]}; check the recipe's block size"
            )
        renamed[f"{target}.running_whitening"] = deconv.view_as(layer.running_whitening)
        renamed[f"{target}.running_mean"] = mean.view_as(layer.running_mean)
        renamed[f"{target}.num_batches_tracked"] = torch.tensor(0)
    rest = {k: v for k, v in state.items() if k.rpartition(".")[0] not in set(theirs)}
    wanted = [key for key in model.state_dict() if key not in renamed]
    if set(rest) != set(wanted):
        if len(rest) != len(wanted):
            raise UserError(
                f"their network has {len(rest)} further tensors ({', '.join(list(rest)[:2])} ...), ours "
                f"{len(wanted)} ({', '.join(wanted[:2])} ...); name layers with batch norm in model.keep"
            )
        rest = dict(zip(wanted, rest.values(), strict=True))
    renamed |= rest
    for key, value in model.state_dict().items():
        if renamed[key].shape != value.shape:
            raise UserError(f"{key}: theirs is {tuple(renamed[key].shape)}, ours {tuple(value.shape)}")
    model.load_state_dict(renamed)


def convert(source: Path, recipe_name: str, overrides: list[str], out: Path) -> None:
    recipe = load_recipe(recipe_name, overrides)
    if recipe.model.norm != "nd" or recipe.model.network_deconv.mode != "reference":
        raise UserError(
            f"{recipe_name}: model.norm must be nd and model.network_deconv.mode must be reference"
        )
    samples = open_samples(recipe.data, "val")
    model, _ = build_model(recipe.model, len(samples.classes), pretrained=False)
    load_reference_state(model, read_state(source))
    architecture, _ = resolve(recipe.model)
    info = CheckpointInfo(recipe, architecture.task, samples.classes, samples.palette, 0, {})
    save_checkpoint(out, model, info)
    print(f"wrote {out}; next: segdeconv eval {out}")


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="the authors' .pth file")
    parser.add_argument("--recipe", required=True, help="our recipe of the same network")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe"
    )
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.recipe, arguments.set, arguments.out)


if __name__ == "__main__":
    main()

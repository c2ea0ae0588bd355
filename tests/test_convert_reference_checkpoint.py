"""tools/convert_reference_checkpoint.py on state dicts laid out as the authors' code saves them."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import authors_fold
from test_checkpoint import Hostile
from torch import Tensor, nn

from segdeconv.checkpoint import load_checkpoint
from segdeconv.config import load_recipe
from segdeconv.layers import Whitened
from segdeconv.models import build_model

TOOL = Path(__file__).parents[1] / "tools" / "convert_reference_checkpoint.py"
SETTINGS = [
    "model.architecture=unet", "model.encoder=mobilenet_v2",
    "model.options={encoder_depth: 3, decoder_channels: [32, 16, 8]}",
    "model.network_deconv={mode: reference, block_size: 16}",
]  # fmt: skip


def authors_state(prefix: str, keep: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], nn.Module]:
    """Random values in the authors' layout, and the plain network they stand for, folded in loops."""
    settings = [*SETTINGS, f"model.keep=[{', '.join(keep)}]"]
    recipe = load_recipe("demo", settings)
    model, _ = build_model(recipe.model, 8)
    model.double()
    state: dict[str, Tensor] = {}
    plain, _ = build_model(load_recipe("demo", [*settings, "model.norm=bn"]).model, 8)
    plain.double().eval()
    for name, module in model.named_modules():
        if isinstance(module, Whitened):
            groups, features = len(module.running_mean), module.running_mean.shape[-1]
            deconv = torch.eye(features).double() + 0.1 * torch.randn(groups, features, features).double()
            mean = 0.1 * torch.randn(groups * features).double()
            bias = 0.1 * torch.randn(len(module.weight)).double()
            block = features // module.weight[0, 0].numel()
            deconv = deconv[0] if groups == 1 else deconv
            source = prefix + name
            state[f"{source}.weight"], state[f"{source}.bias"] = module.weight.detach(), bias
            state[f"{source}.running_mean"], state[f"{source}.running_deconv"] = mean, deconv
            target = plain.get_submodule(name)
            weight, shifted = authors_fold(module.weight.detach(), bias, mean, deconv, block, groups)
            target.weight, target.bias = nn.Parameter(weight), nn.Parameter(shifted)
        elif isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            state |= {f"{prefix}{name}.{key}": value for key, value in module.state_dict().items()}
            plain.get_submodule(name).load_state_dict(module.state_dict())
    kept = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    for name, module in list(plain.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and name not in kept:
            plain.set_submodule(name, nn.Identity())
    return state, plain


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Call the tool's main as its command line would; returns exit code and standard error."""
    tool = runpy.run_path(str(TOOL))

    def call(source: Path, out: Path, *settings: str) -> tuple[int, str]:
        changes = [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]
        arguments = [TOOL, source, "--recipe", "demo", *changes, "--out", out]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        try:
            tool["main"]()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("prefix", "keep"), [("", ()), ("module.", ()), ("module.body.", ()), ("", ("encoder.features.0.*",))]
)
def test_the_same_numbers(prefix: str, keep: tuple[str, ...], tmp_path: Path, run: Callable) -> None:
    """By name, wrapped in DataParallel, under other names in the same order, and with batch norm kept."""
    state, plain = authors_state(prefix, keep)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "authors.pth")
    code, err = run(
        tmp_path / "authors.pth", tmp_path / "ours.safetensors", f"model.keep=[{', '.join(keep)}]"
    )
    assert code == 0, err
    model, info = load_checkpoint(tmp_path / "ours.safetensors")
    assert info.recipe.model.network_deconv.mode == "reference"
    x = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        want = plain(x.double())
        got = model(x)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["model.network_deconv.block_size=8"], "check the recipe's block size"),
        (["model.encoder=resnet18"], "whitened layers, the recipe's has"),
        (["model.keep=[encoder.features.0.*]"], "whitened layers, the recipe's has"),
        (["model.network_deconv.mode=exact"], "must be reference"),
    ],
)
def test_networks_that_differ(settings: list[str], says: str, tmp_path: Path, run: Callable) -> None:
    torch.save(authors_state("")[0], tmp_path / "authors.pth")
    code, err = run(tmp_path / "authors.pth", tmp_path / "ours.safetensors", *settings)
    assert (code, err.count("\n")) == (2, 1)
    assert says in err
    assert not (tmp_path / "ours.safetensors").exists()


@pytest.mark.parametrize("what", ["hostile", "missing", "truncated", "no tensors"])
def test_bad_files(what: str, tmp_path: Path, run: Callable) -> None:
    path = tmp_path / "authors.pth"
    if what == "hostile":
        torch.save({"state_dict": Hostile()}, path)
    elif what == "truncated":
        torch.save({"x": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:500])
    elif what == "no tensors":
        torch.save({"x": 3}, path)
    code, err = run(path, tmp_path / "ours.safetensors")
    assert (code, err.count("\n")) == (2, 1), err
    assert "authors.pth" in err
    assert not Path("hostile-was-run").exists()

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch
from networks import logits
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv.config import ModelConfig, NetworkDeconvConfig
from segdeconv.errors import UserError
from segdeconv.layers import Whitened
from segdeconv.models import (
    ARCHITECTURES,
    build_model,
    normalisation_of_weights,
    resolve,
    size_multiple,
    trained_part,
)
from segdeconv.models.registry import merge


@pytest.mark.parametrize(
    ("name", "encoder", "kind"),
    [
        ("unet_resnet18", None, "Unet"),
        ("unetplusplus_mobilenet_v2", None, "UnetPlusPlus"),
        ("deeplabv3plus", "resnet18", "DeepLabV3Plus"),
        ("unet_mobilenetv3_small_050", None, "Unet"),
        ("fcn_resnet50", None, "FCN"),
        ("resnet18", None, "ResNet"),
        ("densenet121", None, "DenseNet"),
        ("cifar_resnet18", None, "Sequential"),
        ("mobilenetv3_small_050", None, "MobileNetV3"),
    ],
)
def test_names(name: str, encoder: str | None, kind: str) -> None:
    config = ModelConfig(name, encoder=encoder, network_deconv=NetworkDeconvConfig(block_size=8))
    model, report = build_model(config, 7)
    assert type(model).__name__ == kind
    assert report is not None
    assert any(isinstance(m, Whitened) for m in model.modules())
    twin, no_report = build_model(ModelConfig(name, encoder=encoder, norm="bn"), 7)
    assert no_report is None
    assert any(isinstance(m, _BatchNorm) for m in twin.modules())


def test_torchvision_wins_over_smp() -> None:
    """deeplabv3_resnet50 is the paper's network with its aux head; smp's is deeplabv3 + resnet50."""
    model, _ = build_model(ModelConfig("deeplabv3_resnet50", norm="bn"), 5)
    assert set(model.eval()(torch.zeros(1, 3, 32, 32))) == {"out", "aux"}
    assert resolve(ModelConfig("deeplabv3", encoder="resnet50"))[1] == "resnet50"


def test_vgg11_means_the_one_with_batch_norm() -> None:
    model, _ = build_model(ModelConfig("vgg11", norm="bn"), 3)
    assert any(isinstance(m, _BatchNorm) for m in model.modules())


@pytest.mark.parametrize(
    ("encoder", "options", "says"),
    [
        ("resnet18", {"activation": "softmax"}, "activation: the loss and exported graphs apply softmax"),
        ("resnet18", {"aux_params": {"classes": 2}}, "aux_params: its second head"),
        ("tu-resnet18", {"classes": 3}, "classes: the data says them"),
        ("resnet18", {"decoder_chanels": [8]}, "did you mean 'decoder_channels'"),
        ("tu-resnet18", {"decoder_chanels": [8]}, "did you mean 'decoder_channels'"),
        ("tu-resnet18", {"checkpoint_path": "a.pth"}, "checkpoint_path: files are not named here"),
        ("tu-resnet18", {"pretrained_cfg": {"url": "http://x/y"}}, "pretrained_cfg: files are not named"),
        ("tu-resnet18", {"cache_dir": "/"}, "cache_dir: files are not named here"),
        ("tu-hf-hub:a/b", {}, "no encoder is called 'tu-hf-hub:a/b'"),
        ("tu-local-dir:/a", {}, "no encoder is called"),
    ],
)
def test_options_that_are_none(encoder: str, options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_model(ModelConfig("unet", encoder=encoder, options=options), 3)


def test_further_options_are_timms() -> None:
    options = {"drop_path_rate": 0.1, "activation": None}
    assert build_model(ModelConfig("unet", encoder="tu-resnet18", options=options), 3)


def test_twins_start_from_the_same_weights() -> None:
    """Up to the scale of filters, which is nothing to a batch norm."""
    torch.manual_seed(3)
    twin, _ = build_model(ModelConfig("unet_resnet18", norm="bn"), 4)
    torch.manual_seed(3)
    model, _ = build_model(ModelConfig("unet_resnet18"), 4)
    theirs = dict(twin.named_parameters())
    for name, value in model.named_parameters():
        if name.endswith("weight"):
            scale = value.flatten(1).norm(dim=1) / theirs[name].flatten(1).norm(dim=1)
            scaled = theirs[name] * scale.view(-1, *(1,) * (value.ndim - 1))
            torch.testing.assert_close(value, scaled, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "init", "expected"),
    [({}, None, None), ({"encoder_weights": "imagenet"}, None, "encoder"), ({}, "runs/x", ""),
     ({"encoder_weights": None}, None, None), ({"pretrained": True}, None, ""),
     ({"weights_backbone": "DEFAULT"}, None, "backbone"), ({"encoder_weights": "imagenet"}, "runs/x", ""),
     ({"weights": "DEFAULT", "weights_backbone": "DEFAULT"}, None, "")],
)  # fmt: skip
def test_what_starts_trained(options: dict, init: str | None, expected: str | None) -> None:
    assert trained_part(ModelConfig("unet_resnet18", options=options, init=init)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (ModelConfig("unet_tf_efficientnet_lite0", options={"encoder_weights": True}), ((0.5,) * 3,) * 2),
        (ModelConfig("unet_tf_efficientnet_lite0"), None),
        (ModelConfig("test_vit", options={"pretrained": True}), ((0.5,) * 3,) * 2),
        (ModelConfig("tf_efficientnet_lite0", options={"pretrained": True}), ((0.5,) * 3,) * 2),
        (ModelConfig("deeplabv3_resnet50", options={"weights": "DEFAULT"}), None),
    ],
)
def test_pictures_that_pretrained_weights_know(config: ModelConfig, expected: object) -> None:
    assert normalisation_of_weights(config) == expected


@pytest.mark.parametrize(
    ("encoder", "asked", "got"),
    [("resnet18", "imagenet", "imagenet"), ("tu-resnet18", "imagenet", True), ("tu-resnet18", False, None),
     ("resnet18", False, None), ("resnet18", None, None)],
)  # fmt: skip
def test_smp_gets_weights_by_the_names_it_has(
    encoder: str, asked: object, got: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For smp, `encoder_weights=False` of one of timm's encoders is a yes."""
    options = []

    def spy(architecture: str, encoder: str, classes: int, encoder_weights: object) -> nn.Module:
        options.append(encoder_weights)
        return smp.Unet(encoder, encoder_weights=None, classes=classes)

    monkeypatch.setattr(smp, "create_model", spy)
    build_model(ModelConfig("unet", encoder=encoder, options={"encoder_weights": asked}), 3)
    assert options == [got]


def test_keep_patterns() -> None:
    _, report = build_model(ModelConfig("unet_resnet18", keep=("*.downsample.*", "segmentation_head.0")), 4)
    kept = [layer.name for layer in report.layers if layer.action == "kept"]
    assert len(kept) == 7
    assert "segmentation_head.0" in kept


def test_keep_a_whole_part() -> None:
    network, _ = build_model(ModelConfig("unet_resnet18", keep=("encoder",)), 4)
    assert not any(isinstance(module, Whitened) for module in network.encoder.modules())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in network.encoder.modules()) == 20
    assert any(isinstance(module, Whitened) for module in network.decoder.modules())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ModelConfig("unnet"), "did you mean"),
        (ModelConfig("unet", encoder="resnt18"), r"did you mean 'resnet18'\?"),
        (
            ModelConfig("unet_resnet18", options={"decoder_chanels": [1]}),
            r"did you mean 'decoder_channels'\?",
        ),
        (ModelConfig("unet_resnet18", options={"decoder_channels": [8, 8]}), "cannot be built"),
        (ModelConfig("unet_mobilenetv3_small_050", options={"wrong": 1}), "cannot be built"),
        (ModelConfig("resnet18", encoder="resnet50"), "takes no encoder"),
        (ModelConfig("resnet18", options={"wrong": 1}), "cannot be built"),
    ],
)
def test_wrong_names(config: ModelConfig, says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_model(config, 4)


def test_a_name_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="two architectures are called 'unet'"):
        merge(ARCHITECTURES, {"unet": ARCHITECTURES["fpn"]})


def test_size_multiple_is_what_the_network_says() -> None:
    assert size_multiple(build_model(ModelConfig("unet_resnet18", norm="bn"), 2)[0]) == 1
    assert size_multiple(build_model(ModelConfig("linknet_resnet18", norm="bn"), 2)[0]) == 32
    assert size_multiple(build_model(ModelConfig("deeplabv3plus_resnet18", norm="bn"), 2)[0]) == 16
    assert size_multiple(build_model(ModelConfig("fcn_resnet50", norm="bn"), 2)[0]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [e for e in smp_encoders if not e.startswith("mit_")])
def test_every_smp_encoder_converts(encoder: str) -> None:
    """No batch norm that the forward pass uses is left, but behind kept layers; the twin runs."""
    model, report = build_model(ModelConfig("unet", encoder=encoder), 3)
    for layer in report.layers:
        if layer.action == "kept" and "BatchNorm" in layer.kind:
            assert "which is kept" in layer.reason or layer.reason == "not used by the forward pass"
    assert report.count("swapped") > report.count("kept") / 2
    with torch.no_grad():
        assert logits(model.eval()(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*smp.MODEL_ARCHITECTURES_MAPPING])
@pytest.mark.parametrize(
    "encoder", ["resnet34", "mobilenet_v2", "timm-efficientnet-b0", "densenet121", "vgg11_bn"]
)
def test_every_smp_architecture_converts(architecture: str, encoder: str) -> None:
    if architecture == "dpt":
        encoder = "tu-vit_tiny_patch16_224"
    config = ModelConfig(architecture, encoder=encoder, network_deconv=NetworkDeconvConfig(block_size=8))
    try:
        smp.create_model(architecture, encoder, encoder_weights=None)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"smp cannot build it: {error}")
    model, report = build_model(config, 3)
    assert report.count("swapped")
    size = 224 if architecture == "dpt" else 128
    with torch.no_grad():
        assert logits(model.eval()(torch.zeros(1, 3, size, size))).shape == (1, 3, size, size)

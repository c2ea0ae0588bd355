"""Recipes: frozen dataclasses, validated on construction, loaded from YAML.

One recipe describes one run: which network and twin, which data, how it is trained. This file parses and
checks; it builds nothing. Validation is pydantic's; the messages are ours, one sentence that names the key.
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from segdeconv.errors import UserError, did_you_mean

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=32768)]
Factor = Annotated[float, Field(ge=0.1, le=10)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]
Size = tuple[Side, Side]  # height, width in pixels
Channel = Annotated[int, Field(ge=0, le=255)]
_OFF = BeforeValidator(lambda value: "off" if value is False else value)  # a bare off is False in YAML


@dataclass(frozen=True, config=_STRICT)
class NetworkDeconvConfig:
    """Settings of network deconvolution.

    Attributes:
        mode: 'fast' standardises every channel by the batch, with gradient, and whitens the correlation of
            the standardised patches by a running average (docs/whitening.md).
            'exact' is the published method on blocks of whole channels with bias-corrected running values:
            batch statistics with full gradient, at several times the cost.
            'reference' is the authors' FastDeconv to the letter: interleaved blocks, one mean for all
            blocks, running values that start at zero and identity. It is there to load their checkpoints.
        block_size: most channels of a convolution that are whitened together; the largest divisor of a
            group's channels that is no larger is taken, 1 of a larger prime number (in reference mode the
            greatest common divisor, and whole groups). None is 32 in fast mode and, as published, 64 in the
            others.
        linear_block_size: the same for linear layers.
        eps: added to variances before their root: of each channel (fast) or of the features (otherwise).
        momentum: weight of a new batch in the running values.
        filter_norm: what filters are brought to where their batch norm goes and they are to be trained from
            scratch. With shorter ones the same learning rate turns them faster (docs/whitening.md, initial
            scale).
        refresh_every: fast mode: the longest interval, in training steps, between updates of the whitening
            matrix. Each of the first 40 steps updates it, then the interval grows by one every 20 steps.
        num_iters: exact and reference mode: coupled Newton-Schulz iterations.
        sampling_stride: exact and reference mode: statistics use every n-th position, in units of the
            convolution's stride.

    Raises:
        pydantic.ValidationError: a ValueError that names the setting and what was expected.
    """

    mode: Literal["fast", "exact", "reference"] = "fast"
    block_size: Positive | None = None
    linear_block_size: Positive = 512
    eps: Annotated[float, Field(gt=0)] = 1e-5
    momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    filter_norm: Annotated[float, Field(gt=0)] = 1.0
    refresh_every: Positive = 20
    num_iters: Positive = 5
    sampling_stride: Positive = 3

    @model_validator(mode="after")
    def _check(self) -> NetworkDeconvConfig:
        without_effect = ("num_iters", "sampling_stride") if self.mode == "fast" else ("refresh_every",)
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        for name in without_effect:
            if getattr(self, name) != usual[name]:
                modes = "exact and reference mode" if self.mode == "fast" else "fast mode"
                raise ValueError(f"{name} = {getattr(self, name)} is for {modes}, not for mode {self.mode!r}")
        return self

    @property
    def conv_block_size(self) -> int:
        return self.block_size or (32 if self.mode == "fast" else 64)


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """Which network.

    Attributes:
        architecture: a name in `segdeconv.models.ARCHITECTURES`, or architecture and encoder joined as in
            ``unet_resnet18``.
        encoder: an smp or timm encoder, for architectures that take one.
        norm: 'nd' converts the network with network deconvolution, 'bn' keeps its batch norm.
        options: further keyword arguments of the builder, such as ``decoder_channels``.
        keep: names of layers, batch norms and whole parts (``encoder``) that stay as they are in the twin,
            with * and ? as wildcards.
        init: a run, checkpoint or zoo entry of this architecture to start from, whatever its classes. Its
            norm is batch norm or, for a deconvolved network, either.

    A deconvolved network keeps the function of the trained weights it starts from, whether those of ``init``
    or pretrained ones asked for in ``options``, which may be those of its encoder alone: batch norms are
    folded, and the statistics are calibrated on training images before the first step.
    """

    architecture: str
    encoder: str | None = None
    norm: Literal["bn", "nd"] = "nd"
    options: dict[str, Any] = Field(default_factory=dict)
    keep: tuple[str, ...] = ()
    init: str | None = None
    network_deconv: NetworkDeconvConfig = Field(default_factory=NetworkDeconvConfig)


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Which data, and how pictures are prepared.

    Attributes:
        dataset: a name in `segdeconv.data.DATASETS`.
        root: folder of the data, relative to the working directory.
        size: height and width every picture is resized to before anything else; None keeps pictures as they
            are.
        crop: height and width of training crops; None trains on whole pictures.
        pad: pixels added on every side before the training crop.
        scale: range of the random scale factor in training, within 0.1 to 10.
        resized_crop: let a training crop be a window of 8 to 100 % of the picture's area and an aspect ratio
            of 3/4 to 4/3, resized to ``crop`` (arXiv 1409.4842).
        shorter_side: evaluate classifiers on the central ``crop`` of pictures whose shorter side is resized
            to this; None takes whole pictures.
        hflip: mirror half of the training pictures.
        color: strength of the colour jitter in training, 0 to 1.
        classes: class names in label order, for datasets that do not bring their own.
        palette: one RGB colour per class, 0 to 255; None takes evenly spread colours.
        ignore_index: label value that counts in neither loss nor metrics.
        train, val: what each split is called in the dataset's folders.
        download: fetch files that are missing, for the data sets that torchvision fetches.
        count: pictures in the train and the val split of a drawn dataset (toy).
        mean, std: normalisation in units of 0 to 1, RGB.
        num_workers: loader processes; 0 loads in the training process.
    """

    dataset: str
    root: str | None = None
    size: Size | None = None
    crop: Size | None = None
    pad: Annotated[int, Field(ge=0, le=4096)] = 0
    scale: tuple[Factor, Factor] = (1.0, 1.0)
    resized_crop: bool = False
    shorter_side: Positive | None = None
    hflip: bool = True
    color: Fraction = 0.0
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[Channel, Channel, Channel], ...] | None = None
    ignore_index: Annotated[int, Field(ge=0, le=255)] = 255
    train: str = "train"
    val: str = "val"
    download: bool = False
    count: tuple[Positive, Positive] = (320, 48)
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)
    std: tuple[Fraction, Fraction, Fraction] = (0.229, 0.224, 0.225)
    num_workers: Annotated[int, Field(ge=0, le=256)] = 0

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale must be (smallest, largest), not {self.scale}")
        if self.crop is None and (self.scale != (1.0, 1.0) or self.pad):
            raise ValueError("scale and pad change the size of pictures, so they need crop")
        if self.resized_crop and (self.crop is None or self.scale != (1.0, 1.0) or self.pad):
            raise ValueError("resized_crop needs crop, and neither scale nor pad")
        if self.shorter_side is not None:
            if self.crop is None or self.size is not None:
                raise ValueError("shorter_side needs crop, and no size")
            if self.shorter_side < max(self.crop):
                raise ValueError(f"shorter_side = {self.shorter_side} is less than crop = {self.crop}")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes holds a name twice")
        if self.palette is not None and self.classes is not None and len(self.palette) != len(self.classes):
            raise ValueError(
                f"palette has {len(self.palette)} colours for {len(self.classes)} classes; give one each"
            )
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self

    def at(self, root: str | None) -> DataConfig:
        """The same data in another folder; None changes nothing."""
        return self if root is None else dataclasses.replace(self, root=root)


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """How to train.

    Attributes:
        lr: the peak learning rate, reached after ``warmup_epochs`` of linear warm-up.
        schedule: 'poly' is (1 - t)^``poly_power``, 'cosine' is (1 + cos πt) / 2, 'constant' stays at lr.
        clip_grad: largest norm of all gradients together; None does not clip.
        amp: autocast to 'bf16' or 'fp16' (with loss scaling), or 'off'.
        compile: train the network through torch.compile, which joins its many small operations. It takes
            minutes at first (and again where torch's cache on disk is gone) and, on a CPU, where it gains
            little, a C++ compiler. All layers refresh their whitening on the same steps then. Several
            processes need equal shares of a batch. A dry run does not compile.
        cuda_graphs: record training steps as CUDA graphs (on a GPU, in one process). Where launching kernels
            takes longer than they do, steps take a fraction of the time.
        label_smoothing: as in cross-entropy.
        class_weights: one weight per class in the cross-entropy; `segdeconv data check` suggests some. A
            class of weight 0 is ignored there.
        ohem: share of the labelled pixels, the hardest, that count in the cross-entropy (online hard example
            mining, arXiv 1604.03540); None takes all.
        dice_weight: weight of a soft Dice loss over classes beside the cross-entropy (arXiv 1606.04797).
        aux_weight: weight of the auxiliary head's loss, where the network has one.
        ema_decay: evaluate and keep an exponential moving average of the weights, such as 0.999 a step.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        checkpoint_minutes: training time between two states to resume from; every epoch ends with one too.
    """

    epochs: Positive = 30
    batch_size: Positive = 8
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Share = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    poly_power: Annotated[float, Field(gt=0)] = 0.9
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    amp: Annotated[Literal["off", "bf16", "fp16"], _OFF] = "off"
    compile: bool = False
    cuda_graphs: bool = False
    label_smoothing: Share = 0.0
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    ohem: Annotated[float, Field(gt=0, lt=1)] | None = None
    dice_weight: Annotated[float, Field(ge=0)] = 0.0
    aux_weight: Annotated[float, Field(ge=0)] = 0.4
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    eval_every: Positive = 1
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 10.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError("class_weights are all 0, so that nothing would be learnt")
        return self


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """One run: network, data, training."""

    name: Annotated[str, Field(pattern=r"^[^./\\][^/\\]*$")]  # of its run's folder
    model: ModelConfig
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)


_RECIPE = TypeAdapter(Recipe)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML's own loader would silently take the last, and aliases, of which
    a few lines can stand for gigabytes.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{alias.anchor}: write out what it stands for", alias.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if any(key.value == other.value for other in keys[:i]):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} stands twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


def recipe_from_dict(values: Any, source: str) -> Recipe:
    """Validate a nested mapping.

    Raises:
        UserError: names ``source``, the first wrong key, its value, and the nearest right key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping with the keys name, model, data and train")
    try:
        recipe = _RECIPE.validate_python(values)
    except ValidationError as error:
        raise UserError(f"{source}: {_sentence(error)}") from None
    read = flat(recipe_to_dict(recipe))
    for key, value in flat(values).items():  # YAML's yes and on, which pydantic takes for 1
        if isinstance(value, bool) and type(read.get(key)) in (int, float):
            raise UserError(f"{source}: {key} = {value}: expected a number")
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain values that YAML and JSON can hold, and `recipe_from_dict` reads back to an equal recipe."""
    return _RECIPE.dump_python(recipe, mode="json")


def recipe_to_yaml(recipe: Recipe) -> str:
    """The text of a recipe's file."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one, with keys such as ``train.lr``."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def load_recipe(path_or_name: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file, or one of the package's own by name, and apply ``key.path=value`` overrides.

    Raises:
        UserError: the file is missing or is no YAML, or a key or value is wrong.
    """
    path = find_recipe(path_or_name)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if isinstance(values, dict):
        values.setdefault("name", path.stem)
        for override in overrides or []:
            _apply(values, override)
    return recipe_from_dict(values, str(path))


def own_recipes() -> dict[str, Path]:
    """The recipes that come with the package: name to file."""
    folder = Path(str(resources.files("segdeconv") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe: a YAML file, or one that comes with the package, by its name.

    Raises:
        UserError: there is none.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    own = own_recipes()
    if str(path_or_name) in own:
        return own[str(path_or_name)]
    hint = did_you_mean(str(path_or_name), own, f"own recipes are {', '.join(own)}")
    raise UserError(f"no recipe file and no recipe of the package is called {str(path_or_name)!r}; {hint}")


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override!r}: expected key=value, such as train.lr=0.05")
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"--set {override!r}: {parent!r} is a value, not a section of the recipe")
        node = child
    try:
        node[last] = yaml.load(text, _Loader)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise UserError(f"--set {override!r}: {text!r} is no YAML value") from None


_EXPECTED = {  # by pydantic's name of what is wrong
    "tuple_type": "expected a list, such as [1, 2]",
    "dataclass_type": "expected a section with keys of its own",
    "dict_type": "expected a section with keys of its own",
    "string_pattern_mismatch": "expected the name of a folder, without slashes or a dot before it",
}


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "recipe"
    if first["type"] in ("unexpected_keyword_argument", "dataclass_unexpected_keyword"):
        *parents, wrong = first["loc"]
        known = _fields(parents)
        hint = did_you_mean(str(wrong), known, f"known keys are {', '.join(known)}")
        return f"unknown key {where!r}; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        last = first["loc"][-1]
        if isinstance(last, int):
            return f"{where.rpartition('.')[0]}: value number {last + 1} of the list is missing"
        return f"the key {where!r} is missing"
    message = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    return f"{where}{value}: {message}"


def _fields(path: list[Any]) -> list[str]:
    cls: Any = Recipe
    sections = {
        "model": ModelConfig,
        "data": DataConfig,
        "train": TrainConfig,
        "network_deconv": NetworkDeconvConfig,
    }
    for part in path:
        cls = sections.get(part, cls)
    return [field.name for field in dataclasses.fields(cls)]

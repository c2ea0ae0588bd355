"""What a run's layers read and what whitening makes of it: the claims of the paper beside its accuracy.

Network Deconvolution (Ye et al., ICLR 2020, arXiv 1905.11926) says that the features of patches are strongly
correlated and whitening makes their covariance the identity, that the whitening filters of photographs have
the centre-surround shape of the retina's cells, and that whitened activations are sparser than batch norm's.
`inspect_run` measures all three on pictures of the run's own validation split.

Three views of what a layer reads: raw; every feature standardised, the most that batch norm could make of it;
and whitened by the running values, as the layer works in evaluation. Plain layers have the first two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

from segdeconv.checkpoint import load_checkpoint
from segdeconv.config import DataConfig, NetworkDeconvConfig
from segdeconv.data import EvalSet, evenly_spread, open_samples
from segdeconv.figures import new_figure, save_figure
from segdeconv.files import make_folder, to_json, write_text
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.models import size_multiple
from segdeconv.structure import is_plain_layer
from segdeconv.whitening import sample_patches

_PIXELS = 16 * 180 * 240  # in the batch that is looked at
_PATCHES = 4096  # a layer, or up to twice as many
_KAPPA_MAX = 1e6  # condition numbers beyond are float32's noise, and constant features
_WINDOW = 11  # pixels; wide enough to see a surround
_RIDGE = 1e-3  # of the mean variance, for the whitening of photographs: else it is their noise that is seen
_NEAR = 0.1  # standard deviations that count as nearly zero
VIEWS = ("raw", "standardised", "whitened")
SPARSITY = ("near_zero", "kurtosis", "hoyer")
TITLES = {
    "condition": "condition number",
    "correlation": "mean absolute correlation",
    "near_zero": f"share within {_NEAR} standard deviations",
    "kurtosis": "excess kurtosis",
    "hoyer": "Hoyer's sparsity",
}


_FOR_PICTURES = ("eigenvalues", "correlations", "values")  # of a `LayerView`; arrays, not for inspect.json


@dataclass
class LayerView:
    """One layer. Dictionaries have one value per view, the mean over the layer's groups and blocks (the
    geometric mean for condition numbers).

    Attributes:
        features: of one block, channels x taps.
        blocks: how many there are, in all groups.
        whitens: whether correlation is whitened; fast mode standardises depthwise layers and no more.
        samples: patches that were looked at.
        condition: largest over smallest eigenvalue of the patches' covariance, at most 1e6. The fewer
            samples, the larger it is, in all views.
        correlation: mean absolute correlation of two features.
        near_zero, kurtosis, hoyer: sparsity; see `sparsity`.
        eigenvalues, correlations, values: of the first block of the first group, for the pictures.
    """

    name: str
    kind: str
    features: int
    blocks: int
    whitens: bool
    samples: int
    condition: dict[str, float]
    correlation: dict[str, float]
    near_zero: dict[str, float]
    kurtosis: dict[str, float]
    hoyer: dict[str, float]
    eigenvalues: dict[str, np.ndarray] = dataclasses.field(repr=False)
    correlations: dict[str, np.ndarray] = dataclasses.field(repr=False)
    values: dict[str, np.ndarray] = dataclasses.field(repr=False)


@dataclass
class Fit:
    """A filter (k, k) and the difference of two Gaussians about its middle tap that is nearest to it.

    Attributes:
        r2: the share of the filter's variance that the fit explains; the middle tap has most of it.
        surround_r2: the same of the other taps alone. Of 3x3 taps it says no more than that they are round.
        centre_surround: whether the middle tap is positive, and the mean of the taps at some distance from it
            less than -1% of it.
    """

    taps: np.ndarray
    fitted: np.ndarray
    r2: float
    surround_r2: float
    centre_surround: bool

    def scores(self) -> dict[str, Any]:
        return {"r2": self.r2, "surround_r2": self.surround_r2, "centre_surround": self.centre_surround}


def inspect_run(
    run: str | Path,
    out: str | Path,
    filters: bool = True,
    sparsity: bool = True,
    spectrum: bool = True,
    root: str | None = None,
) -> dict[str, Any]:
    """Measure a run; writes ``inspect.json`` and a picture for each of the three parts into ``out``.

    Args:
        root: where the data lies, if not where the recipe says.

    Returns:
        What ``inspect.json`` holds.

    Raises:
        UserError: no such run, its data is not there, or ``out`` cannot be written.
    """
    model, info = load_checkpoint(run)
    data = info.recipe.data.at(root)
    images = _some_pictures(model, data)
    out = make_folder(Path(out))
    if (out / "inspect.json").exists():  # or pictures of an earlier call would stay
        for name in ("spectrum", "sparsity", "filters"):
            (out / f"{name}.png").unlink(missing_ok=True)
    report: dict[str, Any] = {
        "recipe": info.recipe.name,
        "norm": info.recipe.model.norm,
        "epoch": info.epoch,
        "pictures": len(images),
    }
    if sparsity or spectrum:
        layers = layer_views(model, images, info.recipe.model.network_deconv)
        report["layers"] = [
            {key: value for key, value in vars(layer).items() if key not in _FOR_PICTURES} for layer in layers
        ]
        if spectrum:
            _draw_spectrum(layers, out / "spectrum.png")
        if sparsity:
            _draw_sparsity(layers, out / "sparsity.png")
    if filters:
        sets = _filter_sets(model, images)
        fits = {title: [fit_dog(row[c]) for c, row in enumerate(rows)] for title, rows in sets.items()}
        report["filters"] = {title: [fit.scores() for fit in of_set] for title, of_set in fits.items()}
        _draw_filters(images[0], sets, fits, data.mean, data.std, out / "filters.png")
    write_text(out / "inspect.json", to_json(report, indent=1))
    return report


def _some_pictures(model: nn.Module, data: DataConfig) -> Tensor:
    """Validation pictures of one size, evenly spread over the split, normalised: (n, 3, H, W)."""
    samples, multiple = open_samples(data, "val"), size_multiple(model)
    dataset = EvalSet(samples, data, 1)
    first = dataset[0][0]
    count = max(_PIXELS // first[0].numel(), 2)
    chosen = [dataset[index][0] for index in evenly_spread(count, len(dataset))]
    # Cut to what the network takes, for padding would count as picture; only what is too small is padded.
    missing = [max(side // multiple, 1) * multiple - side for side in first.shape[1:]]
    return F.pad(
        torch.stack([image for image in chosen if image.shape == first.shape]),
        (0, missing[1], 0, missing[0]),
    )


@torch.no_grad()
def layer_views(model: nn.Module, images: Tensor, config: NetworkDeconvConfig) -> list[LayerView]:
    """Every convolution and linear layer in the order of its first call; ``images`` are (n, 3, H, W).

    Plain layers are cut into the blocks that ``config`` would give them.
    """
    views: dict[str, LayerView] = {}

    def look(name: str, layer: Whitened, deconvolved: bool) -> Any:
        whitens = deconvolved and layer.decorrelates

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name not in views and inputs[0].shape[-2:] != (1, 1):
                patches = layer.patches(inputs[0], _PATCHES)
                if len(patches) > 1:
                    whitened = layer.whitened(patches) if deconvolved else None
                    views[name] = _view(name, patches, whitened, whitens)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            layer = _as_whitened(module, config)
            if layer is not None:
                look_at = look(name, layer, deconvolved=layer is module)
                hooks.enter_context(module.register_forward_pre_hook(look_at))
        model.eval()(images)
    return list(views.values())


def _as_whitened(module: Any, config: NetworkDeconvConfig) -> Whitened | None:
    """A whitened layer itself; a plain one as a whitened one of the same weights; None for other modules."""
    if isinstance(module, Whitened):
        return module
    if not is_plain_layer(module):
        return None
    make = WhitenedLinear.from_linear if isinstance(module, nn.Linear) else WhitenedConv2d.from_conv
    return make(module, config)


def _view(name: str, patches_NGKF: Tensor, whitened_NGKF: Tensor | None, whitens: bool) -> LayerView:
    samples, groups, blocks, features = patches_NGKF.shape
    views = {"raw": patches_NGKF, "standardised": _standardised(patches_NGKF), "whitened": whitened_NGKF}
    present = {view: values for view, values in views.items() if values is not None}
    measured: dict[str, dict[str, float]] = {key: {} for key in ("condition", "correlation", *SPARSITY)}
    eigenvalues, correlations, shown = {}, {}, {}
    for view, values in present.items():
        wide = values.flatten(1, 2).transpose(0, 1).double()  # (B, N, F)
        cov = _covariance(wide)
        spectrum = torch.linalg.eigvalsh(cov)
        live = spectrum[:, -1] > 0
        kappa = spectrum[live, -1] / torch.maximum(spectrum[live, 0], spectrum[live, -1] / _KAPPA_MAX)
        root = cov.diagonal(dim1=1, dim2=2).clamp(min=1e-12).sqrt()
        corr = cov / (root[:, :, None] * root[:, None])
        off = ~torch.eye(features, dtype=torch.bool)
        measured["condition"][view] = kappa.log().mean().exp().item() if len(kappa) else math.nan
        measured["correlation"][view] = corr[:, off].abs().mean().item() if features > 1 else 0.0
        for key, value in zip(SPARSITY, sparsity(wide), strict=True):
            measured[key][view] = value
        eigenvalues[view] = spectrum[0].flip(0).clamp(min=0).numpy()
        correlations[view] = corr[0].numpy()
        shown[view] = _unit(wide[:1]).flatten().numpy()
    shape = f"{groups} groups" if groups > 1 else f"{blocks} blocks"
    return LayerView(
        name, f"{features} features, {shape}", features, groups * blocks, whitens, samples, **measured,
        eigenvalues=eigenvalues, correlations=correlations, values=shown,
    )  # fmt: skip


def _covariance(rows_BNF: Tensor) -> Tensor:
    centred = rows_BNF - rows_BNF.mean(1, keepdim=True)
    return centred.mT @ centred / rows_BNF.shape[1]


def _standardised(patches_NGKF: Tensor) -> Tensor:
    """Every feature with mean zero and variance one; constant ones stay zero."""
    centred = patches_NGKF - patches_NGKF.mean(0)
    return centred / centred.square().mean(0).clamp(min=1e-12).sqrt()


def _unit(rows_BNF: Tensor) -> Tensor:
    """Values about their mean and in units of their standard deviation, feature by feature: a mixture of wide
    and narrow features would look sparse. (features, N), without those that do not vary.
    """
    rows = rows_BNF.transpose(1, 2).flatten(0, 1)
    centred = rows - rows.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    varies = deviation[:, 0] > 1e-6 * rows.abs().amax(1)
    return centred[varies] / deviation[varies]


def sparsity(rows_BNF: Tensor) -> tuple[float, float, float]:
    """Three measures of values (B, N, F) about their mean, averaged over the features that vary: the share
    within 0.1 standard deviations of it, the excess kurtosis (0 for a Gaussian), Hoyer's 1 - mean|x| / rms
    (0.20 for a Gaussian, near 1 where few values hold all; arXiv 0811.4706 for samples without end).
    """
    x = _unit(rows_BNF)
    near = (x.abs() < _NEAR).double().mean()
    return near.item(), (x**4).mean().item() - 3, 1 - x.abs().mean().item()


# The whitening filters.


def _filter_sets(model: nn.Module, images: Tensor) -> dict[str, list[np.ndarray]]:
    """Filters by title: those of a first layer that whitens all of its RGB patches together, if it does, and
    those of the pictures.
    """
    sets = {}
    first = next((m for m in model.modules() if isinstance(m, WhitenedConv2d)), None)
    if first is not None and first.in_channels == 3 and first.groups == first.num_blocks == 1:
        square = first.kernel_size[0] == first.kernel_size[1] > 1
        sets = {"the first layer": layer_filters(first)} if square else {}
    return sets | {f"the pictures, {_WINDOW}x{_WINDOW}": picture_filters(images)}


def layer_filters(layer: WhitenedConv2d) -> list[np.ndarray]:
    """The rows of a first layer's whitening for the middle tap of every channel: C arrays (C, k, k)."""
    kh, kw = layer.kernel_size
    _, scale = layer.running_mean_and_scale()
    rows = layer.running_whitening[0] if scale is None else scale.view(-1, 1) * layer.running_whitening[0]
    # Feature i of the whitened patch is the sum of s_j D_ji over the features j of the patch.
    matrix = rows.T.double().numpy()
    middle = (kh // 2) * kw + kw // 2
    channels = layer.in_channels
    return [matrix[c * kh * kw + middle].reshape(channels, kh, kw) for c in range(channels)]


def picture_filters(images: Tensor) -> list[np.ndarray]:
    """The same for wider patches of the pictures (n, 3, H, W) themselves: 3 arrays (3, k, k)."""
    k = min(_WINDOW, *images.shape[-2:])
    rows = sample_patches(images, (k, k), (1, 1), (0, 0, 0, 0), "zeros", (3, 3)).double()
    cov = _covariance(rows[None])[0]
    values, vectors = torch.linalg.eigh(cov)
    ridge = _RIDGE * values.mean()
    matrix = (vectors * (values.clamp(min=0) + ridge).rsqrt() @ vectors.T).numpy()
    middle = (k // 2) * k + k // 2
    return [matrix[c * k * k + middle].reshape(3, k, k) for c in range(3)]


def fit_dog(taps_KK: np.ndarray) -> Fit:
    """The nearest a·exp(-r²/2s²) - b·exp(-r²/2t²) about the middle tap, s < t, by search over s and t."""
    k = len(taps_KK)
    y, x = np.mgrid[:k, :k] - k // 2
    r2 = (x**2 + y**2).ravel()
    wanted = taps_KK.ravel()
    widths = np.geomspace(0.25, k, 200)
    gaussians = np.exp(-r2 / (2 * widths[:, None] ** 2))
    # Least squares of every pair in closed form: the normal equations are 2x2.
    gram, along = gaussians @ gaussians.T, gaussians @ wanted
    square = gram.diagonal()
    det = np.outer(square, square) - gram**2
    narrow = np.outer(along, square) - along * gram
    with np.errstate(divide="ignore", invalid="ignore"):
        explained = (narrow * along[:, None] + narrow.T * along) / det
    usable = np.triu(det > 1e-9 * np.outer(square, square), 1)
    s, t = np.unravel_index(np.where(usable, explained, -np.inf).argmax(), det.shape)
    fitted = (narrow[s, t] * gaussians[s] + narrow[t, s] * gaussians[t]) / det[s, t]
    rings = [float(wanted[r2 == distance].mean()) for distance in np.unique(r2)]
    beside = r2 > 0
    return Fit(
        taps_KK,
        fitted.reshape(k, k),
        _explained(wanted, fitted),
        _explained(wanted[beside], fitted[beside]),
        rings[0] > 0 and min(rings) < -0.01 * rings[0],
    )


def _explained(wanted: np.ndarray, fitted: np.ndarray) -> float:
    return 1 - float(((fitted - wanted) ** 2).sum() / max(((wanted - wanted.mean()) ** 2).sum(), 1e-30))


# Pictures and the table.


def _draw_filters(
    image: Tensor, sets: dict[str, list[np.ndarray]], fits: dict[str, list[Fit]],
    mean: Sequence[float], std: Sequence[float], path: Path,
) -> None:  # fmt: skip
    figure = new_figure(figsize=(13, 3.2 + 5.2 * len(sets)), layout="constrained")
    top, *below = figure.subfigures(1 + len(sets), 1, height_ratios=[3.2] + [5.2] * len(sets))
    picture = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    axes = top.subplots(1, 1 + len(sets))
    axes[0].imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
    axes[0].set_title("a picture of the validation split")
    for axis, (title, rows) in zip(axes[1:], sets.items(), strict=True):
        kernel = torch.tensor(np.stack(rows), dtype=torch.float32)
        white = F.conv2d(image[None], kernel)[0]
        centred = white - white.mean((1, 2), keepdim=True)
        axis.imshow((0.5 + centred / (6 * centred.std())).permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set_title(f"whitened by {title}")
    for axis in axes:
        axis.axis("off")
    for part, (title, rows) in zip(below, sets.items(), strict=True):
        part.suptitle(f"Rows of the whitening matrix: {title} (red positive, blue negative)", fontsize=13)
        grid = part.subplots(3, 6, width_ratios=[1, 1, 1, 1, 1, 1.6])
        for c, (line, row, fit) in enumerate(zip(grid, rows, fits[title], strict=True)):
            beside = np.partition(np.abs(row), -2, axis=None)[-2]  # else only the middle tap would show
            largest = 1.2 * beside or 1.0
            line[0].imshow((0.5 + row.transpose(1, 2, 0) / (2 * largest)).clip(0, 1))
            line[0].set_ylabel(f"middle tap, {('red', 'green', 'blue')[c]}")
            for source in range(3):
                line[1 + source].imshow(row[source], cmap="RdBu_r", vmin=-largest, vmax=largest)
            line[4].imshow(fit.fitted, cmap="RdBu_r", vmin=-largest, vmax=largest)
            if c == 0:
                titles = ("in colours", "reads red", "reads green", "reads blue", "difference of\nGaussians")
                for axis, text in zip(line, titles, strict=False):
                    axis.set_title(text, fontsize=10)
            for axis in line[:5]:
                axis.set_xticks([])
                axis.set_yticks([])
            k = len(fit.taps)
            at = np.arange(k) - k // 2
            line[5].axhline(0, color="0.7", lw=0.8)
            line[5].plot(at, fit.taps[k // 2], "o", ms=4)
            line[5].plot(at, fit.fitted[k // 2], "-")
            line[5].set_title(f"fit: R² {fit.r2:.4f}, beside the middle {fit.surround_r2:.2f}", fontsize=9)
    save_figure(figure, path)


def _draw_spectrum(layers: list[LayerView], path: Path) -> None:
    first = layers[0]
    figure = new_figure(figsize=(15, 8.5), layout="constrained")
    above, below = figure.subfigures(2, 1)
    above.suptitle(f"Patches that the first layer reads ({first.name})", fontsize=13)
    spectrum, *matrices = above.subplots(1, 3)
    for view, values in first.eigenvalues.items():
        spectrum.semilogy(np.maximum(values / values[0], 1 / _KAPPA_MAX), ".-", label=view, **_style(view))
    spectrum.set(title="eigenvalues of the covariance, over the largest", xlabel="number")
    spectrum.legend()
    for axis, view in zip(matrices, ("raw", "whitened"), strict=True):
        if view in first.correlations:
            shown = axis.imshow(first.correlations[view], cmap="RdBu_r", vmin=-1, vmax=1)
            axis.set_title(f"correlation of features, {view}")
            above.colorbar(shown, ax=axis, shrink=0.8)
        else:
            axis.axis("off")
            axis.text(0.5, 0.5, "this layer is not whitened", ha="center", va="center")
    left, right = below.subplots(1, 2)
    _by_layer(left, layers, "condition", "log")
    _by_layer(right, layers, "correlation")
    save_figure(figure, path)


def _draw_sparsity(layers: list[LayerView], path: Path) -> None:
    figure = new_figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    edges = np.linspace(-8, 8, 129)
    middle = (edges[1:] + edges[:-1]) / 2
    for axis, layer in zip(axes[0], (layers[0], layers[len(layers) // 2], layers[-1]), strict=True):
        for view in layer.values:
            if view != "raw" and len(layer.values[view]):
                density = np.histogram(layer.values[view], edges, density=True)[0]
                axis.semilogy(middle, np.where(density > 0, density, np.nan), label=view, **_style(view))
        axis.semilogy(middle, np.exp(-(middle**2) / 2) / math.sqrt(2 * math.pi), "k:", lw=1, label="Gaussian")
        axis.set(title=layer.name, xlabel="standard deviations", ylim=(1e-5, 10))
    axes[0, 0].set_ylabel("density")
    of_a_gaussian = math.erf(_NEAR / math.sqrt(2)), 0, 1 - math.sqrt(2 / math.pi)
    for axis, value in zip(axes[1], of_a_gaussian, strict=True):
        axis.axhline(value, color="k", ls=":", lw=1, label="Gaussian")
    _by_layer(axes[1, 0], layers, "near_zero")
    _by_layer(axes[1, 1], layers, "kurtosis", "symlog")
    _by_layer(axes[1, 2], layers, "hoyer")
    for axis in axes[0]:
        axis.legend(fontsize=8)
    save_figure(figure, path)


def _by_layer(axis: Any, layers: list[LayerView], key: str, scale: str = "linear") -> None:
    for view in VIEWS:
        values = [getattr(layer, key).get(view, math.nan) for layer in layers]
        if not all(map(math.isnan, values)) and not (key in SPARSITY and view == "raw"):
            axis.plot(values, ".-", label=view, **_style(view))
    axis.set_yscale(scale)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(title=f"{TITLES[key]}, by layer", xlabel="layer, in order of the forward pass")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _style(view: str) -> dict[str, Any]:
    """Raw under standardised, which are often the same."""
    color = {"raw": "tab:grey", "standardised": "tab:orange", "whitened": "tab:blue"}[view]
    return {"color": color, "lw": 4, "ms": 9, "alpha": 0.5} if view == "raw" else {"color": color}


def summary(report: dict[str, Any]) -> list[Table | str]:
    """What a terminal shows of `inspect_run`'s report: a table, and sentences."""
    parts: list[Table | str] = []
    if "layers" in report:
        parts.append(_table(report))
    if report["norm"] == "bn":
        parts.append("batch norm whitens nothing, so there is nothing to see of whitening in this run")
    for title, fits in report.get("filters", {}).items():
        parts.append(
            f"whitening filters of {title}: {sum(fit['centre_surround'] for fit in fits)} of {len(fits)} are "
            f"centre-surround; a difference of Gaussians explains at least {min(f['r2'] for f in fits):.2%} "
            f"of each, and {min(f['surround_r2'] for f in fits):.0%} of the taps beside the middle"
        )
    return parts


def median_of(layers: list[dict[str, Any]], key: str, view: str) -> float:
    """The median over the layers of ``inspect.json`` that have this view."""
    return float(np.nanmedian(np.array([layer[key].get(view) for layer in layers], float)))  # null is NaN


def _table(report: dict[str, Any]) -> Table:
    """One column per view; one line per measure of the first layer, then for its median over layers."""
    layers = report["layers"]
    views = [view for view in VIEWS if any(view in layer["condition"] for layer in layers)]
    shown = Table(title=f"{report['recipe']}.{report['norm']}: what {len(layers)} layers read")
    shown.add_column("")
    for view in views:
        shown.add_column(view, justify="right")
    for part in ("the first", "the median"):
        shown.add_section()
        shown.add_row(part, style="bold")
        for key, title in TITLES.items():
            if part == "the first":
                values = [layers[0][key].get(view, math.nan) for view in views]
            else:
                values = [median_of(layers, key, view) for view in views]
            cells = ("" if v != v else f"{v:.0f}" if abs(v) >= 100 else f"{v:.3g}" for v in values)
            shown.add_row(f"  {title}", *cells)
    return shown

"""The entries of the zoo: which there are, what they say about themselves, where their weights lie.

An entry is a folder ``zoo/ARCH_ENCODER.nd_DATASET``, its batch-norm twin ``.bn_DATASET``; an encoder of its
own width says so, as ``resnet18w32`` does with 32 channels in the first stage. The folder holds
``recipe.yaml``, ``metrics.json`` (as ``segdeconv eval`` writes it), ``card.md``, a picture, ``entry.json``
and, where they are small, ``model.safetensors``. Larger weights are at the urls that ``entry.json`` lists.
The folder zoo/ becomes segdeconv/zoo_entries in a wheel. Entries are made, checked and published in zoo.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from rich.table import Table

from segdeconv.download import fetch
from segdeconv.errors import UserError, did_you_mean
from segdeconv.files import cache_folder, sha256_of, with_home
from segdeconv.markdown import markdown_table
from segdeconv.progress import notes

WEIGHTS = "model.safetensors"
NAME = r"[A-Za-z0-9_-]+\.(nd|bn)_[A-Za-z0-9_-]+"

# What the data is and under which terms it may be used, by the DATASET of an entry's name.
DATA = {
    "toy": "Street scenes drawn by this package (segdeconv/data/toy.py). Licence: MIT, as the package.",
    "camvid": "CamVid (Brostow, Fauqueur, Cipolla, 2009), 11 classes and split of the SegNet tutorial. "
    "Licence: the files come without one; they were published for research, so take the weights as for "
    "research too.",
    "cityscapes": "Cityscapes (Cordts et al., 2016). Licence: its own, for non-commercial use only.",
    "cifar10": "CIFAR-10 (Krizhevsky, 2009). Licence: the files come without one; the author asks to be "
    "cited.",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009). Licence: the files come without one; the author asks to be "
    "cited.",
    "mnist": "MNIST (LeCun, Cortes, Burges). Licence: CC BY-SA 3.0.",
    "fashion_mnist": "Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017). Licence: MIT.",
    "imagenet": "ImageNet, ILSVRC 2012. Licence: its own, for non-commercial research and education only.",
}

_HEADER = ("entry", "metric", "parameters", "GFLOP", "at", "MB")
METRICS = {"miou": "mIoU", "top1": "top-1"}  # the main metric of either task, as `segdeconv eval` calls it

Sort = Literal["name", "miou", "top1", "parameters", "gflops"]
_Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Entry:
    """``entry.json``.

    Attributes:
        name: ``ARCH_ENCODER.nd_DATASET`` or ``.bn_DATASET``, as the folder is called.
        parameters: of the network as it was trained, with its auxiliary heads.
        gflops: of one forward pass of the folded network on a picture of ``input``; a multiplication and an
            addition are two operations.
        input: height and width.
        storage: the type that large weights are stored in; the metrics were measured on what is stored.
        bytes, sha256: of the weights.
        urls: where the weights are, unless they lie beside this file: https, file or hf://ORG/REPO/PATH.
    """

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    task: Literal["segmentation", "classification"]
    dataset: str
    architecture: str
    encoder: str | None
    norm: Literal["nd", "bn"]
    parameters: _Positive
    gflops: Annotated[float, Field(gt=0)]
    input: tuple[_Positive, _Positive]
    storage: Literal["float16", "float32"]
    bytes: _Positive
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    urls: tuple[str, ...] = ()


_ENTRY = TypeAdapter(Entry)


def zoo_folder() -> Path:
    """Where the entries lie: in the installed package, or beside it in a clone."""
    installed = Path(__file__).parent / "zoo_entries"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "zoo"


def entry_names() -> list[str]:
    """All entries, by name."""
    return sorted(path.parent.name for path in zoo_folder().glob("*/entry.json"))


def is_entry(name: str | Path) -> bool:
    return str(name) in entry_names()


def entry_folder(name: str) -> Path:
    """The folder of an entry.

    Raises:
        UserError: no entry is called so; the message names what is near.
    """
    if not is_entry(name):
        raise UserError(f"no entry of the zoo is called {name!r}; {near(name)}")
    return zoo_folder() / name


def near(name: str) -> str:
    """A hint for one who mistook the name of an entry."""
    return did_you_mean(name, entry_names(), "segdeconv zoo list shows what there is")


def read_entry(name: str) -> Entry:
    """What ``entry.json`` says.

    Raises:
        UserError: no entry is called so, or its file is damaged.
    """
    path = entry_folder(name) / "entry.json"
    try:
        return _ENTRY.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
        raise UserError(f"{path}: not an entry of the zoo ({what})") from None


def entry_json(entry: Entry) -> str:
    """The text of ``entry.json``."""
    return _ENTRY.dump_json(entry, indent=1).decode() + "\n"


def measured(name: str) -> dict[str, Any]:
    """The metrics of an entry, as `segdeconv eval` wrote them.

    Raises:
        UserError: no entry is called so, or its file is damaged.
    """
    return read_scores(entry_folder(name) / "metrics.json")


def read_scores(path: Path) -> dict[str, Any]:
    """What `segdeconv eval` wrote, with a metric in it.

    Raises:
        UserError: the file is not there, or damaged.
    """
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    try:
        if not any(isinstance(scores.get(metric), float) for metric in METRICS):
            raise KeyError(" or ".join(METRICS))
        if not isinstance(scores["split"], str):
            raise TypeError("split")
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged_scores(path, error) from None
    return scores


def damaged_scores(path: Path, error: Exception) -> UserError:
    """What to tell of a file that lacks what `segdeconv eval` writes."""
    return UserError(f"{path}: not as segdeconv eval writes it ({error}); evaluate anew")


def listed(task: str | None = None, dataset: str | None = None, sort: Sort = "name") -> list[Entry]:
    """Entries of a task and a data set; a metric sorts from high to low, entries without it last, all else
    from low to high.

    Raises:
        UserError: there is none, or an entry's files are damaged.
    """
    known = [read_entry(name) for name in entry_names()]
    entries = [e for e in known if task in (None, e.task) and dataset in (None, e.dataset)]
    if known and not entries:
        asked = " and ".join(repr(what) for what in (task, dataset) if what)
        data_sets = ", ".join(sorted({entry.dataset for entry in known}))
        raise UserError(f"the zoo has no entry of {asked}; its data sets are {data_sets}")
    if sort in ("miou", "top1"):
        return sorted(entries, key=lambda entry: -measured(entry.name).get(sort, -1))
    return sorted(entries, key=lambda entry: getattr(entry, sort))


def table(entries: Sequence[Entry]) -> Table:
    """Entries as a table for the terminal."""
    out = Table(*_HEADER)
    out.columns[0].min_width = max((len(entry.name) for entry in entries), default=0)  # to be copied whole
    for entry in entries:
        out.add_row(entry.name, *_cells(entry))
    return out


def markdown(entries: Sequence[Entry]) -> str:
    """Entries as a table for the README, with links to their cards."""
    rows = [(f"[{entry.name}](zoo/{entry.name}/card.md)", *_cells(entry)) for entry in entries]
    return markdown_table(_HEADER, rows)


def _cells(entry: Entry) -> tuple[str, ...]:
    scores = measured(entry.name)
    metric = next(metric for metric in METRICS if metric in scores)
    return (
        f"{METRICS[metric]} {scores[metric]:.4f}",
        f"{entry.parameters / 1e6:.2f} M",
        f"{entry.gflops:.2f}",
        f"{entry.input[1]}x{entry.input[0]}",
        f"{entry.bytes / 1e6:.1f}",
    )


def card(name: str) -> str:
    """The model card of an entry, Markdown.

    Raises:
        UserError: no entry is called so, or it has no card.
    """
    path = entry_folder(name) / "card.md"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def find_weights(name: str) -> Path:
    """The weights of an entry, downloaded where they are neither in its folder nor in the cache.

    Sources are the entry's folder, the mirror that SEGDECONV_ZOO_URL names (a folder, or an address that
    starts with https, file or hf; laid out by ``segdeconv zoo publish``), then the entry's urls.

    Raises:
        UserError: no entry is called so, or no source has the file its SHA-256 names.
    """
    entry = read_entry(name)
    own = zoo_folder() / name / WEIGHTS
    sources = [*_mirror(name), *entry.urls]
    if own.is_file():
        if own.stat().st_size == entry.bytes and sha256_of(own) == entry.sha256:
            return own
        problem = f"{own}: is not the file that entry.json names (its SHA-256 differs)"
        if not sources:
            raise UserError(f"{problem}; restore it, or name a mirror in SEGDECONV_ZOO_URL")
        notes.print(f"{problem}; trying elsewhere")
    if not sources:
        raise UserError(f"{own}: is missing and its entry has no urls; name a mirror in SEGDECONV_ZOO_URL")
    # A new version of an entry is another file in the cache.
    target = cache_folder() / "zoo" / f"{name}-{entry.sha256[:12]}.safetensors"
    return fetch(target, sources, entry.bytes, entry.sha256)


def _mirror(name: str) -> list[str]:
    base = os.environ.get("SEGDECONV_ZOO_URL", "").rstrip("/")
    if not base:
        return []
    if "://" not in base:
        base = with_home(base, "SEGDECONV_ZOO_URL").absolute().as_uri()
    return [f"{base}/{name}/{WEIGHTS}"]

"""The ``segdeconv`` command: parse, call one function, print. Heavy modules are imported on use."""

from __future__ import annotations

import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer

from segdeconv import __version__
from segdeconv.errors import UserError

app = typer.Typer(
    help="Segmentation networks with network deconvolution: train, evaluate, export ONNX, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


class Norm(str, Enum):
    nd = "nd"
    bn = "bn"


class Output(str, Enum):
    labels = "labels"
    logits = "logits"


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a recipe's name (see: segdeconv recipes).")],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. train.lr=0.05. Repeatable."),
    ] = None,
    norm: Annotated[
        Optional[Norm],  # noqa: UP045
        typer.Option(
            help="nd for network deconvolution, bn for the batch-norm twin; default as the recipe says."
        ),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="The run's folder; by default runs/NAME.NORM."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a recipe and leave checkpoints, metrics and curves in a run folder."""
    from segdeconv.config import load_recipe
    from segdeconv.progress import console
    from segdeconv.train import pick_device
    from segdeconv.train import train as train_run

    changes = list(overrides or []) + ([f"model.norm={norm.value}"] if norm else [])
    loaded = load_recipe(recipe, changes)
    folder = out or Path("runs") / f"{loaded.name}.{loaded.model.norm}"
    train_run(loaded, folder, pick_device(device))
    console.print(f"wrote {folder}; next: segdeconv eval {folder}")


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder or a checkpoint.")],
    onnx: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Evaluate this exported graph with onnxruntime instead, on the run's data."),
    ] = None,
    root: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where the data lies, if not where the recipe says."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a run on its validation split: per-class IoU, mIoU, pixel accuracy or top-1."""
    from segdeconv.checkpoint import find_checkpoint, read_info
    from segdeconv.evaluate import evaluate_run, table, write_scores
    from segdeconv.progress import console
    from segdeconv.train import pick_device

    scores = evaluate_run(run, pick_device(device), onnx, root)
    console.print(table(scores, read_info(find_checkpoint(run)).task))
    console.print(f"wrote {write_scores(run, scores)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder or a checkpoint.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
    output: Annotated[Output, typer.Option(help="What the graph puts out.")] = Output.labels,
) -> None:
    """Fold a run into plain convolutions and write one ONNX file, checked against PyTorch."""
    from segdeconv.checkpoint import load_checkpoint
    from segdeconv.export import export_onnx
    from segdeconv.progress import console

    model, info = load_checkpoint(run)
    for result in export_onnx(model, info, out, output.value):
        logits = "" if output is Output.labels else f", logits by {result.max_diff:.1e} of the largest"
        console.print(
            f"input {result.shape}: {result.labels_differ:.4%} of labels differ from PyTorch{logits}"
        )
    console.print(f"wrote {out}; next: segdeconv predict {out} IMAGE_OR_FOLDER --out predictions")


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="A file made by segdeconv export.")],
    source: Annotated[Path, typer.Argument(help="A picture or a folder of pictures.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("predictions"),
) -> None:
    """Label pictures with onnxruntime: NAME.png holds class numbers, NAME_overlay.jpg shows them."""
    from segdeconv.progress import Bar, console
    from segdeconv.runtime import Segmenter, find_images, predict_images

    segmenter = Segmenter(model)
    images = find_images(source)
    for _ in Bar(predict_images(segmenter, images, out), len(images), "predicting"):
        pass
    console.print(f"wrote {len(images)} label maps and overlays to {out}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("runs/demo"),
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the demo's recipe."),
    ] = None,
) -> None:
    """See the whole road in a few minutes, on drawn street scenes that need no download."""
    from segdeconv.demo import run_demo

    run_demo(out, overrides)


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from segdeconv.config import load_recipe, own_recipes

    for name, path in own_recipes().items():
        recipe = load_recipe(name)
        network = "_".join(filter(None, (recipe.model.architecture, recipe.model.encoder)))
        print(f"{name:28} {network} on {recipe.data.dataset}, {recipe.train.epochs} epochs  ({path})")


def main() -> None:
    """Run the command; bad input is one sentence on standard error and exit code 2."""
    try:
        app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os._exit(141)  # Python would complain once more when it flushes standard output
    except OSError as error:
        _fail(f"{error.filename or 'writing'}: {error.strerror or error}")
    except Exception as error:
        if not hasattr(error, "format_message"):  # the usage errors of the click that typer carries
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "segdeconv"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _fail(f"{message}; see {command} --help")


def _fail(message: str) -> None:
    # An error in a loader process arrives as a whole traceback, its own sentence last.
    sentence = message.strip().splitlines()[-1].removeprefix("segdeconv.errors.UserError: ")
    print(f"segdeconv: error: {sentence}", file=sys.stderr)
    sys.exit(2)

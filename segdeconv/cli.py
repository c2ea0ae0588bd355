"""The ``segdeconv`` command: parse, call one function, print. Heavy modules are imported on use."""

from __future__ import annotations

import io
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from segdeconv import __version__
from segdeconv.errors import Refused, UserError, printable, sentence_of, shortage

if TYPE_CHECKING:
    from segdeconv.config import Recipe

app = typer.Typer(
    help="Segmentation networks with network deconvolution: train, evaluate, export ONNX, predict.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

data_app = typer.Typer(
    help="Look at data before training.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

zoo_app = typer.Typer(
    help="Trained networks: list, fetch, check, add and publish them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(zoo_app, name="zoo")

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
GraphOrRun = Annotated[
    Path,
    typer.Argument(
        help="A file made by segdeconv export; or a run folder, checkpoint or entry of the zoo, which is "
        "exported first."
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a recipe (segdeconv recipes) or a zoo entry (segdeconv zoo list)."
    ),
]
EntryName = Annotated[str, typer.Argument(help="An entry of the zoo (see: segdeconv zoo list).")]
Run = Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or an entry of the zoo.")]
Root = Annotated[str | None, typer.Option(help="Where the data lies, if not where the recipe says.")]
Window = Annotated[
    str | None,
    typer.Option(metavar="H,W", help="Sliding windows of this size, instead of whole pictures."),
]
Overlap = Annotated[float, typer.Option(help="Least share that a window has in common with the next.")]
AllowCpu = Annotated[
    bool, typer.Option("--allow-cpu", help="Let --device cuda take the CPU where CUDA cannot be had.")
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of one run; by default onnxruntime takes all cores."),
]

Norm = Literal["nd", "bn"]
Split = Literal["train", "val", "test"]
Amp = Literal["recipe", "off", "bf16", "fp16"]
Task = Literal["segmentation", "classification"]
Sort = Literal["name", "miou", "top1", "parameters", "gflops"]
Preprocess = Literal["none", "graph"]
Number = TypeVar("Number", int, float)


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


@app.command(short_help="Train a recipe, or go on with a run.")
def train(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. train.lr=0.05. Repeatable."),
    ] = None,
    norm: Annotated[
        Norm | None,
        typer.Option(
            help="nd for network deconvolution, bn for the batch-norm twin; default as the recipe says."
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|ENTRY", help="Take the network of a run or zoo entry, and begin with its weights."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; by default runs/NAME.NORM, or runs/ENTRY of a zoo entry."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out; begin it where there is none.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Describe the run and train two steps; write nothing.")
    ] = False,
    device: Device = "auto",
) -> None:
    """Train a recipe and leave checkpoints, metrics and curves in a run folder.

    Several processes: torchrun --nproc-per-node=N -m segdeconv train RECIPE
    """
    from segdeconv.config import load_recipe, recipe_to_yaml
    from segdeconv.progress import console
    from segdeconv.train import dry_run as describe_run
    from segdeconv.train import pick_device
    from segdeconv.train import train as train_run

    file = _recipe_file(recipe)
    changes = [*(overrides or []), *([f"model.norm={norm}"] if norm else [])]

    def folder_of(loaded: Recipe) -> Path:
        return out or Path("runs") / _run_name(recipe, loaded)

    def begun() -> Path:
        return folder_of(load_recipe(file, changes))  # the folder does not depend on the network

    network = _network_of(init, begun if resume else None) if init is not None else []
    loaded = load_recipe(file, [*network, *changes])
    folder = folder_of(loaded)
    if dry_run:
        console.print(recipe_to_yaml(loaded))
        describe_run(loaded, pick_device(device))
        return
    train_run(loaded, folder, pick_device(device), resume)
    console.print(f"wrote {folder}; next: segdeconv eval {folder}")


@app.command("eval", short_help="Score a run on labelled pictures.")
def evaluate(
    run: Run,
    onnx: Annotated[
        Path | None,
        typer.Option(help="Evaluate this exported graph with onnxruntime instead, on the run's data."),
    ] = None,
    root: Root = None,
    split: Annotated[Split, typer.Option(help="Which pictures.")] = "val",
    window: Window = None,
    overlap: Overlap = 0.25,
    flip: Annotated[bool, typer.Option("--flip", help="Average with the mirror image.")] = False,
    scales: Annotated[
        str, typer.Option(metavar="S,...", help="Average over sizes of the picture, such as 0.75,1,1.25.")
    ] = "1",
    original: Annotated[
        bool,
        typer.Option("--original", help="Score at the pictures' own size where the recipe resizes them."),
    ] = False,
    amp: Annotated[
        Amp, typer.Option(help="Autocast: off is float32, as in an exported graph; recipe, as it trains.")
    ] = "recipe",
    out: Annotated[
        Path | None, typer.Option(help="The folder for eval.json and pictures; by default the run's.")
    ] = None,
    save_predictions: Annotated[
        Path | None,
        typer.Option(
            help="A folder for a label PNG of every picture at its own size (implies --original); label ids, "
            "named as the server wants them, for Cityscapes."
        ),
    ] = None,
    submit: Annotated[
        Path | None, typer.Option(help="A zip file of the test split's label PNGs for the Cityscapes server.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Score a run: IoU by class, pixel accuracy, categories and instances of Cityscapes; or top-1 and top-5.

    Without options pictures have the recipe's size and are run whole, as in training's validation.
    """
    from segdeconv.checkpoint import find_checkpoint, read_info
    from segdeconv.evaluate import Inference, evaluate_run, scores_folder, table, write_scores
    from segdeconv.files import make_folder
    from segdeconv.progress import console
    from segdeconv.train import pick_device

    inference = Inference(
        window=_pair("--window", window),
        overlap=overlap,
        flip=flip,
        scales=tuple(_numbers("--scales", scales, float)),
        original=original,
        amp=amp,
    )
    info = read_info(find_checkpoint(run))
    folder = scores_folder(run) if out is None else make_folder(out)

    def tell(scores: dict[str, Any]) -> None:
        if any(map(any, scores["confusion"])):
            shown = f"{scores['samples']} pictures of {split}"
            console.print(f"epoch {info.epoch} of {info.recipe.name}, {shown}")
            console.print(table(scores, info.task))
            beside = "" if onnx else "; drawing pictures beside it"
            console.print(f"wrote {write_scores(folder, scores)}{beside}")
        else:
            console.print("these pictures have no labels, so there is nothing to score")
        for path in filter(None, (save_predictions, submit)):
            console.print(f"wrote {path}")

    evaluate_run(
        run,
        pick_device(device) if onnx is None else device,
        onnx,
        root,
        split,
        inference,
        figures=None if onnx else folder,
        predictions=save_predictions,
        submission=submit,
        tell=tell,
    )


@app.command(short_help="Curves and scores of several runs.")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("runs/compare"),
) -> None:
    """Curves and scores of runs, by step, epoch and time; seeds of one recipe as mean and spread."""
    from segdeconv.compare import compare_runs, legend, table
    from segdeconv.progress import console

    metric, entries = compare_runs(runs, out)
    for line in legend(entries):
        console.print(line)
    console.print(table(metric, entries))
    console.print(f"wrote compare.png, compare.md and compare.json to {out}")


@app.command(short_help="See what layers read, and how white it is.")
def inspect(
    run: Run,
    filters: Annotated[
        bool, typer.Option("--filters", help="Whitening filters beside differences of Gaussians.")
    ] = False,
    sparsity: Annotated[
        bool, typer.Option("--sparsity", help="Sparsity of whitened and of standardised activations.")
    ] = False,
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Condition numbers and correlation of patches, by layer.")
    ] = False,
    root: Root = None,
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("runs/inspect"),
) -> None:
    """Pictures and numbers of what layers read, raw, standardised and whitened; all three without options."""
    from segdeconv.inspection import inspect_run, summary
    from segdeconv.progress import console

    everything = not (filters or sparsity or spectrum)
    report = inspect_run(
        run, out, filters or everything, sparsity or everything, spectrum or everything, root
    )
    for part in summary(report):
        console.print(part)
    console.print(f"wrote inspect.json and its pictures to {out}")


@app.command(short_help="Write a run as one ONNX file.")
def export(
    ctx: typer.Context,
    run: Run,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.onnx"),
    output: Annotated[
        str, typer.Option(metavar="NAME,...", help="Some of labels, logits and probabilities.")
    ] = "labels",
    preprocess: Annotated[
        Preprocess,
        typer.Option(
            help="graph takes RGB (n, H, W, 3) uint8 of any size and resizes or pads and normalises it "
            "itself; none takes normalised (n, 3, H, W)."
        ),
    ] = "none",
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="With --preprocess graph, for other runtimes than onnxruntime: resize by products of "
            "matrices, slower on large pictures.",
        ),
    ] = False,
    static: Annotated[
        str | None, typer.Option(metavar="N,H,W", help="Fix batch, height and width; otherwise any do.")
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.")] = 18,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in float16.")] = False,
    half_io: Annotated[
        bool, typer.Option("--half-io", help="With --fp16: take and give float16 as well.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in int8, calibrated on the recipe's training pictures.")
    ] = False,
    max_drop: Annotated[
        float,
        typer.Option(help="With --fp16 or --int8: the most mIoU or top-1 to lose; else nothing is written."),
    ] = 0.01,
    min_speedup: Annotated[
        float, typer.Option(help="With --fp16 or --int8: how many times as fast it must be at least.")
    ] = 1.0,
    root: Annotated[
        str | None,
        typer.Option(help="With --fp16 or --int8: where the data lies, if not where the recipe says."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="With --fp16 or --int8: where to measure; auto, cpu, cuda or cuda:N.")
    ] = "auto",
) -> None:
    """Fold a run into plain convolutions and write one ONNX file, checked against PyTorch.

    --fp16 and --int8 report accuracy before and after and the speed ratio. Exit code 3: the graph was made,
    measured, and not worth writing.
    """
    from segdeconv.checkpoint import find_checkpoint, load_checkpoint, read_info
    from segdeconv.export import export_onnx
    from segdeconv.interface import Interface
    from segdeconv.progress import console

    interface = Interface(
        outputs=tuple(output.split(",")),  # type: ignore[arg-type]  # Interface checks them
        preprocess=preprocess,
        static=_triple("--static", static),
        opset=opset,
        portable=portable,
    )
    if fp16 and int8:
        raise UserError("--fp16 and --int8: choose one; each is a file of its own")
    if half_io and not fp16:
        raise UserError("--half-io goes with --fp16")
    for name in ("max_drop", "min_speedup", "root", "device"):
        source = ctx.get_parameter_source(name)
        if not (fp16 or int8) and source is not None and source.name != "DEFAULT":
            raise UserError(f"--{name.replace('_', '-')} goes with --fp16 or --int8")
    if fp16 or int8:
        from segdeconv.precision import Gates, export_smaller, summary

        gates = Gates(max_drop, min_speedup)
        made = export_smaller(run, out, "fp16" if fp16 else "int8", interface, gates, half_io, root, device)
        for line in summary(made):
            console.print(line)
    else:
        model, info = load_checkpoint(run)
        for result in export_onnx(model, info, out, interface):
            told = f"{result.labels_differ:.4%} of labels differ from PyTorch"
            if not math.isnan(result.max_diff):
                told += f", scores by {result.max_diff:.1e} of the largest logit"
            console.print(f"input {result.shape}: {told}")
    if read_info(find_checkpoint(run)).task == "segmentation":
        console.print(f"wrote {out}; next: segdeconv predict {out} IMAGE_OR_FOLDER --out predictions")
    else:
        console.print(f"wrote {out}; next: segdeconv eval {run} --onnx {out}")


@app.command(short_help="Label pictures with onnxruntime.")
def predict(
    model: GraphOrRun,
    source: Annotated[Path, typer.Argument(help="A picture or a folder of pictures.")],
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("predictions"),
    window: Window = None,
    overlap: Overlap = 0.25,
    device: Device = "auto",
    allow_cpu: AllowCpu = False,
    threads: Threads = None,
) -> None:
    """Label pictures with onnxruntime: NAME.png holds class numbers, NAME_overlay.jpg shows them."""
    from segdeconv.progress import Bar, console
    from segdeconv.runtime import Segmenter, find_images, predict_images

    with _graph_file(model) as graph:
        segmenter = Segmenter(
            graph,
            device,
            allow_cpu=allow_cpu,
            threads=threads,
            window=_pair("--window", window),
            overlap=overlap,
        )
    images = find_images(source)
    console.print(_where(segmenter.device, segmenter.why_cpu))
    for _ in Bar(predict_images(segmenter, images, out), len(images), "predicting"):
        pass
    numbered = ", ".join(f"{number} {name}" for number, name in enumerate(segmenter.classes))
    console.print(f"classes: {numbered}")
    console.print(f"wrote {len(images)} label maps and overlays to {out}")


@app.command(short_help="Time graphs, in turns.")
def bench(
    models: Annotated[
        list[Path], typer.Argument(help="Files made by segdeconv export; ratios are over the first.")
    ],
    size: Annotated[
        str | None,
        typer.Option(
            metavar="H,W",
            help="Of the pictures, which only graphs that prepare them resize; by default the first "
            "graph's own, its recipe's, or 512,1024.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures per call.")] = 1,
    runs: Annotated[int, typer.Option(help="Measured calls of each graph.")] = 50,
    threads: Threads = None,
    device: Device = "auto",
    allow_cpu: AllowCpu = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file as well.")
    ] = None,
) -> None:
    """Time graphs in turns: p50, p95, p99, images/s, parts of the time, peak memory; a Markdown table."""
    from segdeconv.bench import bench as measure
    from segdeconv.bench import table
    from segdeconv.files import check_place, to_json, write_text

    if json_file is not None:
        check_place(json_file)
    result = measure(models, _pair("--size", size), batch, threads, runs, device, allow_cpu)
    print(table(result), end="", flush=True)  # --json may be the same place
    if json_file is not None:
        write_text(json_file, to_json(result, indent=1) + "\n")


@app.command(short_help="Where each node of a graph runs.")
def placement(
    model: Annotated[Path, typer.Argument(help="An ONNX file.")],
    size: Annotated[
        str | None,
        typer.Option(metavar="H,W", help="Of the picture it is run on; by default the graph's, or 256,256."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 if a node computes off the accelerator.")
    ] = False,
    device: Device = "auto",
    allow_cpu: AllowCpu = False,
) -> None:
    """Say where each node of a graph runs, and which memory copies that takes."""
    from segdeconv.placement import placement as look
    from segdeconv.placement import table

    found = look(model, device, allow_cpu, _pair("--size", size))
    print(table(found), end="")
    if found.why_cpu:
        print(f"no accelerator: {found.why_cpu}")
    if found.off_accelerator:
        names = ", ".join(f"{name} {count}" for name, count in found.off_accelerator.most_common())
        print(f"computing on the CPU: {names}")
        if strict:
            raise typer.Exit(1)


@app.command(short_help="What is wrong with this installation.")
def doctor() -> None:
    """Say what is wrong with this installation, and the command that mends it; exit code 1 if anything is."""
    from segdeconv import doctor

    findings = doctor.examine(doctor.gather())
    for finding in findings:
        print(f"{finding.what}\n    {finding.fix}")
    if findings:
        raise typer.Exit(1)
    print("nothing is wrong")


@app.command(short_help="Answer pictures over HTTP.")
def serve(
    model: GraphOrRun,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of them.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(help="Pictures worked on at a time.")] = 2,
    queue: Annotated[int, typer.Option(help="Requests that may wait; further ones get 503.")] = 16,
    timeout: Annotated[float, typer.Option(help="Seconds to an answer; then 504.")] = 30.0,
    megabytes: Annotated[float, typer.Option(help="Largest body; above it 413.")] = 20.0,
    megapixels: Annotated[
        float | None,
        typer.Option(help="Largest picture; above it 413. By default 25; 4 if pictures run whole."),
    ] = None,
    window: Window = None,
    device: Device = "auto",
    allow_cpu: AllowCpu = False,
    threads: Annotated[
        int | None, typer.Option(help="Threads of one run; by default all cores shared among --workers.")
    ] = None,
) -> None:
    """Answer pictures over HTTP: POST /predict; a page at /; /health and /metrics.

    \b
    curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg -o labels.png http://127.0.0.1:8000/predict
    """
    from segdeconv.runtime import Segmenter, usable_cores
    from segdeconv.serve import Limits
    from segdeconv.serve import serve as serve_model

    limits = Limits(megabytes, megapixels, workers, queue, timeout)
    with _graph_file(model) as graph:
        segmenter = Segmenter(
            graph,
            device,
            allow_cpu=allow_cpu,
            threads=max(1, usable_cores() // workers) if threads is None else threads,
            window=_pair("--window", window),
        )
    print(_where(segmenter.device, segmenter.why_cpu))
    serve_model(segmenter, host, port, limits)


@app.command(short_help="A page that labels in the browser.")
def webdemo(
    model: GraphOrRun,
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("webdemo"),
    ort: Annotated[
        Path | None,
        typer.Option(help="onnxruntime-web as npm packs it, for a machine that reaches no registry."),
    ] = None,
) -> None:
    """Write a static page that labels pictures in the browser; no picture leaves it."""
    from segdeconv.progress import console
    from segdeconv.webdemo import write_webdemo

    with _graph_file(model) as graph:
        write_webdemo(graph, out, ort)
    console.print(f"wrote {out}; next: python -m http.server --bind 127.0.0.1 --directory {out}")


@app.command(short_help="Train, export and run a small network in minutes.")
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the demo's recipe."),
    ] = None,
) -> None:
    """Train, export and run a small network in minutes, on drawn street scenes that need no download."""
    from segdeconv.demo import run_demo

    run_demo(out, overrides)


@data_app.command("check", short_help="Read every file; list what is wrong.")
def data_check(
    recipe: RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a key, e.g. data.root=data/mine. Repeatable."
        ),
    ] = None,
) -> None:
    """Read every picture and mask: list all that is wrong, and what the classes and colours are."""
    from segdeconv.config import load_recipe
    from segdeconv.data.check import as_keys, check, table
    from segdeconv.progress import console

    report = check(load_recipe(_recipe_file(recipe), overrides).data)
    console.print(table(report))
    console.print(as_keys(report))
    for warning in report.warnings:
        console.print(f"warning: {warning}")
    for problem in report.problems:
        console.print(f"wrong: {problem}")
    if report.problems:
        raise UserError(f"{recipe}: {len(report.problems)} things are wrong with the data")
    console.print(
        " and ".join(f"{s.pictures} pictures of {s.name}" for s in report.splits) + ": nothing is wrong"
    )


@app.command(short_help="List recipes, or print one.")
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead, to start one from.")] = None,
) -> None:
    """List the recipes that come with the package, or print one.

    \b
    segdeconv recipes my_images > mine.yaml
    """
    from segdeconv.config import find_recipe, load_recipe, own_recipes

    if name is not None:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")
        return
    for own, path in own_recipes().items():
        recipe = load_recipe(own)
        network = "_".join(filter(None, (recipe.model.architecture, recipe.model.encoder)))
        print(f"{own:30} {network} on {recipe.data.dataset}, {recipe.train.epochs} epochs  ({path})")


@zoo_app.command("list")
def zoo_list(
    task: Annotated[Task | None, typer.Option(help="Only these.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only what was trained on this data set.")] = None,
    sort: Annotated[Sort, typer.Option(help="miou and top1 list the best first.")] = "name",
) -> None:
    """List trained networks with what was measured of them."""
    from segdeconv.entries import listed, table
    from segdeconv.progress import console

    console.print(table(listed(task, dataset, sort)))


@zoo_app.command("info")
def zoo_info(name: EntryName) -> None:
    """Show an entry's model card."""
    from rich.markdown import Markdown

    from segdeconv.entries import card, entry_folder
    from segdeconv.progress import console

    console.print(Markdown(card(name)), soft_wrap=False)
    console.print(f"from {entry_folder(name)}")


@zoo_app.command("download", short_help="Fetch an entry's weights.")
def zoo_download(name: EntryName) -> None:
    """Fetch an entry's weights unless they are here, check them, and print where they lie.

    SEGDECONV_CACHE says where to keep them, SEGDECONV_ZOO_URL names a mirror, SEGDECONV_OFFLINE=1 forbids
    fetching them from the internet.
    """
    from segdeconv.entries import find_weights

    print(find_weights(name))


@zoo_app.command("verify", short_help="Measure an entry again.")
def zoo_verify(
    name: EntryName,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Check an entry's weights against its SHA-256, load them, and measure them where the data is at hand."""
    from segdeconv.progress import console
    from segdeconv.train import pick_device
    from segdeconv.zoo import verify

    found = verify(name, root, pick_device(device))
    console.print(f"{found.weights}: has the SHA-256 of its entry, and loads")
    if found.again is None:
        console.print(f"{found.metric} {found.claimed:.4f} was not measured again: {found.reason}")
    else:
        console.print(f"{found.metric} {found.again:.4f} here, {found.claimed:.4f} in the entry")


@zoo_app.command("add", short_help="Make an entry of a finished run.")
def zoo_add(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run, with eval.json.")],
    name: Annotated[
        str | None, typer.Option(help="By default ARCH_ENCODER.NORM_DATASET, as the recipe says.")
    ] = None,
    half: Annotated[bool, typer.Option("--half", help="Store the weights as float16.")] = False,
    data: Annotated[
        str | None, typer.Option(help="What the data is and its licence; known of public data sets.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="What the run was trained on; by default this machine.")
    ] = None,
    note: Annotated[
        list[str] | None,
        typer.Option(help="A sentence for the card, such as what is known to fail. Repeatable."),
    ] = None,
    root: Root = None,
    device: Device = "auto",
) -> None:
    """Write an entry's folder from a finished run; its metrics are measured on the weights as stored."""
    from segdeconv.progress import console
    from segdeconv.train import pick_device
    from segdeconv.zoo import Origin, add

    origin = Origin(data, machine, note or ())
    folder = add(run, name, half, origin, root, pick_device(device))
    console.print(f"wrote {folder}; next: read its card.md, then python tools/zoo_table.py")


@zoo_app.command("publish", short_help="Lay weights out for a server.")
def zoo_publish(
    to: Annotated[str, typer.Option(metavar="DIR|hf://ORG/REPO", help="A folder, or the Hugging Face Hub.")],
    names: Annotated[list[str] | None, typer.Argument(help="Entries; by default all.")] = None,
) -> None:
    """Lay weights out for any static web server, or push them to the Hugging Face Hub."""
    from segdeconv.entries import WEIGHTS
    from segdeconv.progress import console
    from segdeconv.zoo import publish

    for name in publish(to, names or ()):
        console.print(f"{to.rstrip('/')}/{name}/{WEIGHTS}")
    console.print(
        "for a mirror, set SEGDECONV_ZOO_URL to the address of that place; of an entry whose weights are not "
        "committed, put the file's address into the urls of its entry.json"
    )


@contextmanager
def _graph_file(model: Path) -> Iterator[Path]:
    """The graph itself; or a run's, exported into a temporary folder."""
    if model.suffix == ".onnx":
        yield model
        return
    import tempfile

    from segdeconv.checkpoint import load_checkpoint
    from segdeconv.export import export_onnx

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.onnx"
        export_onnx(*load_checkpoint(model), path)
        yield path


def _where(device: str, why_cpu: str) -> str:
    return f"running on {device}" + (f": {why_cpu}" if why_cpu else "")


def _recipe_file(name: str) -> str | Path:
    """A recipe's name or file as it is; of a zoo entry, its recipe."""
    from segdeconv.entries import entry_folder, is_entry

    return entry_folder(name) / "recipe.yaml" if is_entry(name) else name


def _run_name(recipe: str, loaded: Recipe) -> str:
    """NAME.NORM; for a zoo entry its own name or its twin's, since many entries share a recipe."""
    from segdeconv.entries import is_entry

    if not is_entry(recipe):
        return f"{loaded.name}.{loaded.model.norm}"
    network, _, rest = recipe.partition(".")
    return f"{network}.{loaded.model.norm}_{rest.partition('_')[2]}"


def _network_of(run: str, resumed: Callable[[], Path] | None) -> list[str]:
    """The changes that give a recipe the network of a run or entry, and make it begin with the weights. If
    ``run`` is gone, the run in the folder that ``resumed`` gives, which began with it, says what it was.
    """
    import yaml

    from segdeconv.checkpoint import find_checkpoint, has_state, read_info
    from segdeconv.config import load_recipe, recipe_to_dict

    try:
        recipe = read_info(find_checkpoint(run)).recipe
    except UserError:
        if resumed is None or not has_state(resumed()):
            raise
        recipe = load_recipe(resumed() / "recipe.yaml")
        if recipe.model.init != run:
            raise
    model = recipe_to_dict(recipe)["model"] | {"init": run}
    # A batch-norm network may become a deconvolved one of any kind.
    kept = ("norm", "keep", "network_deconv") if recipe.model.norm == "bn" else ("norm",)
    return [
        f"model.{key}={yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)}"
        for key, value in model.items()
        if key not in kept
    ]


def _numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r}: expected numbers with commas between them") from None


def _pair(option: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = _numbers(option, text, int)
    if len(numbers) != 2:
        raise UserError(f"{option} {text!r}: expected height and width in pixels, such as 512,1024")
    return numbers[0], numbers[1]


def _triple(option: str, text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    numbers = _numbers(option, text, int)
    if len(numbers) != 3:
        raise UserError(f"{option} {text!r}: expected batch, height and width, such as 1,512,1024")
    return numbers[0], numbers[1], numbers[2]


def main() -> None:
    """Run the command; bad input is one sentence on standard error and exit code 2 (3: see `Refused`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character it cannot encode must not end a command
            stream.reconfigure(errors="backslashreplace")
    # A terminal that does not know its size says 0; rich would print nothing.
    if os.environ.get("COLUMNS") == "0":
        del os.environ["COLUMNS"]
    # As Ctrl-C does, a request to end must not leave temporary files behind.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.unraisablehook = resent = _ResentSigterm()
    try:
        code = app(standalone_mode=False)  # what a command gave typer.Exit, otherwise None
        print(end="", flush=True)
        if code:
            sys.exit(code)
    except UserError as error:
        _fail(sentence_of(error), code=3 if isinstance(error, Refused) else 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (BrokenPipeError, SystemExit) as error:
        # The reader of a pipe has closed it, which rich and typer turn into exit code 1.
        if BrokenPipeError in (type(error), type(error.__context__)):
            os._exit(141)  # Python would complain once more when it flushes standard output
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("", "segdeconv"):
            raise
        _fail(f"this command needs {error.name}: pip install 'segdeconv[train]'")
    except OSError as error:
        _fail(shortage(error) or f"{error.filename or 'writing'}: {error.strerror or sentence_of(error)}")
    except Exception as error:
        if short := shortage(error):
            _fail(short)
        if not hasattr(error, "format_message"):  # the usage errors of the click that typer carries
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "segdeconv"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _fail(f"{message}; see {command} --help")
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.unraisablehook = resent.before
        if resent.timer is not None:
            resent.timer.cancel()


class _ResentSigterm:
    """A ``sys.unraisablehook`` that sends SIGTERM again where Python dropped the SystemExit it had raised, as
    it does in callbacks of the garbage collector.
    """

    def __init__(self) -> None:
        self.before = sys.unraisablehook
        self.timer: threading.Timer | None = None

    def __call__(self, lost: sys.UnraisableHookArgs) -> None:
        if not isinstance(lost.exc_value, SystemExit):
            self.before(lost)
            return
        self.timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
        self.timer.daemon = True
        self.timer.start()


def _fail(message: str, code: int = 2) -> None:
    print(f"segdeconv: error: {printable(message)}", file=sys.stderr)
    sys.exit(code)

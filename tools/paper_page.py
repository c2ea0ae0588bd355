"""What of the paper's claims was found here: writes docs/paper.md and its pictures into docs/paper/.

    python tools/paper_page.py                      # needs CamVid and CIFAR-10 in data/

The figures come from docs/measured (tools/reproduce_table1.py, reproduce_linear.py, accuracy_vs_time.py),
from the metrics of the zoo's entries and, for what layers read, from their networks, as `segdeconv inspect`
measures them. Whether a claim holds is decided here by the rules that the page states, not by hand.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy_vs_time
import camvid_rates
import reproduce_linear
import reproduce_table1
from torch import nn

from segdeconv.config import ModelConfig, load_recipe
from segdeconv.entries import entry_folder, entry_names, listed, measured
from segdeconv.errors import one_sentence
from segdeconv.files import make_folder, read_json_lines, write_text
from segdeconv.inspection import TITLES, VIEWS, inspect_run, median_of
from segdeconv.markdown import markdown_table
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import build_model

DOCS = Path("docs")
PICTURES = DOCS / "paper"
MEASURED = (reproduce_table1.MEASURED, accuracy_vs_time.RESULTS, reproduce_linear.MEASURED)
FREE_HEADS = Path("docs/measured/table1_free_heads.jsonl")  # table 1 before wide heads were held back


def verdict(holds: int, of: int, what: str, note: str = "", behind: Sequence[str] = ()) -> str:
    """A sentence that counts, and says plainly which way, and where it does not hold if that is in part."""
    if not of:
        return f"Not measured yet: whether {what}."
    if 0 < len(behind) < of:
        note += f"; not in {'; '.join(behind)}"
    word = "**holds**" if holds == of else "**does not hold**" if holds == 0 else "**holds in part**"
    return f"The claim {word} here: {what} in {holds} of {of}{note}."


def of_table1(lines: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Trainings on all pictures, the others being trials, by their length in epochs."""
    lines = [line for line in lines if line["pictures"] == reproduce_table1.ALL]
    lengths = sorted({line["epochs"] for line in lines})
    return {epochs: [line for line in lines if line["epochs"] == epochs] for epochs in lengths}


def table1_part(lines: list[dict[str, Any]]) -> str:
    parts = [
        f"{reproduce_table1.table(of_epochs, epochs)}\n"
        + ahead(of_epochs, "bn", f"after {_many(epochs, 'epoch')} deconvolution is ahead of batch norm")
        + " "
        + ahead(of_epochs, "bn_for_nds_time", "it is ahead of batch norm trained for its time")
        + below_published(of_epochs, epochs)
        + f"\n\n![training of every network](paper/table1_{epochs}.png)\n"
        for epochs, of_epochs in of_table1(lines).items()
    ]
    paced = {line["network"] for line in lines if "pace" in line}
    timed = {line["network"] for line in lines if line["arm"] == "nd" and line["seconds"]}
    if paced - timed:
        parts.append(
            f"`nd/bn` of {_titles(paced - timed)} is of an earlier training of `nd` than the one shown.\n"
        )
    earlier = {line["network"] for line in lines if "refresh_every" in line}
    if earlier:
        parts.append(
            f"That of {_titles(earlier)} had ten steps between refreshes at most, not twenty as by default.\n"
        )
    missing = [
        title
        for network, (title, _) in reproduce_table1.NETWORKS.items()
        if not any(line["network"] == network for line in lines)
    ]
    if missing:
        parts.append(f"Not trained yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def below_published(lines: list[dict[str, Any]], epochs: int) -> str:
    """In which networks batch norm is far below the paper's, so that the gap is not the paper's either."""
    below = set()
    for network, (_, known) in reproduce_table1.NETWORKS.items():
        runs = reproduce_table1.by_arm(lines, network)["bn"]
        if runs and epochs in known and 100 * _mean(runs, "top1") < known[epochs][0] - 10:
            below.add(network)
    if not below:
        return ""
    return (
        f" Batch norm is more than ten points below the paper's in {_titles(below)}: the gap there is not "
        "the method's alone."
    )


def _titles(networks: set[str]) -> str:
    return ", ".join(title for name, (title, _) in reproduce_table1.NETWORKS.items() if name in networks)


def free_heads_part(free: list[dict[str, Any]], lines: list[dict[str, Any]]) -> str:
    """Trainings of table 1 without wide heads held back beside the same with, which is the rule."""
    rows, differences = [], []
    for was in free:
        same = ("network", "arm", "seed", "epochs", "pictures", "amp")
        line = next((x for x in lines if all(x[key] == was[key] for key in same)), None)
        if line is None:
            continue
        title = reproduce_table1.NETWORKS[line["network"]][0]
        model, _ = build_model(ModelConfig(f"cifar_{line['network']}"), 10)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1].in_features
        differences.append(line["top1"] - was["top1"])
        rows.append([title, head, line["seed"], f"{100 * was['top1']:.2f}", f"{100 * line['top1']:.2f}"])
    if not differences:
        return ""
    better, mean = sum(difference > 0 for difference in differences), 100 * statistics.fmean(differences)
    titles = ["network", "features of the head", "seed", "free", "held back"]
    return (
        "Trainings of this table once more, without wide heads held back ([whitening.md](whitening.md)), "
        f"top-1 in percent:\n\n{markdown_table(titles, rows, numbers_from=1)}\n"
        f"The rule is better in {better} of {len(differences)}; on average {mean:+.1f} points.\n"
    )


def ahead(lines: list[dict[str, Any]], other: str, what: str) -> str:
    """In how many networks the mean top-1 of `nd` is above the other arm's, of how many seeds each."""
    pairs = {}
    for network, (title, _) in reproduce_table1.NETWORKS.items():
        arms = reproduce_table1.by_arm(lines, network)
        if arms["nd"] and arms[other]:
            pairs[title] = arms["nd"], arms[other]
    behind = [title for title, (nd, runs) in pairs.items() if _mean(nd, "top1") <= _mean(runs, "top1")]
    seeds = Counter(min(map(len, pair)) for pair in pairs.values())
    of_seeds = ", ".join(f"{count} with {_many(n, 'seed')}" for n, count in sorted(seeds.items()))
    return verdict(len(pairs) - len(behind), len(pairs), what, f" networks ({of_seeds})", behind)


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count > 1 else "")


def twins_part() -> str:
    entries = {entry.name: entry for entry in listed()}
    rows, better = [], 0
    for name, entry in entries.items():
        twin = name.replace(".nd_", ".bn_")
        if entry.norm == "bn" or twin not in entries:
            continue
        metric = MAIN_METRIC[entry.task]
        bn, nd = (measured(x)[metric] for x in (twin, name))
        bn_train, nd_train = (load_recipe(entry_folder(x) / "recipe.yaml").train for x in (twin, name))
        better += nd > bn
        scores = f"{bn:.4f}", f"{nd:.4f}"
        rates = f"{bn_train.lr:g}", f"{nd_train.lr:g}"
        rows.append([name.replace(".nd_", " on "), metric, *scores, nd_train.epochs, *rates])
    titles = ["pair", "metric", "bn", "nd", "epochs", "lr bn", "lr nd"]
    what = "deconvolution is above batch norm, each at its stored epoch,"
    claim = verdict(better, len(rows), what, " pairs, of one seed each")
    return (
        "The zoo's twins after their whole trainings, on the validation or test pictures that chose the "
        "stored epoch too. One seed each, and each twin has the learning rate of its own recipe.\n\n"
        f"{markdown_table(titles, rows, numbers_from=2)}\n{claim}\n"
    )


def rates_part(lines: list[dict[str, Any]]) -> str:
    both = camvid_rates.best_rates(lines).values()
    what = "of several rates for either norm, deconvolution ends higher at its best"
    return (
        "On CamVid rates were searched too, over 60 epochs where a row says nothing else: mIoU on the "
        "validation pictures in training's bfloat16, after fifths of the training, with its standard error "
        "where there are several seeds. `python tools/camvid_rates.py` prints this table, and says how to "
        "add to it.\n\n"
        f"{camvid_rates.table(lines)}\n"
        f"{verdict(sum(of['nd'][0] > of['bn'][0] for of in both), len(both), what, ' networks on CamVid')}\n"
    )


def ablation_part(lines: list[dict[str, Any]]) -> str:
    six_conv = [line for line in lines if line["task"] == "six_conv"]
    others = [line for line in lines if line["task"] != "six_conv"]
    return (
        "Six convolutions on 12,800 pictures of CIFAR-10 (JPEG), 100 steps of 128 an epoch; `final` is top-1 "
        "on 4,000 test pictures, which chose the rates too. Every arm is at the best of the learning rates "
        "that were tried with the most seeds; one that had fewer rates than another may be better than it "
        "looks. Seconds are those of one core.\n\n"
        f"{accuracy_vs_time.explained(six_conv)}\n"
        "Other networks, with arms of the same names: MobileNetV2 and a ResNet-18 of a quarter of the width "
        "on the same pictures (top-1), and the U-Net on MobileNetV2 on CamVid (mIoU).\n\n"
        f"{accuracy_vs_time.table(others)}"
    )


def linear_part(lines: list[dict[str, Any]]) -> str:
    arms = reproduce_linear.ARMS
    by_task = {
        title: {arm: reproduce_linear.best(lines, task, arm) for arm in arms}
        for task, (title, _, _) in reproduce_linear.TASKS.items()
    }
    by_task = {title: runs for title, runs in by_task.items() if all(runs.values())}
    parts = [
        f"{reproduce_linear.table(lines)}\n"
        + lowest(by_task, "final", "its training loss ends lowest of the three, each at its best rate,"),
        lowest(by_task, "test_loss", "its test loss is lowest of the three, at the same rates,"),
    ]
    if by_task:
        slower = [_mean(runs["nd"], "seconds") / _mean(runs["plain"], "seconds") for runs in by_task.values()]
        parts.append(
            f"Deconvolution takes {min(slower):.2g} to {max(slower):.2g} times as long as no normalisation."
        )
    return " ".join(parts) + "\n\n![training loss](paper/linear.png)\n"


def lowest(by_task: dict[str, dict[str, list[dict[str, Any]]]], key: str, what: str) -> str:
    """In how many tasks the mean of `nd` is below those of all other arms."""
    means = {t: {arm: _mean(runs, key) for arm, runs in arms.items()} for t, arms in by_task.items()}
    behind = [t for t, of in means.items() if of["nd"] >= min(of[arm] for arm in of if arm != "nd")]
    return verdict(len(means) - len(behind), len(means), what, " tasks", behind)


def inspection_part() -> str:
    parts, shown = [], set()
    for name in entry_names():
        norm, _, dataset = name.partition(".")[2].partition("_")
        with tempfile.TemporaryDirectory() as folder:
            report = inspect_run(name, Path(folder))
            pictures = []
            if norm == "nd" and dataset not in shown:  # one set of pictures a data set is enough
                shown.add(dataset)
                pictures = ["filters", "spectrum", "sparsity"]
            for picture in pictures:
                shutil.copyfile(Path(folder) / f"{picture}.png", PICTURES / f"{name}_{picture}.png")
        parts.append(of_entry(name, report, pictures))
    return "\n".join(parts)


def of_entry(name: str, report: dict[str, Any], pictures: list[str]) -> str:
    layers = report["layers"]
    views = [view for view in VIEWS if any(view in layer["condition"] for layer in layers)]
    medians = {title: [median_of(layers, key, view) for view in views] for key, title in TITLES.items()}
    cells = [[title, *(f"{m:.0f}" if m >= 100 else f"{m:.3f}" for m in of)] for title, of in medians.items()]
    table = markdown_table(["median over layers", *views], cells, numbers_from=1)
    rows = [f"### {name}, {len(layers)} layers\n", table]
    if "whitened" in views:
        whitening = [x for x in layers if x["whitens"]]
        if len(whitening) < len(layers):
            rows.append(
                f"Counted are the {len(whitening)} layers that whiten; the others are depthwise ones, whose "
                "input fast mode standardises, or kept as they were.\n"
            )
        for key, what, sign in (
            ("condition", "whitened patches are better conditioned than standardised ones", -1),
            ("correlation", "whitened features are less correlated than standardised ones", -1),
            ("near_zero", "more of the whitened values are nearly zero", 1),
            ("kurtosis", "whitened values have more kurtosis", 1),
            ("hoyer", "whitened values are sparser by Hoyer's measure", 1),
        ):
            known = [x for x in whitening if not math.isnan(x[key]["whitened"] - x[key]["standardised"])]
            better = [x for x in known if sign * x[key]["whitened"] > sign * x[key]["standardised"]]
            rows.append(f"- {verdict(len(better), len(known), what)}")
            if key == "condition":
                single, of = (sum(x["blocks"] == 1 for x in some) for some in (better, known))
                rows[-1] += (
                    " Blocks of channels share a matrix, which whitens their average: of the "
                    f"{of} layers with a single block {single} are."
                )
        for title, fits in report["filters"].items():
            round_ones = sum(fit["centre_surround"] for fit in fits)
            least = min(fit["surround_r2"] for fit in fits)
            rows.append(
                f"- {verdict(round_ones, len(fits), f'whitening filters of {title} are centre-surround')} "
                f"A difference of Gaussians explains {least:.0%} or more of the taps beside the middle."
            )
        rows += ["", *(f"![{picture}](paper/{name}_{picture}.png)\n" for picture in pictures)]
    return "\n".join(rows)


def measured_part() -> str:
    """What docs/measured and the zoo's metrics say: all but what layers read, for which data is needed."""
    table1, ablation, linear = (read_json_lines(path, missing_ok=True) for path in MEASURED)
    return "\n".join(
        [
            "## Networks converge in fewer steps (table 1)\n",
            table1_part(table1) if table1 else "Not measured yet.\n",
            free_heads_part(read_json_lines(FREE_HEADS, missing_ok=True), table1),
            "## Networks converge to better accuracy\n",
            twins_part(),
            rates_part(read_json_lines(camvid_rates.MEASURED)),
            "## What of it matters\n",
            ablation_part(ablation) if ablation else "Not measured yet.\n",
            "## Gradient descent on whitened features is nearly Newton's method\n",
            linear_part(linear) if linear else "Not measured yet.\n",
        ]
    )


def page() -> str:
    parts = [
        "# The paper's claims, measured\n",
        "Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926). This page is written by "
        "`python tools/paper_page.py` from what lies in docs/measured and from the zoo; so are its verdicts, "
        "which count and no more. `nd` is the fast mode of this package, with the settings of its recipe, "
        "unless a row says `exact`; [whitening.md](whitening.md) says how they differ.\n",
        measured_part(),
        "## What layers read: correlation, centre-surround filters, sparsity\n",
        "Of the zoo's networks, on pictures of their validation split; *standardised* is the most that batch "
        "norm could make of the same input. Condition numbers are also the larger the fewer patches a layer "
        "reads, in all views. Sparsity is that of every feature in units of its own standard deviation.\n",
        inspection_part(),
    ]
    return "\n".join(parts)


def draw_measured() -> None:
    table1, _, linear = (read_json_lines(path, missing_ok=True) for path in MEASURED)
    for epochs, lines in of_table1(table1).items():
        reproduce_table1.picture(lines, PICTURES / f"table1_{epochs}.png")
    reproduce_linear.picture(linear, PICTURES / "linear.png")


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    make_folder(PICTURES)
    text = page()
    draw_measured()
    write_text(DOCS / "paper.md", text)
    for picture in PICTURES.glob("*.png"):
        if f"paper/{picture.name}" not in text:
            picture.unlink()
    print(DOCS / "paper.md")


if __name__ == "__main__":
    main()

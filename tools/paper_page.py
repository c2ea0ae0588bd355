"""What of the paper's claims was found here: writes docs/paper.md and its pictures into docs/paper/.

    python tools/paper_page.py                      # with the pictures of every entry whose data is at hand

The figures come from docs/measured (tools/reproduce_table1.py, reproduce_linear.py, accuracy_vs_time.py) and,
for what layers read, from the entries of the zoo, as `segdeconv inspect` measures them. Whether a claim holds
is decided here by the rules that the page states, not by hand.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import accuracy_vs_time
import numpy as np
import reproduce_linear
import reproduce_table1

from segdeconv.entries import entry_names
from segdeconv.errors import UserError
from segdeconv.files import make_folder, write_atomically
from segdeconv.inspection import inspect_run

DOCS = Path("docs")
PICTURES = DOCS / "paper"
MEASURES = {
    "condition": "condition number",
    "correlation": "mean absolute correlation",
    "near_zero": "share within 0.1 standard deviations",
    "kurtosis": "excess kurtosis",
    "hoyer": "Hoyer's sparsity",
}


def verdict(holds: int, of: int, what: str) -> str:
    """A sentence that counts, and says plainly which way."""
    if not of:
        return f"Not measured yet: whether {what}."
    word = "**holds**" if holds == of else "**does not hold**" if holds == 0 else "**holds in part**"
    return f"The claim {word} here: {what} in {holds} of {of}."


def table1_part(lines: list[dict[str, Any]]) -> str:
    parts = []
    lines = [line for line in lines if line["pictures"] == reproduce_table1.ALL]  # the others are trials
    for epochs in sorted({line["epochs"] for line in lines}):
        of_epochs = [line for line in lines if line["epochs"] == epochs]
        name = f"table1_{epochs}.png"
        reproduce_table1.picture(of_epochs, PICTURES / name)
        ahead = {"bn": 0, "bn_for_nds_time": 0}
        pairs = dict.fromkeys(ahead, 0)
        for network in reproduce_table1.NETWORKS:
            means = {
                arm: np.mean([run["top1"] for run in runs]) if runs else math.nan
                for arm, runs in reproduce_table1.by_arm(of_epochs, network).items()
            }
            for other in ahead:
                if not math.isnan(means["nd"] - means[other]):
                    pairs[other] += 1
                    ahead[other] += bool(means["nd"] > means[other])
        parts.append(
            f"{reproduce_table1.table(of_epochs, epochs)}\n"
            + verdict(ahead["bn"], pairs["bn"], "deconvolution is ahead at equal steps")
            + " "
            + verdict(ahead["bn_for_nds_time"], pairs["bn_for_nds_time"], "it is ahead at equal time")
            + f"\n\n![training of every network](paper/{name})\n"
        )
    missing = [
        title
        for network, (title, _) in reproduce_table1.NETWORKS.items()
        if not any(line["network"] == network for line in lines)
    ]
    if missing:
        parts.append(f"Not trained yet: {', '.join(missing)}.\n")
    return "\n".join(parts)


def linear_part(lines: list[dict[str, Any]]) -> str:
    reproduce_linear.picture(lines, PICTURES / "linear.png")
    finals = [
        [mean_final(reproduce_linear.best(lines, task, arm)) for arm in ("nd", "plain", "bn")]
        for task in reproduce_linear.TASKS
    ]
    ahead = [nd < min(others) for nd, *others in finals if math.isfinite(sum((nd, *others)))]
    return (
        reproduce_linear.table(lines)
        + "\n"
        + verdict(
            sum(ahead), len(ahead), "its training loss ends lowest of the three, each at its best rate,"
        )
        + "\n\n![training loss](paper/linear.png)\n"
    )


def mean_final(runs: list[dict[str, Any]]) -> float:
    return float(np.mean([run["final"] for run in runs])) if runs else math.inf


def inspection_part() -> str:
    parts, shown = [], set()
    for name in entry_names():
        norm, _, dataset = name.partition(".")[2].partition("_")
        with tempfile.TemporaryDirectory() as folder:
            try:
                report = inspect_run(name, Path(folder))
            except UserError as error:
                parts.append(f"{name}: not measured, {error}\n")
                continue
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
    views = list(layers[0]["condition"])
    rows = [
        f"### {name}, {len(layers)} layers\n",
        f"| median over layers | {' | '.join(views)} |",
        f"|---|{'---:|' * len(views)}",
    ]
    for key, title in MEASURES.items():
        medians = [np.nanmedian([layer[key][view] for layer in layers]) for view in views]
        rows.append(f"| {title} | {' | '.join(f'{m:.0f}' if m >= 100 else f'{m:.3f}' for m in medians)} |")
    rows.append("")
    if "whitened" in views:
        for key, what, sign in (
            ("condition", "whitened patches are better conditioned than standardised ones", -1),
            ("correlation", "whitened features are less correlated than standardised ones", -1),
            ("near_zero", "more of the whitened values are nearly zero", 1),
            ("kurtosis", "whitened values have more kurtosis", 1),
            ("hoyer", "whitened values are sparser by Hoyer's measure", 1),
        ):
            known = [x for x in layers if not math.isnan(x[key]["whitened"] - x[key]["standardised"])]
            better = [x for x in known if sign * x[key]["whitened"] > sign * x[key]["standardised"]]
            rows.append(f"- {verdict(len(better), len(known), what)}")
            if key == "condition":
                single, of = (sum(" 1 blocks" in x["kind"] for x in some) for some in (better, known))
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


def page() -> str:
    table1 = accuracy_vs_time.read(reproduce_table1.MEASURED)
    linear = accuracy_vs_time.read(reproduce_linear.MEASURED)
    ablation = accuracy_vs_time.read(accuracy_vs_time.RESULTS)
    parts = [
        "# The paper's claims, measured\n",
        "Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926). This page is written by "
        "`python tools/paper_page.py` from what lies in docs/measured and from the zoo; so are its verdicts, "
        "which count and no more. `nd` is the fast mode of this package unless a row says `exact`; "
        "[whitening.md](whitening.md) says how they differ.\n",
        "## Networks converge in fewer steps and to better accuracy (table 1)\n",
        table1_part(table1) if table1 else "Not measured yet.\n",
        "## What of it matters\n",
        "Six convolutions on 12,800 pictures of CIFAR-10 (JPEG), 100 steps of 128 an epoch, and what other "
        "networks there are; every arm at the best of its learning rates (see the head "
        "of `tools/accuracy_vs_time.py` for the arms).\n",
        accuracy_vs_time.table(ablation) if ablation else "Not measured yet.\n",
        "## Gradient descent on whitened features is nearly Newton's method\n",
        linear_part(linear) if linear else "Not measured yet.\n",
        "## What layers read: correlation, centre-surround filters, sparsity\n",
        "Of the zoo's networks, on pictures of their validation split; *standardised* is what batch norm "
        "could make of the same input.\n",
        inspection_part(),
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    make_folder(PICTURES)
    text = page()
    write_atomically(DOCS / "paper.md", lambda path: path.write_text(text))
    for picture in PICTURES.glob("*.png"):
        if f"paper/{picture.name}" not in text:
            picture.unlink()
    print(DOCS / "paper.md")

"""The zoo's networks on CamVid, and one with a pretrained encoder, at several learning rates.

    segdeconv train unet_mobilenet_v2.nd_camvid --set train.lr=0.4 --set train.seed=1 --out runs/RUN
    segdeconv train camvid_unet_efficientnet_lite0 --norm bn --set train.lr=0.1 --out runs/RUN
    python tools/camvid_rates.py runs/RUN        # writes what it says into docs/measured/camvid.jsonl
    python tools/camvid_rates.py                 # prints all, and the best of each for the README

Scores are those of the training's own validation, in its precision, at the end of every third epoch.
tools/paper_page.py has the table too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segdeconv.checkpoint import FREE_KEYS
from segdeconv.config import Recipe, flat, load_recipe, recipe_to_dict
from segdeconv.entries import entry_folder, entry_names
from segdeconv.errors import UserError, one_sentence
from segdeconv.figures import read_metrics, spread
from segdeconv.files import read_json_lines, write_text
from segdeconv.markdown import markdown_table

MEASURED = Path("docs/measured/camvid.jsonl")
PRETRAINED = "camvid_unet_efficientnet_lite0"
FIFTHS = ("1/5", "2/5", "3/5", "4/5", "end")  # of the training


def same_but_for_rate(recipe: Recipe) -> dict[str, Any]:
    searched = (*FREE_KEYS, "train.lr", "train.seed")
    return {key: value for key, value in flat(recipe_to_dict(recipe)).items() if key not in searched}


def trainings() -> Iterator[tuple[str, Recipe]]:
    """Networks and how they are trained."""
    for entry in entry_names():
        yield entry.partition(".")[0], load_recipe(entry_folder(entry) / "recipe.yaml")
    for weights, start in (("imagenet", "pretrained encoder"), ("null", "from scratch")):
        for norm in ("bn", "nd"):
            changes = [f"model.options.encoder_weights={weights}", f"model.norm={norm}"]
            recipe = load_recipe(PRETRAINED, changes)
            yield f"unet_{recipe.model.encoder}, {start}, {recipe.train.epochs} epochs", recipe


def of_run(folder: Path) -> dict[str, Any]:
    """What a finished run says.

    Raises:
        UserError: it has not finished, or trains none of the recipes.
    """
    metrics, recipe = read_metrics(folder), load_recipe(folder / "recipe.yaml")
    same = (name for name, its in trainings() if same_but_for_rate(its) == same_but_for_rate(recipe))
    network = next(same, None)
    if network is None or recipe.data.dataset != "camvid":
        raise UserError(
            f"{folder}: is no training of a CamVid entry of the zoo, nor of {PRETRAINED}; expected one of "
            "these, with another train.lr or train.seed at most"
        )
    if not metrics or metrics[-1]["epoch"] < recipe.train.epochs:
        raise UserError(f"{folder}: has not finished; go on with `segdeconv train ... --resume`")
    scored = [line for line in metrics if "miou" in line]
    return {
        "network": network,
        "norm": recipe.model.norm,
        "lr": recipe.train.lr,
        "seed": recipe.train.seed,
        "steps": metrics[-1]["step"],
        "epochs": [line["epoch"] for line in scored],
        "miou": [round(line["miou"], 5) for line in scored],
        "loss": round(metrics[-1]["loss"], 4),
    }


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["network"], line["norm"], line["lr"], line["seed"]


def grouped(lines: list[dict[str, Any]]) -> dict[tuple[str, str, float], list[dict[str, Any]]]:
    """Trainings that differ in nothing but the seed."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=key):
        groups.setdefault(key(line)[:3], []).append(line)
    return groups


def at_end(runs: list[dict[str, Any]]) -> str:
    mean, error, *_ = spread([line["miou"][-1] for line in runs])
    return f"{mean:.3f} ± {error:.3f}" if len(runs) > 1 else f"{mean:.3f}"


def table(lines: list[dict[str, Any]]) -> str:
    """mIoU along the training, the mean of the seeds, with the standard error at the end."""
    rows = []
    for (network, norm, lr), runs in grouped(lines).items():
        curves = [dict(zip(line["epochs"], line["miou"], strict=True)) for line in runs]
        shown = [runs[0]["epochs"][-1] * fifth // 5 for fifth in range(1, 6)]
        means = [f"{spread([curve[epoch] for curve in curves])[0]:.3f}" for epoch in shown]
        rows.append([network, norm, f"{lr:g}", len(runs), *means[:-1], at_end(runs)])
    titles = ["network", "norm", "lr", "seeds", *FIFTHS]
    return markdown_table(titles, rows, numbers_from=2)


def best_rates(lines: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of networks with several rates for each norm: by norm, the best mean of the last mIoU, and its rate."""
    tried: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (network, norm, lr), runs in grouped(lines).items():
        mean, *_ = spread([line["miou"][-1] for line in runs])
        tried.setdefault(network, {"bn": [], "nd": []})[norm].append((mean, lr))
    searched = {network: of for network, of in tried.items() if min(map(len, of.values())) > 1}
    return {network: {norm: max(of[norm]) for norm in of} for network, of in searched.items()}


def best_table(lines: list[dict[str, Any]]) -> str:
    """The README's."""
    groups = grouped(lines)
    rows = [
        [network, *(f"{at_end(groups[network, norm, lr])} at {lr:g}" for norm, (_, lr) in of.items())]
        for network, of in best_rates(lines).items()
    ]
    return markdown_table(["mIoU, learning rate", "batch norm", "deconvolution"], rows, numbers_from=1)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of finished runs")
    lines = {key(line): line for line in read_json_lines(MEASURED, missing_ok=True)}
    runs = [of_run(folder) for folder in parser.parse_args().runs]
    lines |= {key(line): line for line in runs}
    if not lines:
        raise UserError(f"{MEASURED} holds no run yet; name the folder of one")
    if runs:
        write_text(MEASURED, "".join(f"{json.dumps(lines[each])}\n" for each in sorted(lines)))
    print(table(list(lines.values())), best_table(list(lines.values())), sep="\n", end="")


if __name__ == "__main__":
    main()

"""What tools/ make of docs/measured: whether the pages hold it, what they count, how they refuse input."""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segdeconv.config import load_recipe, recipe_to_yaml
from segdeconv.entries import entry_folder
from segdeconv.errors import UserError
from segdeconv.files import append_json_line, make_folder, read_json_lines

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tools"))  # the tools import each other
paper_page = importlib.import_module("paper_page")
accuracy_vs_time = paper_page.accuracy_vs_time
camvid_rates = paper_page.camvid_rates
reproduce_linear = paper_page.reproduce_linear
reproduce_table1 = paper_page.reproduce_table1
bench_deploy = importlib.import_module("bench_deploy")
bench_step = importlib.import_module("bench_step")
bench_whitening = importlib.import_module("bench_whitening")
convert_timm = importlib.import_module("convert_timm")
export_table = importlib.import_module("export_table")
gradient_by_sampling = importlib.import_module("gradient_by_sampling")
int8_twins = importlib.import_module("int8_twins")


def test_the_papers_page_holds_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    fresh = paper_page.measured_part() in Path("docs/paper.md").read_text()
    assert fresh, "docs/paper.md is older than docs/measured or the zoo; run: python tools/paper_page.py"


# Accuracy against time.


def run(arm: str, lr: float, seed: int, final: float, epochs: int = 2) -> dict[str, Any]:
    curve = [[100, 7.0, 0.1, 2.0], [200, 20.0 + seed, final, 1.0]]
    return {
        "task": "six_conv", "arm": arm, "lr": lr, "seed": seed, "epochs": epochs, "final": final,
        "curve": curve,
    }  # fmt: skip


RUNS = [
    run("fast", 0.4, 0, 0.9),  # the best, but of one seed
    *(run("fast", 0.2, seed, final) for seed, final in enumerate((0.5, 0.6, 0.7))),
    *(run("fast", 0.1, seed, 0.4) for seed in range(3)),
    run("bn", 0.1, 0, 0.3),
    run("bn", 0.05, 0, 0.4),
    run("bn", 0.2, 0, 0.0, epochs=6),
    run("exact", 0.1, 0, 0.5),
    run("exact:block_size=16", 0.1, 0, 0.5),
    run("identity", 0.1, 0, 0.5),
    run("fast:block_size=16", 0.1, 0, 0.5),
    run("fast:block_size=8", 0.1, 0, 0.5),
    run("adamw/bn", 0.003, 0, 0.5),
]


def test_the_best_rate_has_the_most_seeds_and_the_best_mean() -> None:
    best = accuracy_vs_time.best(RUNS)
    assert {run["lr"] for run in best["six_conv", 2, "fast"]} == {0.2}
    assert [run["lr"] for run in best["six_conv", 2, "bn"]] == [0.05]
    assert [run["lr"] for run in best["six_conv", 6, "bn"]] == [0.2]


def test_accuracy_tables() -> None:
    lines = accuracy_vs_time.table(RUNS).splitlines()
    assert lines[:4] == [
        "| task | epochs | arm | rates tried | lr | seeds | final | standard error | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        "| six_conv | 2 | adamw/bn | 1 | 0.003 | 1 | 0.5000 |  | 20 |",
        "| six_conv | 2 | bn | 2 | 0.05 | 1 | 0.4000 |  | 20 |",
    ]
    assert "| six_conv | 2 | fast | 3 | 0.2 | 3 | 0.6000 | 0.0577 | 21 |" in lines  # 0.1 / sqrt(3)
    rows = accuracy_vs_time.explained(RUNS).splitlines()[2:]
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [
        ("| 2", "bn"), ("| 2", "fast"), ("| 2", "exact"), ("| 2", "fast:block_size=8"),
        ("| 2", "fast:block_size=16"), ("| 2", "identity"), ("| 2", "exact:block_size=16"),
        ("| 2", "adamw/bn"), ("| 6", "bn"),
    ]  # fmt: skip
    assert rows[1] == "| 2 | fast | fast mode | 3 | 0.2 | 3 | 0.6000 | 0.0577 | 21 |"


def test_arms_are_described() -> None:
    described = accuracy_vs_time.described
    assert (
        described("fast:block_size=8,eps=1e-2")
        == "fast mode; channels per block 8, not 32; eps 0.01, not 1e-05"
    )
    assert described("exact:block_size=16").endswith("channels per block 16, not 64")
    assert described("adamw/fast:filter_norm=0.25") == (
        "fast mode; norm of the filters at first 0.25, not 1.0; trained by AdamW"
    )
    for arm in ("bn", *accuracy_vs_time.OF_FAST, *accuracy_vs_time.OF_EXACT):
        for text in (arm, f"adamw/{arm}"):
            assert accuracy_vs_time.arm_name(text) == text
            assert described(text)


@pytest.mark.parametrize(("arm", "kind"), [("bn", torch.optim.SGD), ("adamw/fast", torch.optim.AdamW)])
def test_optimisers_of_arms(arm: str, kind: type[torch.optim.Optimizer]) -> None:
    optimizer = accuracy_vs_time.make_optimizer(torch.nn.Linear(2, 2), arm, 0.25)
    assert type(optimizer) is kind
    assert optimizer.defaults["lr"] == 0.25


@pytest.mark.parametrize("arm", [*accuracy_vs_time.OF_FAST, *accuracy_vs_time.OF_EXACT, "fast:block_size=4"])
def test_every_arm_trains(arm: str) -> None:
    torch.manual_seed(0)
    model = accuracy_vs_time.convert(accuracy_vs_time.six_conv(3, width=8), arm)
    before = [value.clone() for value in model.state_dict().values()]
    with accuracy_vs_time.ablation(arm), torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, 16, 16)).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    after = model.state_dict().values()
    assert sum(not torch.equal(*pair) for pair in zip(before, after, strict=True)) > 10
    assert model.eval()(torch.randn(2, 3, 16, 16)).isfinite().all()


@pytest.mark.parametrize(
    "arm",
    ["slow", "adamw/slow", "adamw/", "bn:eps=1", "fast:eps", "fast:eps=-1", "fast:epsilon=1", "fast:eps=x"],
)
def test_what_is_no_arm(arm: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=arm):
        accuracy_vs_time.arm_name(arm)


# Table 1.


def trained(network: str, arm: str, seed: int, top1: float) -> dict[str, Any]:
    return {
        "network": network, "arm": arm, "seed": seed, "epochs": 1, "pictures": 50_000, "amp": "bf16",
        "parameters": 1_230_000, "steps": 390, "seconds": 100.0 if arm == "bn" else 110.0, "top1": top1,
    }  # fmt: skip


TABLE1 = [
    *(trained("vgg16", "bn", seed, top1) for seed, top1 in enumerate((0.1, 0.2, 0.3))),
    *(trained("vgg16", "nd", seed, top1) for seed, top1 in enumerate((0.6, 0.7, 0.8))),
    trained("resnet18", "bn", 0, 0.5),
    trained("resnet18", "nd", 0, 0.4),
    trained("senet18", "bn", 0, 0.5),
]


def test_table1() -> None:
    rows = reproduce_table1.table(TABLE1, 1).splitlines()
    assert "epochs: 1, of 390 steps" in rows[0]
    means = "20.00 ± 5.77 | 70.00 ± 5.77 |  | 3 | 1.10 | bfloat16 |"
    assert rows[4] == f"| VGG-16 | 1.23 | 14.12 | 74.18 | 14.38 | 74.20 | {means}"
    assert "| 50.00 | 40.00 |  | 1 | 1.10 |" in rows[5]
    assert "| 50.00 |  |  | 1 |  |" in rows[6]


def test_a_stopped_training_goes_on_to_the_same_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), np.uint8)
    for split, label in itertools.product(("train", "test"), range(10)):
        (tmp_path / f"data/cifar10/{split}/{label}").mkdir(parents=True)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture // 2 + 12 * label).save(f"data/cifar10/{split}/{label}/{i}.png")
    # Ten minutes pass between two looks at the clock, and no processor time at all.
    clock = types.SimpleNamespace(monotonic=itertools.count(0, 600).__next__, process_time=lambda: 0.0)
    monkeypatch.setattr(reproduce_table1, "time", clock)
    monkeypatch.setattr("timed_step.time", clock)
    monkeypatch.setattr(reproduce_table1, "POINTS", 1)
    save, saves = reproduce_table1.save_state, []

    def save_and_stop_at(*numbers: int) -> Any:
        def save_then_stop(*state: Any) -> None:
            save(*state)
            saves.append(state[2]["done"])
            if len(saves) in numbers:
                raise KeyboardInterrupt

        return save_then_stop

    def go(out: str) -> None:
        options = [
            "--networks",
            "pnasnet_a",
            "--arms",
            "nd",
            "--epochs",
            "2",
            "--pictures",
            "300",
            "--amp",
            "off",
        ]
        monkeypatch.setattr(sys, "argv", ["tool", *options, "--out", out])
        reproduce_table1.main()

    monkeypatch.setattr(reproduce_table1, "save_state", save_and_stop_at())
    go("whole.jsonl")
    assert saves == [1, 2, 3]  # of two epochs of two steps
    saves.clear()
    monkeypatch.setattr(reproduce_table1, "save_state", save_and_stop_at(1, 3))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            go("stopped.jsonl")
    go("stopped.jsonl")
    assert saves == [1, 2, 3]
    assert "goes on after step 3 of 4" in capsys.readouterr().out
    whole, stopped = (read_json_lines(Path(f"{name}.jsonl")) for name in ("whole", "stopped"))
    assert whole == stopped
    assert len(whole[0]["curve"]) == 2
    assert not list(Path("runs").glob("*/*"))


def test_batch_norm_had_nds_time() -> None:
    lines = reproduce_table1.read(ROOT / reproduce_table1.MEASURED, 1, reproduce_table1.ALL)
    later = [line for line in lines if line["arm"] == "bn_for_nds_time"]
    assert later
    for line in later:
        assert line["steps"] == round(390 * line["pace"]), (line["network"], line["seed"])


def test_no_pace_of_trainings_that_were_not_side_by_side() -> None:
    bn, nd = trained("vgg16", "bn", 0, 0.1), trained("vgg16", "nd", 0, 0.6)
    runs = {"bn": [bn], "nd": [nd], "bn_for_nds_time": []}
    assert reproduce_table1.paces(runs) == [pytest.approx(1.1)]
    runs["nd"] = [{**nd, "seconds": None}]
    assert reproduce_table1.paces(runs) == []
    runs["bn_for_nds_time"] = [{**bn, "pace": 1.2}]
    assert reproduce_table1.paces(runs) == [1.2]


def test_heads_free_and_held_back() -> None:
    free = [{**TABLE1[3], "top1": 0.5}, {**TABLE1[4], "top1": 0.75}]
    part = paper_page.free_heads_part(free, TABLE1)
    assert "| VGG-16 | 512 | 0 | 50.00 | 60.00 |" in part
    assert "better in 1 of 2; on average +2.5 points" in part


def test_verdicts_on_table1() -> None:
    text = paper_page.table1_part([*TABLE1, {**TABLE1[0], "epochs": 20, "pictures": 500}])
    for sentence in (
        "The claim **holds in part** here: after 1 epoch deconvolution is ahead of batch norm in 1 of 2 "
        "networks (1 with 1 seed, 1 with 3 seeds); not in ResNet-18.",
        "Not measured yet: whether it is ahead of batch norm trained for its time.",
    ):
        assert sentence in text
    assert "epochs: 20" not in text  # a trial on few pictures
    assert "Not trained yet: Preact-18" in text
    assert "earlier training" not in text
    assert "below the paper's" not in text
    low = [*TABLE1, trained("senet18", "bn", 1, 0.4)]  # with the 0.5 of seed 0 more than ten below 57.63
    assert "more than ten points below the paper's in SENet-18: the gap" in paper_page.table1_part(low)
    for_time = {**TABLE1[0], "arm": "bn_for_nds_time", "pace": 1.2, "refresh_every": 10}
    text = paper_page.table1_part([TABLE1[0], {**TABLE1[3], "seconds": None}, for_time])
    assert "`nd/bn` of VGG-16 is of an earlier training" in text
    assert "That of VGG-16 had ten steps" in text


@pytest.mark.parametrize(
    ("holds", "of", "expected"),
    [
        (3, 3, "The claim **holds** here: it is so in 3 of 3 pairs."),
        (1, 3, "The claim **holds in part** here: it is so in 1 of 3 pairs; not in a; b."),
        (0, 3, "The claim **does not hold** here: it is so in 0 of 3 pairs."),
        (0, 0, "Not measured yet: whether it is so."),
    ],
)
def test_verdicts_count(holds: int, of: int, expected: str) -> None:
    assert paper_page.verdict(holds, of, "it is so", " pairs", ["a", "b", "c"][: of - holds]) == expected


def test_twins_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"unet_resnet10t.bn_toy": 0.5, "unet_resnet10t.nd_toy": 0.6, "cifar_six_conv.nd_cifar10": 0.9}
    entries = [entry for entry in paper_page.listed() if entry.name in scores]
    monkeypatch.setattr(paper_page, "listed", lambda: entries)
    monkeypatch.setattr(paper_page, "measured", lambda name: {"miou": scores[name]})
    text = paper_page.twins_part()
    assert "| unet_resnet10t on toy | miou | 0.5000 | 0.6000 | 8 | 0.1 | 0.1 |" in text
    assert "six_conv" not in text  # it has no twin here
    assert "in 1 of 1 pairs, of one seed each." in text


# MNIST.


def small(arm: str, lr: float, level: float | None, test: float, task: str = "mlp") -> dict[str, Any]:
    losses = [2.0] * 100 + [level or 9.0] * 134
    return {
        "task": task, "arm": arm, "lr": lr, "seed": 0, "losses": losses, "final": level,
        "seconds": {"plain": 2.0, "bn": 3.0, "nd": 8.0}[arm], "test_loss": test, "top1": 0.5,
    }  # fmt: skip


LINEAR = [
    small("plain", 0.1, 0.5, 0.3),
    small("plain", 1.0, None, 9.0),  # diverged
    small("bn", 0.1, 0.4, 0.6),
    small("nd", 0.1, 0.6, 0.2),
    small("nd", 0.3, 0.3, 0.7),
]


def test_linear_best_is_of_those_that_did_not_diverge() -> None:
    assert [run["lr"] for run in reproduce_linear.best(LINEAR, "mlp", "plain")] == [0.1]
    assert [run["lr"] for run in reproduce_linear.best(LINEAR, "mlp", "nd")] == [0.3]
    assert reproduce_linear.best(LINEAR, "convnet", "nd") == []


def test_linear_table() -> None:
    rows = reproduce_linear.table(LINEAR).splitlines()[4:]
    # Five steps of the lower loss before the mean of five is below plain training's end.
    assert [row.removeprefix("| perceptron, cross-entropy | ") for row in rows] == [
        "no normalisation | 0.1 | 1 | 0.5000 | 0.3000 | 50.00 | - | 2.0 |",
        "batch norm | 0.1 | 1 | 0.4000 | 0.6000 | 50.00 | 105 | 3.0 |",
        "network deconvolution | 0.3 | 1 | 0.3000 | 0.7000 | 50.00 | 105 | 8.0 |",
    ]


def test_verdicts_on_mnist() -> None:
    ahead = [small(arm, 0.1, level, level, "convnet") for arm, level in (("plain", 0.5), ("bn", 0.4))]
    better = small("nd", 0.1, 0.3, 0.3, "convnet")
    text = paper_page.linear_part(
        [*LINEAR, *ahead, {**better, "seconds": 3.0}, small("nd", 1, 1, 1, "logistic")]
    )
    assert (
        "**holds** here: its training loss ends lowest of the three, each at its best rate, in 2 of 2 tasks."
        in text
    )
    assert "at the same rates, in 1 of 2 tasks; not in perceptron, cross-entropy." in text
    assert "takes 1.5 to 4 times as long" in text


# Files of results.


def test_a_line_that_was_cut_short_gives_way(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    assert read_json_lines(path, missing_ok=True) == []
    for value in (1, 2):
        append_json_line(path, {"value": value})
    path.write_text(path.read_text() + '{"value": 3')
    assert read_json_lines(path) == [{"value": 1}, {"value": 2}]
    append_json_line(path, {"value": 4})
    assert read_json_lines(path) == [{"value": 1}, {"value": 2}, {"value": 4}]
    path.write_text('{"value": \n{"value": 1}\n')
    with pytest.raises(UserError, match=r"runs\.jsonl: is damaged"):
        read_json_lines(path)


# Operations.


@pytest.mark.parametrize("groups", [1, 4])
def test_operations_of_grouped_convolutions(groups: int) -> None:
    conv = torch.nn.Conv2d(4, 8, 3, groups=groups)
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    forward = 2 * (2 * 8 * 4 * 5) * (9 * 4 // groups)
    assert bench_step.operations(lambda: conv(x)) == forward
    assert bench_step.operations(lambda: conv(x).sum().backward(), times=2) == 3 * forward
    assert bench_step.operations(lambda: conv(x.detach()).sum().backward()) == 2 * forward


@pytest.mark.slow
def test_a_table_of_training_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["cifar_resnet18", "--batch", "2", "--size", "8", "8", "--cycles", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *arguments])
    bench_step.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "cifar_resnet18: batch 2, 8x8"
    bn, fast = ([float(value) for value in re.findall(r"[\d.]+", line)] for line in lines[3:])
    assert bn[1:4] == [1, 1, 1]
    assert bn[0] > 0
    assert fast[4] > bn[4] > 0
    assert fast[1] == pytest.approx(fast[0] / bn[0], abs=0.01)
    assert bn[6] > 4 * 11.2e6 / 2**20  # the weights, MiB


# Deployment.


def test_the_page_of_exports_is_what_its_tool_writes() -> None:
    text = (ROOT / "docs/export.md").read_text()
    reasons = dict(re.findall(r"^- (\w+)(?:, any size)?: (.+)$", text, re.M))
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    assert export_table.page([[*row, reasons.get(row[0], "")] for row in rows]) == text


def test_the_page_of_latencies() -> None:
    fp32 = {"p50": 12.4, "p95": 20.0, "images_per_s": 80.645, "peak_mib": 99.6, "ratio": 1.0}
    timings = [
        {"name": "onnxruntime fp32 bn", **fp32},
        {"name": "PyTorch eager fp32 bn", **fp32, "peak_mib": None},
        {"name": "onnxruntime fp32 nd", **fp32, "ratio": 1.0304},
    ]
    (network, title), *_ = bench_deploy.NETWORKS.items()
    result = {
        "network": network, "size": [32, 64], "device": "cpu", "device_name": "abacus", "cores": 2,
        "threads": 2, "batch": 1, "runs": 10, "onnxruntime": "1", "torch": "2", "timings": timings,
    }  # fmt: skip
    lines = bench_deploy.page([result]).splitlines()
    assert "should be 1: 0 of 1 are within 2% of it, the lowest is 1.030, the highest 1.030. " in lines[2]
    assert lines[2].endswith("p95 of so few runs is nearly the slowest.")
    assert "- abacus (cpu, 2 cores), 2 threads, batch 1, onnxruntime 1, PyTorch 2, 10 runs" in lines
    rows = lines[lines.index(f"## {title}, 32x64") + 4 :]
    assert rows == [
        "| CPU | onnxruntime fp32 | bn | 12 | 20 | 80.64 |  | 100 |",
        "| CPU | onnxruntime fp32 | nd | 12 | 20 | 80.64 | 1.030 | 100 |",
        "| CPU | PyTorch eager fp32 | bn | 12 | 20 | 80.64 |  |  |",
    ]


@torch.inference_mode()
def test_rounding_to_int8() -> None:
    conv = torch.nn.Conv2d(1, 2, (1, 2), bias=False)
    conv.weight.copy_(torch.tensor([[1.27, 0.014], [-0.0, 0.0]]).reshape(2, 1, 1, 2))
    int8_twins.round_weights(conv)
    torch.testing.assert_close(conv.weight.flatten(1), torch.tensor([[1.27, 0.01], [0.0, 0.0]]))
    x = torch.tensor([[-1.0, 0.004, 0.013, 1.55]])  # 255 steps of 0.01
    read = []
    int8_twins.round_activations(conv)
    conv.register_forward_pre_hook(lambda _, args: read.append(args[0].flatten()))
    conv(x[None, None])
    torch.testing.assert_close(read[0], torch.tensor([-1.0, 0.0, 0.01, 1.55]))


# Rates on CamVid.


def camvid_run(folder: Path, lr: float, seed: int, last: float, epochs: int = 60) -> str:
    overrides = [f"train.lr={lr}", f"train.seed={seed}", "data.root=elsewhere"]
    recipe = load_recipe(entry_folder("unet_resnet18w32.nd_camvid") / "recipe.yaml", overrides)
    (make_folder(folder) / "recipe.yaml").write_text(recipe_to_yaml(recipe))
    for epoch in range(3, epochs + 1, 3):
        line = {"epoch": epoch, "step": 45 * epoch, "seconds": 1.0, "loss": 0.5, "miou": last}
        append_json_line(folder / "metrics.jsonl", line)
    return str(folder)


def test_rates_on_camvid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    make_folder(Path("docs/measured"))
    runs = [camvid_run(tmp_path / str(seed), 0.4, seed, 0.5 + seed / 10) for seed in range(2)]
    for arguments in ([*runs], [runs[0]], []):  # a run that is there already takes its own place
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        camvid_rates.main()
        row = "| unet_resnet18w32 | nd | 0.4 | 2 | 0.550 | 0.550 | 0.550 | 0.550 | 0.550 ± 0.050 |"
        assert row in capsys.readouterr().out.splitlines()
    lines = read_json_lines(camvid_rates.MEASURED)
    assert [(line["seed"], line["miou"][-1], line["steps"]) for line in lines] == [
        (0, 0.5, 2700),
        (1, 0.6, 2700),
    ]


def test_the_readme_has_the_best_of_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    best = camvid_rates.best_table(read_json_lines(camvid_rates.MEASURED))
    fresh = textwrap.indent(best, "  ") in Path("README.md").read_text()
    assert fresh, "README.md's first table is not what python tools/camvid_rates.py prints"


def test_runs_that_are_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    unfinished = camvid_run(tmp_path / "unfinished", 0.4, 0, 0.5, epochs=57)
    other = camvid_run(tmp_path / "other", 0.4, 0, 0.5)
    recipe = Path(other) / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("batch_size: 8", "batch_size: 4"))
    for run, says in ((unfinished, "has not finished"), (other, "no training of a CamVid entry")):
        monkeypatch.setattr(sys, "argv", ["tool", run])
        with pytest.raises(SystemExit):
            camvid_rates.main()
        assert says in capsys.readouterr().err


def test_the_best_of_rates() -> None:
    line = {"network": "n", "norm": "nd", "seed": 0, "lr": 0.1, "epochs": [12, 24, 36, 48, 60]}
    line |= {"miou": [0.1, 0.2, 0.3, 0.9, 0.5]}
    better = [{**line, "lr": 0.2, "seed": seed, "miou": [0.1] * 4 + [0.7 - 0.3 * seed]} for seed in range(2)]
    nd, bn = [line, *better], {**line, "norm": "bn"}
    both = [*nd, bn, {**bn, "lr": 0.05, "miou": [0.1] * 4 + [0.4]}]
    assert camvid_rates.best_rates(both) == {"n": {"bn": (0.5, 0.1), "nd": (pytest.approx(0.55), 0.2)}}
    assert "| n | 0.500 at 0.1 | 0.550 ± 0.150 at 0.2 |" in camvid_rates.best_table(both).splitlines()
    assert "in 1 of 1 networks on CamVid" in paper_page.rates_part(both)
    assert camvid_rates.best_rates([*nd, bn]) == {}  # one rate is no search
    assert "Not measured yet" in paper_page.rates_part([*nd, bn])


# Bad input.


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        (reproduce_table1, ["--pictures", "0"], "--pictures"),
        (reproduce_table1, ["--epochs", "0", "--networks"], "--epochs"),
        (reproduce_table1, ["--data", "nowhere", "--networks", "vgg16"], "nowhere"),
        (reproduce_linear, ["--data", "nowhere"], "nowhere"),
        (reproduce_linear, ["--lrs", "-1"], "--lrs"),
        (accuracy_vs_time, ["six_conv"], "data/cifar10/train: holds no CLASS/NAME.jpg"),
        (accuracy_vs_time, ["camvid"], "data/camvid"),
        (accuracy_vs_time, ["camvid", "--at-best"], "--at-best"),
        (accuracy_vs_time, ["six_conv", "--epochs", "0"], "--epochs"),
        (camvid_rates, [], "holds no run yet"),
        (camvid_rates, ["nowhere"], "nowhere"),
        (accuracy_vs_time, ["--figure", "curves.png"], "curves.png"),
        (accuracy_vs_time, ["--table", "--out", "runs.jsonl"], "runs.jsonl holds no run yet"),
        (bench_step, ["nonsense"], "nonsense"),
        (bench_step, ["--cycles", "0"], "--cycles"),
        (bench_step, ["--device", "abacus"], "abacus"),
        (bench_whitening, ["--channels", "0"], "--channels"),
        (gradient_by_sampling, ["--encoder", "nonsense"], "nonsense"),
        (bench_deploy, ["--device", "abacus"], "abacus"),
        (bench_deploy, ["--batch", "0"], "--batch"),
        (export_table, ["nonsense"], "nonsense"),
        (int8_twins, ["nonsense", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_sentence(
    tool: Any, arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as stopped:
        tool.main()
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("tool: error: ")
    assert says in last


# Networks of timm.


def test_networks_of_timm_are_converted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_timm.py", "lcnet_035", "efficientnet_cc_b0_4e"])
    with pytest.raises(SystemExit) as ended:
        convert_timm.main()
    out = capsys.readouterr().out
    assert not ended.value.code
    assert re.search(r"lcnet_035 +27 -> +0 +\S+e[-+]\d+ +\d+e-1\d", out)
    assert "efficientnet_cc_b0_4e                    refused: batch norms" in out
    assert out.endswith("1 networks stay what they were, 0 do not, 1 are refused\n")


def test_a_network_that_converts_wrongly_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_timm.py", "lcnet_035"])
    monkeypatch.setattr(
        convert_timm, "calibrate", lambda model, _: [p.data.mul_(1.01) for p in model.parameters()]
    )
    with pytest.raises(SystemExit) as ended:
        convert_timm.main()
    assert ended.value.code
    assert "0 networks stay what they were, 1 do not" in capsys.readouterr().out

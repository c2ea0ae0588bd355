"""Which segmentation architectures export to ONNX, and how well: writes docs/export.md.

    python tools/export_table.py                  # all of them, some 20 minutes on two cores
    python tools/export_table.py unet pspnet      # only these, printed

Every architecture is made with network deconvolution and with batch norm, folded and exported with any height
and width, and compared with PyTorch at three sizes that were not traced. Where that fails it is tried at one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import onnx
from bench_deploy import make

from segdeconv.errors import UserError, one_sentence
from segdeconv.export import export_onnx
from segdeconv.files import write_text
from segdeconv.interface import Interface
from segdeconv.markdown import markdown_table
from segdeconv.models import size_multiple
from segdeconv.models.segmentation import ARCHITECTURES

ENCODER = "resnet18"
_STATIC = (1, 224, 224)
_HEADER = [
    "architecture",
    "encoder",
    "exports",
    "any size",
    "multiple of",
    "largest difference",
    "nodes nd / bn",
]


def row(architecture: str) -> list[str]:
    """Cells of `_HEADER`, and a reason where something cannot be."""
    known = ARCHITECTURES[architecture]
    encoder = None
    if known.takes_encoder:
        encoder = known.default_encoder if architecture == "dpt" else ENCODER
    name = f"{architecture}_{encoder.removeprefix('tu-')}" if encoder else architecture
    nodes, worst, reason, multiple = [], 0.0, "", 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for norm in ("nd", "bn"):
            try:
                model, info = make(name, norm, _STATIC[1])
                multiple = size_multiple(model)
                try:
                    results = export_onnx(model, info, path, Interface(("logits",)))
                except UserError as error:
                    reason = reason or str(error).replace(f"{path}: ", "")
                    results = export_onnx(model, info, path, Interface(("logits",), static=_STATIC))
            except Exception as error:  # a row that says why is worth more than no table
                return [architecture, encoder or "", "no", "", str(multiple), "", "", str(error)]
            worst = max(worst, *(result.max_diff for result in results))
            nodes.append(len(onnx.load(path).graph.node))
    any_size = "yes" if not reason else f"no, {_STATIC[1]}x{_STATIC[2]} only"
    counts = " / ".join(map(str, nodes))
    return [architecture, encoder or "", "yes", any_size, str(multiple), f"{worst:.0e}", counts, reason]


def page(rows: list[list[str]]) -> str:
    """docs/export.md."""
    lines = [
        "# What exports to ONNX",
        "",
        "Written by `python tools/export_table.py`, which says how. The largest difference is of logits, "
        "over the largest logit, at three sizes and three batch sizes; export refuses more than 1e-4, unless "
        "PyTorch's own float32 is less exact than that. A graph takes any batch, height and width, the "
        "latter two in multiples of the number given (--preprocess graph pads). PAN pools its deepest map "
        "three times: below 113 pixels a side PyTorch refuses it, and onnxruntime puts out labels that mean "
        "nothing.",
        "",
        markdown_table(_HEADER, (cells[:-1] for cells in rows)),
    ]
    reasons = [
        f"- {cells[0]}{', any size' if cells[2] == 'yes' else ''}: {cells[-1]}" for cells in rows if cells[-1]
    ]
    return "\n".join([*lines, *reasons, ""] if reasons else lines)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", choices=[*ARCHITECTURES, []], metavar="ARCHITECTURE")
    options = parser.parse_args()
    rows = []
    for architecture in options.architectures or ARCHITECTURES:
        rows.append(row(architecture))
        print(" | ".join(rows[-1]), flush=True)
    if not options.architectures:
        out = Path("docs/export.md")
        write_text(out, page(rows))
        print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""Run the official Cityscapes evaluation, csEvalPixelLevelSemanticLabeling, unchanged, also with new NumPy.

    CITYSCAPES_DATASET=TREE CITYSCAPES_RESULTS=PREDICTIONS python tools/cityscapes_official_evaluation.py

Its release 2.3.0 calls numpy.in1d, which NumPy 2.4 took out; it is put back here, and the script run as it is
installed. It scores gtFine/val and leaves TREE/evaluationResults/resultPixelLevelSemanticLabeling.json.
"""

from __future__ import annotations

import argparse
import runpy

import numpy as np

if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=form).parse_args()
    if not hasattr(np, "in1d"):
        np.in1d = np.isin  # type: ignore[attr-defined]  # noqa: NPY201 - the script reshapes what it gets
    runpy.run_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling", run_name="__main__")

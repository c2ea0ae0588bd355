"""Write the zoo's table into the README, between its markers: python tools/zoo_table.py"""

from __future__ import annotations

import argparse
from pathlib import Path

from segdeconv.entries import listed, markdown

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- zoo: python tools/zoo_table.py -->\n", "<!-- end of zoo -->\n"


def with_table(text: str) -> str:
    """The README's text with the table as it should be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{markdown(listed())}{END}{after}"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    README.write_text(with_table(README.read_text()))

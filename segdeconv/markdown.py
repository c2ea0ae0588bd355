"""Tables in Markdown."""

import re
from collections.abc import Iterable, Sequence


def escaped(text: str) -> str:
    """A name that is to stand in Markdown as it is."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)


def markdown_table(
    titles: Sequence[object], rows: Iterable[Sequence[object]], numbers_from: int | None = None
) -> str:
    """A table, each of its lines ended. Columns ``numbers_from`` and on are set to the right."""
    text = len(titles) if numbers_from is None else numbers_from
    first, *others = (f"| {' | '.join(map(str, cells))} |\n" for cells in (titles, *rows))
    rule = "|---" * text + "|---:" * (len(titles) - text) + "|\n"
    return "".join([first, rule, *others])

"""The exceptions for what a user can mend: a wrong path, key, value or file; and for what was refused."""

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one sentence that names the file or value, what was expected and what to do.

    The command line prints it and exits with code 2, without a traceback.
    """


class Refused(UserError):
    """What was asked for was made, measured and found wanting, so it was not written.

    The command line exits with code 3.
    """


def first_line(error: BaseException) -> str:
    """An error's message, cut to one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


_SHORT_OF = {
    "(unable to allocate|out of) shared memory": "lower data.num_workers, or make /dev/shm larger",
    "Too many open files|received 0 items of ancdata": "raise ulimit -n, or lower data.num_workers",
    "failed to map segment from shared object": "memory ran out, or it lies where no programs run (noexec)",
    r"DataLoader worker \(pid.*?(killed by signal: [\w ]+|exited unexpectedly)": (
        "if memory ran out, lower data.num_workers; segdeconv train --resume goes on with a run"
    ),
}
_NO_MEMORY = re.compile("[Cc]an(no|')t allocate memory|out of memory|bad_alloc|_ArrayMemoryError")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: a GPU's, or the computer's, of which torch says so in words only."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or bool(_NO_MEMORY.search(str(error)))


def shortage(error: Exception) -> str | None:
    """The sentence for an error that says what the machine has too little of; None for any other. torch
    reports lost processes of a loader in words only, at whatever line the program is.
    """
    for words, advice in _SHORT_OF.items():
        if found := re.search(words, str(error)):
            return f"{found[0]}; {advice}"
    if out_of_memory(error):
        return (
            "the memory ran out; take smaller pictures, windows or batches (--window, data.crop, "
            "train.batch_size), or fewer data.num_workers"
        )
    return None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a sentence about a name that is unknown: what is near to it, or else ``otherwise``."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {by_lower[near[0]]!r}?" if near else otherwise


_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


def printable(text: str) -> str:
    """Text for a terminal, which would obey what names of files and classes may hold."""
    return text.translate(_CONTROL)


def as_utf8(text: str) -> str:
    """Text for what takes UTF-8 alone, which names of files and classes need not be."""
    return text.encode(errors="backslashreplace").decode()


def sentence_of(error: Exception) -> str:
    """An error's sentence: from a loader's process it arrives as a whole traceback, the sentence last."""
    message = str(error).strip()
    if message.startswith("Caught "):
        return message.splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")
    return " ".join(message.split())


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Around a program: a `UserError` becomes a line on standard error and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {printable(sentence_of(error))}", file=sys.stderr)
        sys.exit(2)

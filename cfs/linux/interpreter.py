"""Programs of our own that a Python interpreter runs, started with exec.

Without ``site`` and environment (``-I -S``) an interpreter starts in 10 ms; where modules are, its
starter tells it.
"""

import os
import sys

__all__ = ["command"]


def command(statement: str, *words: str) -> list[str]:
    """Return the command that runs a statement, with ``sys.argv[1:]`` being the words."""
    # cfs may be where a finder of the starter knows it; "" is not where we want modules from
    places = [os.path.dirname(__file__) + "/../..", *(path for path in sys.path if path)]
    paths = list(dict.fromkeys(os.path.abspath(path) for path in places))
    start = f"import os, sys\nsys.path += sys.argv[{len(words) + 1}:]\n{statement}"
    return [sys.executable, "-I", "-S", "-c", start, *words, *paths]

"""Time from an image to its checked vector and its dump, beside C's ``composefs-info dump``.

Usage: python bench/reader.py [IMAGE] [--rounds N]

Without IMAGE one is written from a generated dump of 64,000 lines.  The C tool is looked for
in the directory named by the environment variable CFS_C_TOOLS, then on PATH.
"""

import argparse
import tempfile
import time
from pathlib import Path

from generate_dump import generate
from side_by_side import c_tool, print_rows, time_command

from cfs.dumpfile import format_vector, parse_dumpfile
from cfs.erofs.images import View, open_image
from cfs.erofs.writer import write_image


def time_ours(image: Path) -> tuple[float, float]:
    """Return the seconds that reading and printing take."""
    start = time.perf_counter()
    vector = open_image(image, view=View.TREE)
    opened = time.perf_counter()
    for _ in format_vector(vector):
        pass
    return opened - start, time.perf_counter() - opened


def main() -> None:
    """Print the best time of each step."""
    parser = argparse.ArgumentParser(description="time the image reader")
    parser.add_argument("image", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        image = arguments.image or Path(directory, "image")
        if not arguments.image:
            image.write_bytes(write_image(parse_dumpfile(generate())))
        rounds = [time_ours(image) for _ in range(arguments.rounds)]
        rows = {
            "open and check": min(each[0] for each in rounds),
            "print the dump": min(each[1] for each in rounds),
            "both": min(each[0] + each[1] for each in rounds),
        }
        tool = c_tool("composefs-info")
        c_seconds = None
        if tool:
            command = [tool, "dump", str(image)]
            c_seconds = min(time_command(command) for _ in range(arguments.rounds))
    print_rows(rows, "composefs-info dump", c_seconds)


if __name__ == "__main__":
    main()

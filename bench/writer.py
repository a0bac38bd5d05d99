"""Time from a dumpfile to its image, beside the C tool ``mkcomposefs`` if there is one.

Usage: python bench/writer.py [DUMPFILE] [--rounds N]

Without DUMPFILE one of 64,000 lines is generated.  The C tool is looked for in the directory
named by the environment variable CFS_C_TOOLS, then on PATH.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

from generate_dump import generate
from side_by_side import c_tool, print_rows, time_command

from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import write_image


def time_ours(dump: bytes) -> tuple[float, float, bytes]:
    """Return the seconds that parsing and writing take, and the image."""
    start = time.perf_counter()
    root = parse_dumpfile(dump)
    parsed = time.perf_counter()
    image = write_image(root)
    return parsed - start, time.perf_counter() - parsed, bytes(image)


def main() -> None:
    """Print the best time of each step."""
    parser = argparse.ArgumentParser(description="time the image writer")
    parser.add_argument("dumpfile", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    dump = arguments.dumpfile.read_bytes() if arguments.dumpfile else generate()
    gc.disable()  # as mkcomposefs does
    rounds = [time_ours(dump) for _ in range(arguments.rounds)]
    rows = {
        "parse the dumpfile": min(each[0] for each in rounds),
        "write the image": min(each[1] for each in rounds),
        "both": min(each[0] + each[1] for each in rounds),
    }
    tool = c_tool("mkcomposefs")
    c_seconds = None
    if tool:
        with tempfile.TemporaryDirectory() as directory:
            source, image = Path(directory, "dump"), Path(directory, "image")
            source.write_bytes(dump)
            command = [tool, "--from-file", str(source), str(image)]
            c_seconds = min(time_command(command) for _ in range(arguments.rounds))
            if image.read_bytes() != rounds[0][2]:
                raise SystemExit("the images differ")
    print_rows(rows, "mkcomposefs", c_seconds)


if __name__ == "__main__":
    main()

"""An importer of the test of gc under load: a process that runs this file.

Arguments: store, working directory, own number.  Each round stores an image under a name and one
without, checks all images that it has named so far, and prints a line.  Ends with its stdin.
"""

import io
import os
import select
import sys
from contextlib import redirect_stdout
from pathlib import Path

from cfs.cli.cfsctl import run
from cfs.digest import Digest
from cfs.repository.repository import Repository

NR_NAMES = 5


def cfsctl(store: str, *arguments: str) -> str:
    with redirect_stdout(io.StringIO()) as output:
        status = run(["--repo", store, *arguments])
    if status:
        raise SystemExit(f"{arguments}: status {status}")
    return output.getvalue().strip()


def write_tree(directory: Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
    for number in range(3):
        (directory / str(number)).write_text(f"{text} {number} " * 40)
    (directory / "shared").write_text("in every image, of every importer " * 10)


def check_images(store: str, images: dict[str, str]) -> None:
    for name, digest in images.items():
        objects = cfsctl(store, "image-objects", f"refs/{name}").split()
        if len(objects) != 4:
            raise SystemExit(f"{name}: {len(objects)} objects")
        with Repository.open(store) as repository:
            if os.readlink(Path(store, "images/refs", name)).rpartition("/")[2] != digest:
                raise SystemExit(f"{name} leads to another image")
            for text in objects:
                os.close(repository.objects.open_object(Digest.parse(text.partition(":")[2])))


def main() -> None:
    store, work, number = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    images: dict[str, str] = {}
    nr_rounds = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        name = f"importer-{number}/{nr_rounds % NR_NAMES}"
        write_tree(work / "named", f"{number} {nr_rounds}")
        write_tree(work / "garbage", f"garbage {number} {nr_rounds}")
        create = ("create-image", "--no-propagate-usr-to-root")
        images[name] = cfsctl(store, *create, str(work / "named"), name).partition(":")[2]
        cfsctl(store, *create, str(work / "garbage"))
        check_images(store, images)
        nr_rounds += 1
        sys.stdout.write("round\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

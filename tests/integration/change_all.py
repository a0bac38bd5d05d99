"""Change every file below a directory: write to it, change its mode and times, rename it.

A program, so that it can run in a user namespace; prints the paths that it has changed, as JSON.
"""

import json
import os
import stat
import sys

_OVERFLOW_UID = 65534


def change_all(top: str) -> list[str]:
    changed = []
    for directory, names, files in os.walk(top):
        # a directory of the image cannot be renamed, only copied; see test_overlay_mode
        for name in names:
            os.chmod(os.path.join(directory, name), 0o711, follow_symlinks=True)
        for name in files:
            path = os.path.join(directory, name)
            found = os.lstat(path)
            # nobody whom we could give it to has this number in our name space
            if found.st_uid == _OVERFLOW_UID:
                continue
            if stat.S_ISREG(found.st_mode):
                with open(path, "ab") as file:
                    file.write(b"more")
                os.chmod(path, 0o641)
                os.utime(path, (1, 1))
            os.rename(path, f"{path}.renamed")
            changed.append(os.path.relpath(path, top))
    return sorted(changed)


if __name__ == "__main__":
    json.dump(change_all(sys.argv[1]), sys.stdout)

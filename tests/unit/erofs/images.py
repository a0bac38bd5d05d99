"""Images for the tests of the reader."""

from functools import cache

import zstandard

from cfs.dumpfile import parse_dumpfile
from cfs.erofs.writer import write_image
from tests.paths import DATA

DIGEST = "35d02f81325122d77ec1d11baba655bc9bf8a891ab26119a41c50fa03ddfb408"
DUMP = f"""/ 0 40755 2 0 0 0 0.0 - - - security.selinux=label
/big 4500 100644 1 0 0 0 7.5 - {"x" * 4500} - user.a=1
/dir 0 40755 2 70000 1 0 1.0 - - - trusted.overlay.opaque=y user.overlay.whiteouts=
/dir/deep 0 40755 2 0 0 0 1.0 - - - security.selinux=label
/dir/deep/er 0 40755 2 0 0 0 1.0 - - - security.selinux=label
/dir/deep/er/file 5 100644 1 0 0 0 1.0 - hello - user.name=value user.other=value
/dir/link 5 120777 1 0 0 0 1.0 ../up - - system.posix_acl_access=
/dir/long {4090} 120777 1 0 0 0 1.0 {"t" * 4090} - -
/external 100000 100644 2 0 0 0 7.0 {DIGEST[:2]}/{DIGEST[2:]} - {DIGEST} security.selinux=label
/fifo 0 10644 1 0 0 0 7.0 - - - trusted.a=b lustre.b=c
/same 0 @100644 1 0 0 0 0.0 /external - -
/sparse 70000 100644 1 0 0 0 7.0 - - -
/zero 0 20644 1 0 0 259 7.0 - - - security.selinux=label
"""
MANY = "".join(f"/many/{n:03}-name 0 100644 1 0 0 0 0.0 - - -\n" for n in range(400))
WHITEOUT = "/wh 0 40755 2 0 0 0 0.0 - - -\n/wh/gone 0 20644 1 0 0 0 0.0 - - -\n"


@cache
def load_zst(name: str) -> bytes:
    """The content of a compressed file in tests/data/images."""
    packed = (DATA / "images" / name).read_bytes()
    return zstandard.ZstdDecompressor().decompressobj().decompress(packed)


@cache
def seeds() -> list[bytes]:
    """Valid images to start from, small ones of all formats first."""
    directory = "/many 0 40755 2 0 0 0 0.0 - - -\n" + MANY
    in_v2 = "\n".join(
        line for line in DUMP.splitlines() if not line.startswith(("/big ", "/dir/long "))
    )
    images = []
    for version in range(3):
        text = DUMP if version < 2 else in_v2 + "\n"
        for dump in (text + WHITEOUT, text + directory):
            tree = parse_dumpfile(dump.encode())
            images.append(bytes(write_image(tree, min_version=version, max_version=version)))
    return [*images, load_zst("kinds.cfs.zst")]

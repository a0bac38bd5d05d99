"""cffi builder of ``cfs.fuse._worker``, the data plane.

setuptools runs it through ``cffi_modules`` in setup.py.  What Python sees of the worker is
declared once, in the headers: the lines above "C only", without those of the preprocessor, are
read by cffi as well.  API mode: the interpreter lock is released around every call.  Run by
itself it builds the extension in place.
"""

import shutil
import tempfile
from pathlib import Path

from cffi import FFI  # type: ignore[import-untyped] # cffi ships no types

_WORKER = Path(__file__).parent / "worker"
_HEADERS = ("table.h", "worker.h")


def _declarations(header: str) -> str:
    """Return the part of a header that cffi reads."""
    shared, _, _ = (_WORKER / header).read_text().partition("/* C only */")
    return "\n".join(line for line in shared.splitlines() if not line.startswith("#"))


ffibuilder = FFI()
ffibuilder.cdef("\n".join(_declarations(header) for header in _HEADERS))
ffibuilder.set_source(
    "cfs.fuse._worker",
    "\n".join(f'#include "{header}"' for header in _HEADERS),
    sources=sorted(str(path) for path in _WORKER.glob("*.c")),
    depends=sorted(str(path) for path in _WORKER.glob("*.h")),
    include_dirs=[str(_WORKER)],
    libraries=["fsverity"],
    extra_compile_args=["-std=gnu11", "-O2", "-fvisibility=hidden", "-pthread"],
    extra_link_args=["-pthread"],
)

if __name__ == "__main__":
    # elsewhere, so that no settings of the project are read: any setuptools will do
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(ffibuilder.compile(scratch), _WORKER.parent)

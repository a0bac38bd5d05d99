"""Directories of objects: files named by their fs-verity digest, ``xx/rest``.

The one place that reads and writes objects, those of a repository (``objects/``) as well as
those of ``mkcomposefs --digest-store`` (spec repository 2).
"""

from cfs.objectdir.imports import Method
from cfs.objectdir.objects import ObjectDirectory
from cfs.objectdir.temporary import TEMPORARY_PREFIX
from cfs.objectdir.verity import Verity
from cfs.objectdir.writer import ObjectWriter

__all__ = ["TEMPORARY_PREFIX", "Method", "ObjectDirectory", "ObjectWriter", "Verity"]

"""Builds the cffi extensions; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["cfs/fsverity/_build.py:ffibuilder", "cfs/fuse/_build.py:ffibuilder"])

"""Laying out the authors' folders that come with the tests."""

import gzip
from pathlib import Path


def lay_out(source: Path, target: Path) -> None:
    """Links a folder's files into another one; packed ones (``.gz``) are unpacked there."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix == ".gz":
            (target / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            (target / file.name).symlink_to(file)

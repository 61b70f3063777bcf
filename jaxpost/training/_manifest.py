"""Checksums of a finished checkpoint, so that a flipped bit is found in time."""

import hashlib
import json
import os
import pathlib

NAME = "manifest.json"


def write_manifest(folder: pathlib.Path) -> None:
    """Writes size and SHA-256 of every file of a complete checkpoint, by one rename."""
    files = {
        str(file.relative_to(folder)): {
            "bytes": file.stat().st_size,
            "sha256": _sha(file),
        }
        for file in _files(folder)
    }
    part = folder / f"{NAME}.tmp"
    part.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / NAME)


def find_damage(folder: pathlib.Path) -> str | None:
    """What in a checkpoint is not as it was written, or None.

    A checkpoint without a manifest (the process was killed before it wrote one) is
    complete all the same, only not checked.
    """
    manifest = folder / NAME
    if not manifest.exists():
        return None
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{NAME} cannot be read: {error}"
    for name, wanted in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"
        if _sha(file) != wanted["sha256"]:
            return f"{name} has another checksum than when it was saved"
    return None


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    skipped = (NAME, f"{NAME}.tmp")
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and str(file.relative_to(folder)) not in skipped
    )


def _sha(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

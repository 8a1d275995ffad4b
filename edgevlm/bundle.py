"""A bundle: the folder that a converter writes and the runtime loads.

`bundle.json` is the commit record. It is written last and atomically, names every file with size and sha256, and
carries the resolved `ModelSpec`. A file that it does not name does not exist; a file that differs is not loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgevlm import spec as specs
from edgevlm.errors import BundleError, FileError
from edgevlm.files import open_regular
from edgevlm.spec import ModelSpec

MANIFEST_NAME = "bundle.json"
FORMAT = 1
BUILTIN = Path(__file__).parent / "builtin"

Role = Literal["decoder", "encoder", "encoder-data"]
# Names are plain so that no manifest can point outside its folder, on any file system.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST_LIMIT_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a bundle: `size` in bytes, `sha256` as 64 lower-case hex digits."""

    name: str
    size: int
    sha256: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `bundle.json`.

    `provenance` says where the weights came from and how they were converted, `fidelity` what that cost (measured).
    """

    format: int
    spec: ModelSpec
    files: tuple[FileEntry, ...]
    provenance: dict[str, Any]
    fidelity: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose files have all been checked."""

    folder: Path
    manifest: Manifest

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec

    def path(self, role: Role) -> Path:
        return self.folder / next(entry.name for entry in self.manifest.files if entry.role == role)


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write `bundle.json` atomically, as the last act of a conversion. Returns its path."""
    from edgevlm.storage import atomic_write

    document = {
        "format": manifest.format,
        "spec": specs.to_json(manifest.spec),
        "files": [specs.to_json(entry) for entry in manifest.files],
        "provenance": manifest.provenance,
        "fidelity": manifest.fidelity,
    }
    path = folder / MANIFEST_NAME
    atomic_write(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def open_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Open a bundle folder and check every file against its manifest.

    Raises:
        FileError: the folder has no `bundle.json`.
        BundleError: the manifest cannot be understood, or a file is missing or differs from it.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest.files)
    return Bundle(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `bundle.json` alone, without looking at the files that it names."""
    path = folder / MANIFEST_NAME
    if not os.path.lexists(path):
        raise FileError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME}; make one with `edgevlm convert CHECKPOINT OUT`",
            code="file.not_found",
        )
    with open_regular(path) as (file, _size):
        raw = file.read(_MANIFEST_LIMIT_BYTES + 1)
    if len(raw) > _MANIFEST_LIMIT_BYTES:
        raise _invalid(f"it is larger than {_MANIFEST_LIMIT_BYTES >> 20} MiB")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _invalid(f"it is not JSON ({error})") from error
    found = document.get("format") if isinstance(document, dict) else None
    if type(found) is int and found != FORMAT:
        raise BundleError(
            f"{path} has format {found}, this edgevlm reads format {FORMAT}; "
            + ("update edgevlm" if found > FORMAT else "convert the checkpoint again"),
            code="bundle.version",
        )
    manifest = specs.from_json(Manifest, document, MANIFEST_NAME)
    _check_names(manifest)
    return manifest


def _check_names(manifest: Manifest) -> None:
    names = [entry.name for entry in manifest.files]
    roles = [entry.role for entry in manifest.files]
    for entry in manifest.files:
        if not _PLAIN_NAME.fullmatch(entry.name) or entry.name == MANIFEST_NAME:
            raise _invalid(f"{entry.name!r} is not a plain file name")
        if not _SHA256.fullmatch(entry.sha256) or entry.size < 0:
            raise _invalid(f"size or sha256 of {entry.name} is malformed")
    if len({name.lower() for name in names}) != len(names) or len(set(roles)) != len(roles):
        raise _invalid("a file name or role appears twice")
    by_role = {entry.role: entry.name for entry in manifest.files}
    spec = manifest.spec
    sees = spec.encoder is not None
    if sees != (spec.image is not None) or sees != (spec.prompt.image_token is not None):
        raise _invalid("image, encoder and image_token must be there together or not at all")
    needed: tuple[Role, ...] = ("decoder", "encoder", "encoder-data") if sees else ("decoder",)
    for role in needed:
        if role not in by_role:
            raise _invalid(f"no file has the role {role}")
    if len(by_role) != len(needed):
        raise _invalid("it names an encoder but describes none")
    if not sees:
        return
    # The graph itself names its data file; under any other name, what was checked would not be what is read.
    if by_role["encoder-data"] != by_role["encoder"] + ".data":
        raise _invalid(f"the encoder's data must be named {by_role['encoder']}.data")


def _check_files(folder: Path, entries: tuple[FileEntry, ...]) -> None:
    """Each file in a thread of its own: to hash a gigabyte takes a processor without SHA instructions over two seconds,
    longer than to load it."""
    failures: dict[int, BaseException] = {}

    def check(number: int) -> None:
        try:
            _check_file(folder, entries[number])
        except BaseException as error:  # raised below, in the caller's thread
            failures[number] = error

    others, here = [], [0]
    for number in range(1, len(entries)):
        thread = threading.Thread(target=check, args=(number,))
        try:
            thread.start()
        except RuntimeError:  # no room for its stack (`ulimit -v`)
            here.append(number)
        else:
            others.append(thread)
    for number in here:
        check(number)
    for thread in others:
        thread.join()
    if failures:
        raise failures[min(failures)]


def _check_file(folder: Path, entry: FileEntry) -> None:
    path = folder / entry.name
    if not path.is_file():
        raise BundleError(
            f"{path} is missing although {MANIFEST_NAME} names it; copy the whole folder again",
            code="bundle.missing_file",
        )
    with open_regular(path) as (file, size):
        digest = hashlib.file_digest(file, "sha256").hexdigest() if size == entry.size else ""
    if size != entry.size:
        what = f"it has {size} bytes instead of {entry.size}"
    elif digest != entry.sha256:
        what = "its content differs (sha256)"
    else:
        return
    raise BundleError(
        f"{path} does not match {MANIFEST_NAME}: {what}; copy or convert it again", code="bundle.hash_mismatch"
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file as hex digits, read in a stream."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _invalid(what: str) -> BundleError:
    return BundleError(f"{MANIFEST_NAME} cannot be used: {what}; convert the checkpoint again", code="bundle.invalid")

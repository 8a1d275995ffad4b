"""What of a folder in work is finished, so that a killed process need not begin again.

The records lie in the lock file beside the folder (`storage.commit_folder`), one line of JSON for each finished step
behind the line with the key. A step counts as finished if its line is whole and each of its files has the recorded
hash: a power cut may lose pages of a file that was written before its record.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgevlm.bundle import sha256_of
from edgevlm.storage import storage_errors

_LINE_LIMIT_BYTES = 4 << 20


class Journal:
    """The records of one folder in work. Everything in the folder that no record names is removed.

    Args:
        building: The folder that `commit_folder` yields.
    """

    def __init__(self, building: Path) -> None:
        self._building, self._path = building, building.with_suffix(".lock")
        #: sha256 of every finished file, by name.
        self.hashes: dict[str, str] = {}
        with storage_errors(self._path):
            self._records = self._read()
            named = {name for record in self._records.values() for name in record["files"]}
            for path in building.iterdir():
                if path.name not in named:
                    _remove(path)

    def step(self, name: str, files: tuple[str, ...], work: Callable[[], Any]) -> Any:
        """Do a step unless it is finished.

        Args:
            name: Of the step.
            files: Names of the files in the folder that it makes.
            work: Makes them; none of them exists when it is called.

        Returns:
            What `work` returned, now or then: values that JSON keeps.

        Raises:
            StorageError: the disk is full or refuses.
        """
        record = self._records.get(name)
        if record is not None and tuple(record["files"]) == files and self._holds(record["files"]):
            self.hashes |= record["files"]
            return record["value"]
        with storage_errors(self._path):
            for file in files:
                _remove(self._building / file)
        value = work()
        with storage_errors(self._path):
            record = {"step": name, "files": {f: sha256_of(self._building / f) for f in files}, "value": value}
            with open(self._path, "ab") as journal:
                journal.write(json.dumps(record).encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
        self.hashes |= record["files"]
        return value

    def _holds(self, files: dict[str, str]) -> bool:
        paths = {self._building / name: digest for name, digest in files.items()}
        return all(
            path.is_file() and not path.is_symlink() and sha256_of(path) == digest for path, digest in paths.items()
        )

    def _read(self) -> dict[str, dict[str, Any]]:
        """Records up to the first line that is not whole, which is cut off with all that follows."""
        found: dict[str, dict[str, Any]] = {}
        end = 0
        with open(self._path, "r+b") as file:
            file.readline(_LINE_LIMIT_BYTES)  # the key
            end = file.tell()
            while line := file.readline(_LINE_LIMIT_BYTES):
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except (ValueError, RecursionError):
                    record = None
                if record is None or not _is_record(record):
                    break
                found[record["step"]], end = record, file.tell()
            file.truncate(end)
        return found


def _is_record(value: Any) -> bool:
    """Whether a line says what a step made: its name, and the sha256 of files that lie in the folder itself."""
    if not isinstance(value, dict) or set(value) != {"step", "files", "value"} or type(value["step"]) is not str:
        return False
    files = value["files"]
    return isinstance(files, dict) and all(type(d) is str and os.path.basename(n) == n for n, d in files.items())


def _remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

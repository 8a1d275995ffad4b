"""Files that show when they are not whole, and the folder that holds them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgevlm.blob import Shelf, read_blob, write_blob
from edgevlm.errors import StorageError

HEADER = {"kind": "test", "identity": "a", "shape": [2, 3]}
PAYLOAD = bytes(random.Random(0).randbytes(9000))


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    write_blob(tmp_path / "x", HEADER, PAYLOAD)
    return tmp_path / "x"


def is_found(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    return read_blob(path, {"kind": "test"}) is not None


def test_what_was_written_is_read_and_private(blob: Path) -> None:
    found = read_blob(blob, {"identity": "a", "shape": [2, 3]})
    assert found is not None
    assert (found[0], bytes(found[1])) == (HEADER, PAYLOAD)
    assert blob.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "identity", [{"identity": "b"}, {"shape": [3, 2]}, {"kind": "state"}, {"new": None, "kind": 1}]
)
def test_what_belongs_to_something_else_is_not_found(blob: Path, identity) -> None:
    assert read_blob(blob, identity) is None


def test_every_damage_is_seen(blob: Path, tmp_path: Path) -> None:
    whole, other = blob.read_bytes(), tmp_path / "other"
    assert is_found(other, whole)
    for length in [*range(64), *range(64, len(whole), 512), len(whole) - 1]:
        assert not is_found(other, whole[:length]), length
    for position in [*range(120), *range(120, len(whole), 61)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        assert not is_found(other, bytes(damaged)), position
    for start in range(0, len(whole), 4096):  # a page that never reached the disk
        assert not is_found(other, whole[:start] + bytes(len(whole[start : start + 4096])) + whole[start + 4096 :])
    assert not is_found(other, whole + b"\0")
    assert not is_found(other, b"")


def test_lies_with_a_right_checksum_are_seen(tmp_path: Path) -> None:
    import hashlib

    def forged(text: bytes, n_header: int | None = None, magic: bytes = b"EVLMBLB1") -> bytes:
        body = magic + (len(text) if n_header is None else n_header).to_bytes(4, "little") + text + b"payload"
        return body + hashlib.blake2b(body, digest_size=32).digest()

    path = tmp_path / "x"
    assert is_found(path, forged(b'{"kind": "test"}'))
    for data in (
        forged(b'{"kind": "test"}', n_header=2**32 - 1),
        forged(b'{"kind": "test"}', n_header=5000),
        forged(b'{"kind": "test"}', magic=b"EVLMBLB2"),
        forged(b'["kind", "test"]'),
        forged(b"[" * 100_000),
        forged(b'{"kind": "test"'),
        forged(b"\xff\xfe"),
    ):
        assert not is_found(path, data)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert read_blob(tmp_path / "folder", {}) is None
    assert read_blob(tmp_path / "pipe", {}) is None
    assert read_blob(tmp_path / "missing", {}) is None


def test_the_longest_unused_goes_first_and_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "shelf", limit_bytes=(1 << 20) + 40_000)
    for number in range(3):
        shelf.put(str(number), HEADER, PAYLOAD)
        os.utime(shelf.folder / str(number), (number, number))
    assert shelf.get("0", {}) is not None  # used: now the youngest
    shelf.put("3", HEADER, PAYLOAD)
    shelf.put("4", HEADER, PAYLOAD)
    names = {path.name for path, _, _ in shelf.entries()}
    assert "1" not in names
    assert {"0", "4"} <= names
    with pytest.raises(StorageError, match="may take"):
        shelf.put("huge", HEADER, bytes(1 << 20))
    assert shelf.get("huge", {}) is None
    assert shelf.clear() > 0
    assert shelf.entries() == []


def test_what_cannot_be_used_is_removed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, limit_bytes=1 << 30)
    shelf.put("x", HEADER, PAYLOAD)
    assert shelf.get("x", {"identity": "b"}) is None
    assert shelf.entries() == []


def test_a_place_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Shelf(tmp_path / "file" / "shelf", limit_bytes=1 << 30).put("x", HEADER, PAYLOAD)
    assert Shelf(tmp_path / "file" / "shelf", limit_bytes=1 << 30).get("x", HEADER) is None


WRITER = """
import random, sys
from edgevlm.blob import Shelf
shelf, seed = Shelf(__import__("pathlib").Path(sys.argv[1]), 1 << 30), int(sys.argv[2])
print("ready", flush=True)
for number in range(10**6):
    name = f"{random.Random(seed + number).randrange(8)}"
    shelf.put(name, {"round": seed, "number": number}, random.Random(seed + number).randbytes(200_000))
    print(number, name, flush=True)
"""


def test_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    shelf, moments, n_acked = Shelf(tmp_path, 1 << 30), random.Random(1), 0
    for seed in range(0, 50_000, 1000):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(moments.uniform(0, 0.05))
            child.send_signal(signal.SIGKILL)
            acked = [line.split() for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        n_acked += len(acked)
        last = {name: int(number) for number, name in acked}
        for name, number in last.items():
            found = read_blob(tmp_path / name, {"round": seed})
            assert found is not None  # acknowledged, so it is there
            assert found[0]["number"] >= number
        for path, _, _ in shelf.entries():
            found = read_blob(path, {})
            assert found is not None  # nothing is ever torn
            assert bytes(found[1]) == random.Random(found[0]["round"] + found[0]["number"]).randbytes(200_000)
    assert n_acked > 50
    shelf.put("last", {}, b"")
    assert list(tmp_path.glob(".*.tmp")) == []

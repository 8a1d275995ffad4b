"""A conversion that ends early leaves nothing; a file or folder that is there is complete."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import tiny
from tiny import Variant

from edgevlm import storage
from edgevlm.bundle import open_bundle
from edgevlm.converters import convert
from edgevlm.errors import StorageError

LARGER = Variant(hidden=256, n_ff=512)  # a decoder of 5 MB, so that limits can lie inside it


def python(code: str, *arguments: object) -> list[str]:
    """A command that runs Python code in a process of its own; it finds its arguments in `sys.argv[1:]`."""
    return [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]


def output_of(code: str, *arguments: object) -> str:
    done = subprocess.run(python(code, *arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


CONVERT = """
    import json, resource, sys
    from edgevlm import errors
    from edgevlm.converters import convert
    folder, out, limit = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        convert(folder, out, decoder_quant="q8_0")
        print(json.dumps(["done", ""]))
    except errors.EdgeVLMError as error:
        print(json.dumps([error.code, str(error)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [4096, 300_000, 1_000_000])
def test_a_full_disk_leaves_nothing(tmp_path, limit):
    """RLIMIT_FSIZE stops the hollow file, the decoder and the encoder in turn."""
    code, message = json.loads(output_of(CONVERT, tiny.shared(LARGER)[0], tmp_path / "out", limit))
    assert code == "storage.full", message
    assert "no room" in message
    assert "MB" in message
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1_000_000}))
    steps = []
    with pytest.raises(StorageError, match=r"needs .* MB, 1.0 MB are free") as caught:
        convert(tiny.shared(Variant())[0], tmp_path / "deep" / "out", report=steps.append)
    assert caught.value.code == "storage.full"
    assert len(steps) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exception", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError])
@pytest.mark.parametrize("step", ["decoder", "encoder", "committing"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, step, exception):
    def interrupt(line):
        if line.startswith(step):
            raise exception

    with pytest.raises(exception):
        convert(tiny.shared(Variant())[0], tmp_path / "out", report=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["decoder", "committing"])
def test_an_interrupted_replacement_leaves_the_old_bundle(tmp_path, step):
    convert(tiny.shared(Variant())[0], tmp_path / "out", decoder_quant="f16")

    def interrupt(line):
        if line.startswith(step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tiny.shared(Variant())[0], tmp_path / "out", decoder_quant="f32", overwrite=True, report=interrupt)
    assert open_bundle(tmp_path / "out").manifest.provenance["arguments"]["decoder_quant"] == "f16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


LOOP = """
    import sys
    from edgevlm.converters import convert
    for i in range(1000):
        convert(sys.argv[1], sys.argv[2], decoder_quant="q8_0", overwrite=True)
        print(i, flush=True)
"""


@pytest.mark.slow
def test_a_killed_conversion_never_leaves_a_part(tmp_path):
    """kill -9 at six moments of a replacement: what is at OUT always opens, with all hashes."""
    folder, out = tiny.shared(Variant())[0], tmp_path / "out"
    for moment in range(6):
        with subprocess.Popen(python(LOOP, folder, out), stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "0\n"
            time.sleep(0.017 * moment)
            child.send_signal(signal.SIGKILL)
        open_bundle(out)
    convert(folder, out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]  # what the killed processes left is gone


def anything(folder):
    return True


def make(out, content, **arguments):
    with storage.commit_folder(out, **arguments) as building:
        (building / "a").write_text(content)


def test_only_what_killed_processes_left_is_removed(tmp_path):
    abandoned, kept = [tmp_path / ".out.12345678.tmp", tmp_path / ".out.12345678.lock"], [
        tmp_path / ".other.12345678.tmp", tmp_path / ".other.12345678.lock", tmp_path / ".out.backup.tmp",
        tmp_path / ".out.backup.lock", tmp_path / ".out.12345678.old", tmp_path / ".out.87654321.tmp",
    ]  # fmt: skip
    for path in [*abandoned, *kept]:
        if path.suffix == ".lock":
            path.touch()
        else:
            path.mkdir()
            (path / "a").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a").touch()
    (tmp_path / ".out.11111111.tmp").symlink_to(elsewhere)
    (tmp_path / ".out.11111111.lock").touch()
    make(tmp_path / "out", "new")
    assert [path.exists() for path in abandoned] == [False, False]
    assert [path.exists() for path in kept] == [True] * len(kept)
    assert (elsewhere / "a").exists()


def test_a_folder_in_work_is_not_abandoned(tmp_path):
    with storage.commit_folder(tmp_path / "out") as first:
        (first / "a").write_text("first")
        with storage.commit_folder(tmp_path / "out") as second:
            assert (first.exists(), second.exists()) == (True, True)
            (second / "a").write_text("second")
        shutil.rmtree(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_a_lock_that_somebody_takes_away_is_taken_again(tmp_path, monkeypatch):
    """A second process may see the new lock file before it is locked, and take it for an abandoned one."""
    real, seen = storage.fcntl.flock, []

    def flock(descriptor, how):
        if how == storage.fcntl.LOCK_EX and not seen:
            seen.extend(tmp_path.glob(".out.*.lock"))
            storage.remove_abandoned(tmp_path / "out")
            assert not seen[0].exists()
        real(descriptor, how)

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    make(tmp_path / "out", "new")
    assert (len(seen), list(tmp_path.iterdir())) == (1, [tmp_path / "out"])


def test_a_file_system_without_locks_is_a_storage_error(tmp_path, monkeypatch):
    def flock(descriptor, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with pytest.raises(StorageError, match="No locks available"):
        make(tmp_path / "deep" / "out", "new")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_that_may_not_be_opened_are_left(tmp_path, monkeypatch):
    (tmp_path / ".out.12345678.lock").touch()
    real = storage.os.open

    def refuse(path, *arguments, **named):
        if str(path).endswith("12345678.lock"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **named)

    monkeypatch.setattr(storage.os, "open", refuse)
    make(tmp_path / "out", "new")
    assert (tmp_path / ".out.12345678.lock").exists()


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_is_replaced_whether_or_not_the_system_can_exchange_names(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(storage, "_renameat2", lambda one, other, flag: False)
    for content in ("old", "new"):
        make(tmp_path / "out", content, may_replace=anything)
    assert (tmp_path / "out" / "a").read_text() == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("moment", [0, 1])
def test_what_takes_the_place_of_a_bundle_meanwhile_is_kept(tmp_path, monkeypatch, can_exchange, moment):
    """Before `out` is asked about, and between the question and the exchange."""
    if not can_exchange:
        monkeypatch.setattr(storage, "_renameat2", lambda one, other, flag: False)
    out, asked = tmp_path / "out", []
    make(out, "old")

    def intrude():
        shutil.rmtree(out)
        out.mkdir()
        (out / "thesis.txt").write_text("years")

    def may_replace(folder):
        if not asked and moment == 0:
            intrude()
        answer = (folder / "a").exists()
        if not asked and moment == 1:
            intrude()
        asked.append(folder)
        return answer

    with pytest.raises(StorageError, match="appeared or changed") as caught:
        make(out, "new", may_replace=may_replace)
    assert caught.value.code == "storage.exists"
    assert (out / "thesis.txt").read_text() == "years"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux's")
def test_names_are_exchanged_in_one_step_here(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert storage._renameat2(tmp_path / "a", tmp_path / "b", storage._EXCHANGE)
    assert (tmp_path / "a" / "b").exists()
    assert not storage._renameat2(tmp_path / "a", tmp_path / "nowhere", storage._EXCHANGE)
    assert not storage._renameat2(tmp_path / "a", tmp_path / "b", storage._NOREPLACE)


def test_parents_that_were_made_vanish_with_a_failure_and_stay_with_a_success(tmp_path):
    with pytest.raises(RuntimeError), storage.commit_folder(tmp_path / "deep" / "er" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    make(tmp_path / "deep" / "er" / "out", "new")
    assert (tmp_path / "deep" / "er" / "out" / "a").read_text() == "new"


def test_a_read_only_place_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        convert(tiny.shared(Variant())[0], "/proc/edgevlm-out")
    assert caught.value.code in ("storage.failed", "storage.full")


# the helpers themselves


def test_atomic_write_replaces_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    storage.atomic_write(path, b"old")
    storage.atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    code = """
        import resource, sys
        from pathlib import Path
        from edgevlm import errors, storage
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            storage.atomic_write(Path(sys.argv[1]), bytes(1000))
        except errors.StorageError as error:
            print(error.code)
    """
    assert output_of(code, path) == "storage.full\n"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_flush_is_an_error_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    storage.atomic_write(path, b"old")

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(storage.os, call, fail)
    with pytest.raises(StorageError) as caught:
        storage.atomic_write(path, b"new")
    assert caught.value.code == "storage.failed"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_file_and_both_folders_are_flushed_before_the_rename(tmp_path, monkeypatch):
    events, real_flush, real_move = [], storage._flush, storage._rename_to_new

    def flush(descriptor):
        at = [path for path in (tmp_path, *tmp_path.rglob("*")) if storage._is_open_as(descriptor, path)]
        events.append(at[0].name)
        real_flush(descriptor)

    def move(old, new):
        events.append("rename")
        return real_move(old, new)

    monkeypatch.setattr(storage, "_flush", flush)
    monkeypatch.setattr(storage, "_rename_to_new", move)
    with storage.commit_folder(tmp_path / "new" / "out") as building:
        (building / "a").write_text("a")
        (building / "b").write_text("b")
    assert events[0] == tmp_path.name  # the new parent's entry
    at = events.index("rename")
    assert events[1] == "new"  # the lock's entry, before there is a folder
    assert set(events[2:at]) == {"a", "b", building.name}
    assert events[at - 1] == building.name
    assert events[at + 1 :] == ["new"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    """Even an empty folder, which a plain rename would replace."""

    def build():
        with storage.commit_folder(tmp_path / "out") as building:
            (building / "a").write_text("a")
            (tmp_path / "out").mkdir()

    with pytest.raises(StorageError, match="appeared"):
        build()
    assert list((tmp_path / "out").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

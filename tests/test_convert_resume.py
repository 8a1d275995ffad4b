"""kill -9 at any moment, or a disk that is full: the next conversion gives the bytes of an undisturbed one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import tiny
from tiny import Variant

from edgevlm import storage
from edgevlm.bundle import open_bundle
from edgevlm.converters import convert, decoder, encoder, fidelity
from edgevlm.errors import StorageError
from edgevlm.journal import Journal

SMALL, LARGER = Variant(), Variant(hidden=256, n_ff=512)
OPTIONS = {"name": "x", "decoder_quant": "q8_0", "fidelity_tokens": 40}

# A process that has imported everything and makes one child for each line on stdin, which converts, and kills itself
# when the moment comes: at the n-th of all acts on files of the output, of all reports and of all advances; or as a
# step begins. So every moment between two acts on the disk can be had, the same in each run.
NURSERY = """
    import json, os, resource, signal, sys
    from edgevlm import converters, encoder, errors, llama, storage
    import gguf, llama_cpp, onnx_ir, onnxruntime

    WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

    def convert(folder, out, options, moment=0, step=None, limit=None, exchange=False):
        acts = []

        def act(what):
            acts.append(what)
            if len(acts) == moment or (step and what.startswith(step)):
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event, arguments):
            if event in WATCHED and any(os.path.dirname(out) in str(argument) for argument in arguments):
                act(event)

        sys.addaudithook(audit)
        if exchange:
            real = storage._renameat2
            storage._renameat2 = lambda *a: (real(*a), os.kill(os.getpid(), signal.SIGKILL))
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            converters.convert(folder, out, **options, report=act, advance=lambda *_: act("advance"))
        except errors.EdgeVLMError as error:
            return error.code
        return len(acts)

    for line in sys.stdin:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(convert(**json.loads(line))).encode())
            os._exit(0)
        os.close(write)
        print(json.dumps(child), flush=True)
        _, status = os.waitpid(child, 0)
        found = os.read(read, 1000)
        os.close(read)
        print(json.dumps("killed" if os.WIFSIGNALED(status) else json.loads(found)), flush=True)
"""


@functools.cache
def nursery():
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(NURSERY)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def in_child(out, *, variant=SMALL, options=OPTIONS, seconds=None, **moment):
    """Convert in a process of its own, which may be killed after some seconds; returns what it said, or `killed`."""
    order = {"folder": str(tiny.shared(variant)[0]), "out": str(out), "options": options, **moment}
    process = nursery()
    process.stdin.write(json.dumps(order) + "\n")
    process.stdin.flush()
    child = json.loads(process.stdout.readline())
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it was faster
            os.kill(child, signal.SIGKILL)
    return json.loads(process.stdout.readline())


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@functools.cache
def undisturbed(variant=SMALL):
    """The files of a bundle that nobody disturbed, and in how many acts it was made."""
    with tempfile.TemporaryDirectory() as folder:
        acts = in_child(Path(folder) / "out", variant=variant)
        return content(Path(folder) / "out"), acts


def finish(folder, variant=SMALL):
    """Convert again after a kill; a bundle that is there already is complete."""
    out = folder / "out"
    if out.exists():
        with pytest.raises(StorageError, match="exists already"):
            convert(tiny.shared(variant)[0], out, **OPTIONS)
    else:
        convert(tiny.shared(variant)[0], out, **OPTIONS)
    open_bundle(out)
    assert content(out) == undisturbed(variant)[0]
    assert list(folder.iterdir()) == [out]


def test_a_kill_at_any_act_is_made_good(tmp_path):
    """From the first act to the last, and the last few one by one: there the bundle appears."""
    acts = undisturbed()[1]
    moments = sorted({round(1 + i * (acts - 1) / 15) for i in range(16)} | set(range(acts - 3, acts + 1)))
    assert len(moments) >= 16
    for moment in moments:
        folder = tmp_path / str(moment)
        folder.mkdir()
        assert in_child(folder / "out", moment=moment) == "killed"
        finish(folder)


def test_kills_at_any_time_one_after_the_other_are_made_good(tmp_path):
    """SIGKILL from outside, again and again on the same folder, whatever the process is doing."""
    out, seed = tmp_path / "out", random.Random(5)
    for _ in range(8):
        if not out.exists():
            in_child(out, seconds=seed.uniform(0.02, 0.6))
    finish(tmp_path)


def count_calls(monkeypatch):
    """Which steps are really done from here on."""
    done = []
    for module, name in ((decoder, "write"), (fidelity, "compare"), (encoder, "write")):
        real, what = getattr(module, name), f"{module.__name__.rpartition('.')[2]}.{name}"

        def watch(*arguments, real=real, what=what, **named):
            done.append(what)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, watch)
    return done


def kill_before(folder, step):
    """Leave what a process leaves that is killed as a step begins."""
    assert in_child(folder / "out", step=step) == "killed"
    assert not (folder / "out").exists()
    (leftover,) = folder.glob(".out.*.tmp")
    return leftover


def test_what_was_finished_is_not_done_again(tmp_path, monkeypatch):
    kill_before(tmp_path, "encoder to")
    done = count_calls(monkeypatch)
    finish(tmp_path)
    assert done == ["encoder.write"]


def test_a_finished_file_that_is_damaged_is_made_again(tmp_path, monkeypatch):
    """A power cut may lose pages that were written before their record."""
    leftover = kill_before(tmp_path, "encoder to")
    raw = bytearray((leftover / "decoder.gguf").read_bytes())
    raw[-100] ^= 1
    (leftover / "decoder.gguf").write_bytes(raw)
    done = count_calls(monkeypatch)
    finish(tmp_path)
    assert done == ["decoder.write", "encoder.write"]


@pytest.mark.parametrize(
    "tail",
    [
        "",
        '{"step": "encoder", "files": {}, "va',
        '{"step": "encoder"}\n{}\n',
        '{"step": "predictions", "files": 5, "value": {}}\n',
        '{"step": ["x"], "files": {}, "value": {}}\n',
        '{"step": "predictions", "files": ["decoder.gguf"], "value": {}}\n',
        '{"step": "predictions", "files": {"../x": "0"}, "value": {}}\n',
        "[" * 200_000 + "\n",
    ],
)
def test_a_record_that_is_not_whole_is_no_record(tmp_path, monkeypatch, tail):
    leftover = kill_before(tmp_path, "encoder to")
    lock = leftover.with_suffix(".lock")
    key, first, second = lock.read_text().splitlines()
    lock.write_text(f"{key}\n{first}\n{second[:-5]}" if not tail else f"{key}\n{first}\n{tail}")
    done = count_calls(monkeypatch)
    finish(tmp_path)
    assert done == ["fidelity.compare", "encoder.write"]


CHANGES = {
    "options": {"decoder_quant": "q4_0"},
    "tokens": {"fidelity_tokens": 65},
    "name": {"name": "y"},
    "encoder": {"encoder_quant": "fp32"},
}


def test_what_was_finished_serves_an_overwriting_call_too(tmp_path, monkeypatch):
    """And a call that is refused because there is something at OUT leaves it alone."""
    leftover = kill_before(tmp_path, "encoder to")
    with tempfile.TemporaryDirectory() as folder:
        convert(tiny.shared(SMALL)[0], Path(folder) / "old", **OPTIONS | {"name": "old"})
        shutil.copytree(Path(folder) / "old", tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS)
    assert leftover.exists()
    done = count_calls(monkeypatch)
    convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS, overwrite=True)
    assert done == ["encoder.write"]
    assert content(tmp_path / "out") == undisturbed()[0]


@pytest.mark.parametrize("attack", ["another user", "open to others", "link"])
def test_what_others_may_have_written_is_not_taken_over(tmp_path, monkeypatch, attack):
    leftover = kill_before(tmp_path, "encoder to")
    if attack == "another user":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    elif attack == "open to others":
        leftover.chmod(0o777)
    else:
        (leftover / "decoder.gguf").rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
        (leftover / "decoder.gguf").symlink_to(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    done = count_calls(monkeypatch)
    finish(tmp_path)
    assert done[0] == "decoder.write"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_the_order_of_patterns_is_a_part_of_the_key(tmp_path, monkeypatch):
    """Of `decoder_types` the first that matches decides."""
    patterns = {"attn_k|ffn_down": "q4_0", "ffn": "q8_0"}
    options = OPTIONS | {"decoder_types": patterns}
    assert in_child(tmp_path / "out", options=options, step="encoder to") == "killed"
    done = count_calls(monkeypatch)
    convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS | {"decoder_types": dict(reversed(patterns.items()))})
    assert done[0] == "decoder.write"


@pytest.mark.parametrize("change", CHANGES)
def test_another_conversion_takes_nothing_over(tmp_path, monkeypatch, change):
    kill_before(tmp_path, "encoder to")
    done = count_calls(monkeypatch)
    convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS | CHANGES[change], force=True)
    assert done[0] == "decoder.write"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_checkpoint_takes_nothing_over(tmp_path, monkeypatch):
    """The same path, sizes and times, and one weight that differs."""
    kill_before(tmp_path, "encoder to")
    folder = tiny.copy(SMALL, tmp_path.with_name(tmp_path.name + "-changed"))
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 0x80
    path.write_bytes(raw)
    done = count_calls(monkeypatch)
    convert(folder, tmp_path / "out", **OPTIONS)
    assert done[0] == "decoder.write"


def test_another_place_takes_nothing_over(tmp_path):
    leftover = kill_before(tmp_path, "encoder to")
    convert(tiny.shared(SMALL)[0], tmp_path / "other", **OPTIONS)
    assert content(tmp_path / "other") == undisturbed()[0]
    assert leftover.exists()  # it is for `out` to go on with
    finish_both = convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS)
    assert finish_both.files
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_what_is_still_in_work_is_left_alone(tmp_path, monkeypatch):
    leftover = kill_before(tmp_path, "encoder to")
    held = os.open(leftover.with_suffix(".lock"), os.O_RDWR)
    storage.fcntl.flock(held, storage.fcntl.LOCK_EX)
    done = count_calls(monkeypatch)
    convert(tiny.shared(SMALL)[0], tmp_path / "out", **OPTIONS)
    assert done[0] == "decoder.write"
    assert leftover.exists()
    os.close(held)


def test_strange_files_in_a_leftover_do_not_reach_the_bundle(tmp_path):
    leftover = kill_before(tmp_path, "encoder to")
    (leftover / "secret").write_text("not of the bundle")
    (leftover / "folder").mkdir()
    (leftover / "folder" / "more").touch()
    (leftover / "bundle.json").write_text("{}")
    finish(tmp_path)


def test_the_old_bundle_is_not_taken_for_work_in_progress(tmp_path):
    """Killed right after the exchange of names, the temporary folder holds what was at OUT before."""
    out = tmp_path / "out"
    convert(tiny.shared(SMALL)[0], out, **OPTIONS | {"decoder_quant": "f16"})
    old = content(out)
    assert in_child(out, options={**OPTIONS, "overwrite": True}, exchange=True) == "killed"
    assert content(out) == undisturbed()[0]
    (left,) = tmp_path.glob(".out.*.tmp")
    assert content(left) == old
    convert(tiny.shared(SMALL)[0], out, **OPTIONS, overwrite=True)
    assert content(out) == undisturbed()[0]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("limit", [3_000, 20_000, 400_000, 1_300_000, 2_000_000])
def test_a_full_disk_is_made_good(tmp_path, limit):
    """The limit meets the records, the encoder's graph and data, the decoder, and its unquantized twin."""
    assert in_child(tmp_path / "out", variant=LARGER, limit=limit) == "storage.full"
    assert list(tmp_path.iterdir()) == []
    finish(tmp_path, LARGER)


@pytest.mark.parametrize(("limit", "kept"), [(300_000, False), (50_000, True)])
def test_a_full_disk_after_a_kill_is_made_good(tmp_path, limit, kept):
    """The limit meets the encoder, or already what is checked before anything that was left is touched."""
    leftover = kill_before(tmp_path, "encoder to")
    assert in_child(tmp_path / "out", limit=limit) == "storage.full"
    assert leftover.exists() == kept
    assert len(list(tmp_path.iterdir())) == (2 if kept else 0)
    finish(tmp_path)


# the journal itself


def test_a_step_is_done_once(tmp_path):
    done = []

    def work():
        done.append(1)
        (building / "a").write_text("a")
        return {"x": 0.1}

    with storage.commit_folder(tmp_path / "out", key="k") as building:
        for _ in range(2):
            assert Journal(building).step("one", ("a",), work) == {"x": 0.1}
        assert done == [1]
        (building / "a").write_text("b")
        assert Journal(building).step("one", ("a",), work) == {"x": 0.1}
        assert done == [1, 1]
        assert Journal(building).step("one", ("a", "b"), lambda: work() and (building / "b").touch()) is None


def test_only_a_folder_with_the_key_is_taken_over(tmp_path):
    for name, first_line in (("1", "other\n"), ("2", "key"), ("3", "key\n"), ("4", "key\n")):
        (tmp_path / f".out.{name * 8}.lock").write_text(first_line)
        (tmp_path / f".out.{name * 8}.tmp").mkdir()
    with storage.commit_folder(tmp_path / "out", key="key") as building:
        assert building.name == ".out.33333333.tmp"
        assert sorted(path.name for path in tmp_path.iterdir()) == [".out.33333333.lock", ".out.33333333.tmp"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

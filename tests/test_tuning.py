"""Numbers of threads are measured once, kept, and used again only where they belong."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm.machine import usable_cpus
from edgevlm.threads import Threads, default_threads
from edgevlm.tuning import Tuned, candidates, choose, identity, keep, recall, tune

OWNER = {"files": ["a"], "cpu": "c", "cpus": 1, "versions": {}}
ONE = Tuned(threads=Threads(encode=1, prefill=1, decode=1), rates={"decode": {1: 5.0}})


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGEVLM_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_fewer_threads_win_unless_more_are_clearly_faster() -> None:
    assert choose({1: 100.0, 2: 102.9, 4: 99.0}) == 1
    assert choose({1: 100.0, 2: 104.0, 4: 105.0}) == 2
    assert choose({1: 50.0, 2: 33.8, 4: 51.0}) == 1
    assert choose({3: 1.0}) == 3


def test_candidates_hold_all_cores_and_all_cpus() -> None:
    assert candidates(1, 1) == [1]
    assert candidates(4, 2) == [1, 2, 3, 4]
    assert candidates(20, 10) == [1, 2, 3, 4, 6, 8, 10, 12, 16, 20]


def test_a_tuned_model_answers_as_before_and_is_loaded_so_again(state: Path) -> None:
    picture = np.full((128, 128, 3), 90, np.uint8)
    with edgevlm.load() as model:
        assert model._decoder.threads == default_threads()
        expected = model.ask("What does the display read?", [picture], max_tokens=12).text
        tuned = model.tune(rounds=2)
        assert model.ask("What does the display read?", [picture], max_tokens=12).text == expected
        assert model._decoder.threads == tuned.threads
    assert set(tuned.rates) == {"encode", "prefill", "decode"}
    assert all(rate > 0 for found in tuned.rates.values() for rate in found.values())
    (path,) = (state / "tuned").iterdir()
    # another choice than a machine of these CPUs would make by itself cannot be told apart, so one is written
    document = json.loads(path.read_text())
    document["threads"] = {"encode": 1, "prefill": usable_cpus(), "decode": 1}
    path.write_text(json.dumps(document))
    with edgevlm.load() as model:
        assert asdict(model._decoder.threads) == document["threads"]
    with edgevlm.load(threads={"decode": 2}) as model:
        assert asdict(model._decoder.threads) == {**document["threads"], "decode": 2}
    with edgevlm.load(threads=3) as model:
        assert model._decoder.threads == Threads(encode=3, prefill=3, decode=3)


def test_each_candidate_is_measured_for_each_phase() -> None:
    with edgevlm.load(threads=1, context=64) as model:
        tuned = tune(model._decoder, None, counts=[1, 2], rounds=2)
    assert {phase: sorted(found) for phase, found in tuned.rates.items()} == {"prefill": [1, 2], "decode": [1, 2]}
    assert tuned.threads.encode == 1  # nothing was measured, nothing is changed


def test_what_was_kept_is_recalled(state: Path) -> None:
    path = keep(ONE, OWNER)
    assert path is not None
    assert path.parent == state / "tuned"
    assert path.stat().st_mode & 0o777 == 0o600
    assert recall(OWNER) == ONE.threads


@pytest.mark.parametrize("change", [{"files": ["b"]}, {"cpu": "d"}, {"cpus": 2}, {"versions": {"edgevlm": "9"}}])
def test_what_belongs_to_something_else_is_not(change: dict[str, object]) -> None:
    keep(ONE, OWNER)
    assert recall({**OWNER, **change}) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"{}", b'{"format": 2}', b" " * (1 << 17),
     *(json.dumps({"format": 1, "identity": OWNER, "threads": threads}).encode() for threads in (
         None, [], {}, {"encode": 0, "prefill": 1, "decode": 1}, {"encode": 1, "prefill": 1, "decode": "1"},
         {"encode": 1, "prefill": 1}, {"encode": 1, "prefill": 1, "decode": 1, "more": 1},
         {"encode": 1, "prefill": 1, "decode": 1024})),
     json.dumps({"format": 1, "identity": {}, "threads": asdict(ONE.threads)}).encode()],
)  # fmt: skip
def test_a_file_that_cannot_be_trusted_is_as_if_it_were_not_there(content: bytes) -> None:
    path = keep(ONE, OWNER)
    assert path is not None
    path.write_bytes(content)
    assert recall(OWNER) is None


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEVLM_STATE", "")
    assert keep(ONE, OWNER) is None
    assert recall(OWNER) is None


def test_a_folder_that_cannot_be_written_is_a_warning(state: Path) -> None:
    state.write_bytes(b"")  # a file where the folder would be
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert keep(ONE, OWNER) is None
    assert recall(OWNER) is None


def test_the_identity_follows_the_content_not_the_path(smollm2: Path, tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.gguf", tmp_path / "other.gguf"
    head = smollm2.read_bytes()[: 1 << 20]
    copy.write_bytes(head)
    other.write_bytes(head[:-1] + b"x")
    assert identity(copy, None) != identity(other, None) != identity(smollm2, None)
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(head)
    assert identity(moved, None) == identity(copy, None)

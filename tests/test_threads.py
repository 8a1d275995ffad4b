"""How many threads there are: what the machine gives, what was asked for, and that only one pool works at a time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import edgevlm
from edgevlm import machine
from edgevlm.cgroup import cpu_quota, memory_room
from edgevlm.encoder import Encoder
from edgevlm.errors import UsageError
from edgevlm.splice import TextSegment
from edgevlm.threads import Threads, default_threads, parse_threads, resolve_threads

MB = 1 << 20
V2 = "35 31 0:32 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
)


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


# ---- control groups


def test_the_least_quota_of_nested_groups_counts(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/app.service/payload",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/user.slice/cpu.max": "max 100000",
        "sys/fs/cgroup/user.slice/app.service/cpu.max": "150000 100000",
        "sys/fs/cgroup/user.slice/app.service/payload/cpu.max": "800000 100000",
    })  # fmt: skip
    assert cpu_quota(root) == 1.5
    # the twin: the group in the middle is what counted
    (root / "sys/fs/cgroup/user.slice/app.service/cpu.max").write_text("max 100000\n")
    assert cpu_quota(root) == 8


def test_quota_of_version_1(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "7:memory:/a\n2:cpu,cpuacct:/a/b",
        "proc/self/mountinfo": V1.format(root="/"),
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "200000",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert cpu_quota(root) == 2
    (root / "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us").write_text("-1\n")
    assert cpu_quota(root) is None


@pytest.mark.parametrize("words", ["", "max", "100000", "0 100000", "-1 100000", "100000 0", "a b", "1 2 3", "\x00"])
def test_a_quota_that_makes_no_sense_is_none(tmp_path: Path, words: str) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": words,
    })  # fmt: skip
    assert cpu_quota(root) is None


def test_room_is_the_limit_without_what_cannot_be_given_back(tmp_path: Path) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/app/payload",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/app/memory.max": str(900 * MB),
        "sys/fs/cgroup/app/memory.high": "max",
        "sys/fs/cgroup/app/memory.current": str(700 * MB),
        "sys/fs/cgroup/app/memory.stat": 
            f"anon 1\ninactive_file {200 * MB}\nactive_file {90 * MB}\nslab_reclaimable {10 * MB}",
        "sys/fs/cgroup/app/payload/memory.max": "max",
        "sys/fs/cgroup/app/payload/memory.current": str(700 * MB),
    })  # fmt: skip
    assert memory_room(root) == 500 * MB
    (root / "sys/fs/cgroup/app/memory.high").write_text(str(600 * MB))
    assert memory_room(root) == 200 * MB
    (root / "sys/fs/cgroup/app/memory.high").write_text(str(300 * MB))
    assert memory_room(root) == 0
    (root / "sys/fs/cgroup/app/memory.current").unlink()
    assert memory_room(root) == 300 * MB
    for name in ("high", "max"):
        (root / f"sys/fs/cgroup/app/memory.{name}").write_text("max")
    assert memory_room(root) is None


@pytest.mark.parametrize(
    ("mounted", "group", "inside"),
    [("/", "/a", "/a"), ("/docker/1", "/docker/1/a", "/a"), ("/docker/1", "/docker/1", ""),
     ("/docker/1", "/", ""), ("/", "/../../a", "")],
)  # fmt: skip
def test_a_container_finds_its_group(tmp_path: Path, mounted: str, group: str, inside: str) -> None:
    root = system(tmp_path, {
        "proc/self/cgroup": f"7:memory:{group}",
        "proc/self/mountinfo": V1.format(root=mounted),
        f"sys/fs/cgroup/memory{inside}/memory.limit_in_bytes": str(100 * MB),
        f"sys/fs/cgroup/memory{inside}/memory.usage_in_bytes": str(50 * MB),
        f"sys/fs/cgroup/memory{inside}/memory.stat": f"cache 5\ntotal_inactive_file {MB}\ntotal_active_file {MB}",
    })  # fmt: skip
    assert memory_room(root) == 52 * MB
    (root / f"sys/fs/cgroup/memory{inside}/memory.limit_in_bytes").write_text("9223372036854771712")
    assert memory_room(root) is None


def test_a_system_without_groups_has_no_limit(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert memory_room(tmp_path) is None


def test_available_memory_is_cut_to_the_group(tmp_path: Path) -> None:
    root = system(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2048 kB"})
    assert machine.available_bytes(root) == 2 * MB
    system(tmp_path, {
        "proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/memory.max": str(MB),
        "sys/fs/cgroup/memory.current": "0",
    })  # fmt: skip
    assert machine.available_bytes(root) == MB


# ---- cores


def cores(root: Path, siblings: dict[int, str], capacity: dict[int, int] | None = None) -> Path:
    files = {f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in siblings.items()}
    files |= {f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity": str(n) for cpu, n in (capacity or {}).items()}
    return system(root, files)


@pytest.fixture
def affinity(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    return lambda cpus: monkeypatch.setattr(os, "sched_getaffinity", lambda _: cpus)


def test_threads_of_one_core_count_once(tmp_path: Path, affinity: Callable[[set[int]], None]) -> None:
    root = cores(tmp_path, {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"})
    affinity({0, 1, 4, 5})
    assert machine.heavy_cores(root) == 2
    affinity({0, 4})
    assert machine.heavy_cores(root) == 1
    affinity({0, 5})
    assert machine.heavy_cores(root) == 2
    affinity({0, 1, 2, 3})  # 2 and 3 say nothing of themselves
    assert machine.heavy_cores(root) == 4


def test_little_cores_are_left_out_unless_there_are_no_others(
    tmp_path: Path, affinity: Callable[[set[int]], None]
) -> None:
    # Rockchip's RK3588: four Cortex-A55, four Cortex-A76
    capacity = dict.fromkeys(range(4), 414) | dict.fromkeys(range(4, 8), 1024)
    root = cores(tmp_path, {cpu: str(cpu) for cpu in range(8)}, capacity)
    affinity(set(range(8)))
    assert machine.heavy_cores(root) == 4
    affinity({0, 1, 2})
    assert machine.heavy_cores(root) == 3


def test_intel_efficiency_cores_are_left_out(tmp_path: Path, affinity: Callable[[set[int]], None]) -> None:
    root = cores(tmp_path, {0: "0-1", 1: "0-1", 2: "2", 3: "3"})
    affinity({0, 1, 2, 3})
    assert machine.heavy_cores(root) == 3
    system(root, {"sys/devices/cpu_core/cpus": "0-1"})
    assert machine.heavy_cores(root) == 1


def test_a_quota_cuts_the_cores(tmp_path: Path, affinity: Callable[[set[int]], None]) -> None:
    affinity(set(range(16)))
    root = system(tmp_path, {
        "proc/self/cgroup": "0::/", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "250000 100000",
    })  # fmt: skip
    assert machine.heavy_cores(root) == machine.usable_cpus(root) == 3
    (root / "sys/fs/cgroup/cpu.max").write_text("1000 100000")
    assert machine.heavy_cores(root) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8", {0, 1, 2, 3, 8}), ("5\n", {5}), ("", set()), ("a", set()), ("1-", {1}), ("0-99999999", set())],
)
def test_lists_of_processors(text: str, expected: set[int]) -> None:
    assert machine.cpu_list(text) == expected


# ---- what was asked for


def test_one_number_is_for_all_phases_and_a_mapping_for_some() -> None:
    base = Threads(encode=4, prefill=3, decode=2)
    assert resolve_threads(5) == Threads(encode=5, prefill=5, decode=5)
    assert resolve_threads({"decode": 1}, base) == Threads(encode=4, prefill=3, decode=1)
    assert resolve_threads(None, base) is resolve_threads(base) is base
    assert resolve_threads(None) == default_threads()
    assert str(base) == "encode=4,prefill=3,decode=2"
    assert str(resolve_threads(5)) == "5"


@pytest.mark.parametrize("given", [0, -1, 1025, 1.5, True, "4", [1], {"decode": 0}, {"decode": True}, {"think": 1}])
def test_counts_that_would_crash_a_pool_are_refused(given: object) -> None:
    with pytest.raises(UsageError):
        resolve_threads(given)  # type: ignore[arg-type]


def test_the_command_lines_form() -> None:
    assert parse_threads(None) is None
    assert parse_threads("4") == 4
    assert parse_threads("encode=4, decode=2") == {"encode": 4, "decode": 2}


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.0", "١", "decode=", "decode=2,decode=2", "fast=1", "1,2", "=2", "9" * 5000, "decode=1_0"]
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--threads"):
        parse_threads(text)


# ---- one pool at a time


def tasks() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))


def cpu_s(threads: set[int]) -> float:
    """Processor time of some threads of this process: nanoseconds in the first column of `schedstat`."""
    texts = [Path(f"/proc/self/task/{thread}/schedstat").read_text() for thread in threads]
    return sum(int(text.split()[0]) for text in texts) / 1e9


def test_an_idle_pool_takes_no_processor_time_while_the_other_works() -> None:
    # In a process of its own: llama.cpp's pool is one for the process, and an earlier test may have made it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(watch_the_pools).result(timeout=120)


def watch_the_pools() -> None:
    with edgevlm.load(threads={"decode": 2, "prefill": 2, "encode": 2}) as model:
        before = tasks()
        model._decoder.prefill([TextSegment((1,) * 100)])
        decoding = tasks() - before
        before = tasks()
        assert model._vision is not None
        model._vision.release()
        encoder: Encoder = model._vision.load()
        encoding = tasks() - before
        assert decoding
        assert encoding
        image = model._vision.image_spec
        tiles_TCHW = np.zeros((1, 3, image.height_px, image.width_px), np.float32)

        def during(work: Callable[[], object]) -> tuple[float, float]:
            start = cpu_s(decoding), cpu_s(encoding)
            work()
            return cpu_s(decoding) - start[0], cpu_s(encoding) - start[1]

        encoder.encode(tiles_TCHW)
        by_decoder, by_encoder = during(lambda: [encoder.encode(tiles_TCHW) for _ in range(20)])
        # The moment of spinning that llama.cpp's threads are allowed, about 0.1 ms, is over before.
        assert by_decoder < 0.002
        assert by_encoder > 0.005  # the measurement does see a pool that works
        model._decoder.step(1)
        by_decoder, by_encoder = during(lambda: [model._decoder.step(1) for _ in range(50)])
        assert by_encoder < 0.002
        assert by_decoder > 0.005

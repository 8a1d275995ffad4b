"""What this machine gives us: processors that this process may really use, and the memory it has taken."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import platform
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from edgevlm.cgroup import cpu_quota, memory_room

_ROOT = Path("/")
#: A core counts among the fast ones if it does at least this part of the fastest's work (Linux's `cpu_capacity`).
_FAST = 0.6


def usable_cpus(root: Path = _ROOT) -> int:
    """Processors that this process may use at once: the affinity mask, cut to the control groups' quota.

    More threads than that would spin against each other: `os.cpu_count()` counts the whole machine, also in a
    container that may use one tenth of it.
    """
    return _within_quota(len(_affinity()), root)


def heavy_cores(root: Path = _ROOT) -> int:
    """Cores for products of matrices: fast ones, each counted once however many threads it runs.

    All threads of a product get the same share and wait for the last, so a slow core slows down all of them, and two
    threads on one core share its multipliers. `docs/threads.md` has figures.

    Args:
        root: Where `proc` and `sys` are; another one than `/` is for tests.
    """
    if sys.platform == "darwin":
        fast = _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
        return min(fast, os.cpu_count() or 1) if fast else usable_cpus(root)
    cpus = fast_cpus(_affinity(), root)
    cores = {_core(cpu, root) for cpu in cpus}
    return _within_quota(len(cores), root)


def fast_cpus(cpus: Iterable[int], root: Path = _ROOT) -> list[int]:
    """Those of some processors that are not much slower than the fastest: big.LITTLE's big ones, Intel's P-cores."""
    cpus = sorted(cpus)
    capacities = {cpu: _whole(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cpus}
    most = max((capacity for capacity in capacities.values() if capacity), default=None)
    if most:
        return [cpu for cpu in cpus if (capacities[cpu] or most) >= _FAST * most]
    performance = cpu_list(_line(root / "sys/devices/cpu_core/cpus"))  # Intel's hybrids on older kernels
    return [cpu for cpu in cpus if cpu in performance] or cpus


def cpu_list(text: str) -> set[int]:
    """Numbers from the kernel's form, such as `0-3,8`; empty if it is not of that form."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) > 1 << 16:
            return set()
        found |= set(range(int(first), int(last or first) + 1))
    return found


def _core(cpu: int, root: Path) -> str:
    """A name of the core that a processor is a thread of: its threads' numbers, or its own if the system is silent."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    siblings = next(filter(None, map(cpu_list, _lines(topology, "core_cpus_list", "thread_siblings_list"))), {cpu})
    return ",".join(map(str, sorted(siblings))) if cpu in siblings else str(cpu)


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _within_quota(count: int, root: Path) -> int:
    quota = cpu_quota(root)
    return max(1, min(count, math.ceil(quota) if quota else count))


def _lines(folder: Path, *names: str) -> list[str]:
    return [_line(folder / name) for name in names]


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""


def _whole(path: Path) -> int | None:
    text = _line(path)
    return int(text) if text.isdigit() else None


def _sysctl(name: str) -> int | None:
    """A whole number that macOS knows under this name."""
    try:
        lookup: Callable[..., int] = ctypes.CDLL(ctypes.util.find_library("c")).sysctlbyname
    except (OSError, AttributeError):
        return None
    value = ctypes.c_int64(0)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    failed = lookup(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed or size.value not in (4, 8) else value.value


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # arm64 kernels give no model name
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def available_bytes(root: Path = _ROOT) -> int:
    """Memory that this process may still take, in bytes, without swapping or hitting a control group's limit.

    Where the system does not tell what is available, half of all memory.
    """
    try:
        free = int((root / "proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    room = memory_room(root)
    return free if room is None else min(free, room)


def resident_bytes() -> tuple[int, int]:
    """(own memory, pages of files) of this process now, in bytes; all counts as own where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text()
        own, files, shared = (
            int(status.partition(f"{name}:")[2].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem")
        )
    except (OSError, ValueError, IndexError):
        return rss_bytes(), 0
    return own + shared, files


def rss_bytes() -> int:
    """The resident set of this process now, in bytes; where the system does not tell, its largest so far."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    try:
        # getrusage would report the peak of the program that started this one: Linux keeps it across exec.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB

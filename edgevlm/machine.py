"""What this machine gives us: processors that this process may really use, and the memory it has taken."""

from __future__ import annotations

import math
import os
import platform
import resource
import sys
from pathlib import Path

from edgevlm.errors import UsageError


def usable_cpus() -> int:
    """Processors for heavy work: the affinity mask, cut to the cgroup's quota.

    More threads than that would spin against each other: `os.cpu_count()` counts the whole machine, also in a
    container that may use one tenth of it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, min(cpus, quota or cpus))


def cpu_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # arm64 kernels give no model name
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cgroup_quota(cpu_max: Path) -> int | None:
    """Whole processors of a cgroup v2 quota ("max 100000" or "150000 100000", in microseconds), or None."""
    try:
        quota, period = cpu_max.read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def check_threads(threads: int | None) -> None:
    """Refuse numbers of threads that a native pool would crash on.

    Raises:
        UsageError: not None and not between 1 and 1024.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise UsageError(f"threads must be between 1 and 1024, found {threads!r}")


def available_bytes() -> int:
    """Memory that programs may take without swapping, in bytes; where the system does not tell, half of all."""
    try:
        return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


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

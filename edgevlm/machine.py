"""What this machine gives us: processors that this process may really use, and the memory it has taken."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path


def usable_cpus() -> int:
    """Processors for heavy work: the affinity mask, cut to the cgroup's quota.

    More threads than that would spin against each other: `os.cpu_count()` counts the whole machine, also in a
    container that may use one tenth of it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    return max(1, min(cpus, quota or cpus))


def _cgroup_quota(cpu_max: Path) -> int | None:
    """Whole processors of a cgroup v2 quota ("max 100000" or "150000 100000", in microseconds), or None."""
    try:
        quota, period = cpu_max.read_text().split()
        return None if quota == "max" else math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB

"""What the control groups of this process allow: processors and memory (cgroup v1 and v2, nested).

A group can never take more than any of the groups around it, so all of them up to the root are asked and the least
counts. A container may see its groups under another path than the one that the kernel names; then what is mounted is
its own group (`Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst` of Linux have the files).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

#: From here on, a limit of cgroup v1 means none: it says 2^63 without the last page.
_NO_LIMIT = 1 << 60


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the groups give, such as 1.5; None without a quota.

    Args:
        root: Where `proc` and `sys` are; another one than `/` is for tests.
    """
    found = [_quota_v2(folder) for folder in _groups(root, None)]
    found += [_quota_v1(folder) for folder in _groups(root, "cpu")]
    return min((quota for quota in found if quota is not None), default=None)


def memory_room(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take before a group's limit; None without a limit.

    What the kernel would give back under pressure, pages of files above all, does not count as taken.
    """
    found = [_room_v2(folder) for folder in _groups(root, None)]
    found += [_room_v1(folder) for folder in _groups(root, "memory")]
    return min((room for room in found if room is not None), default=None)


def _groups(root: Path, controller: str | None) -> Iterator[Path]:
    """The folder of this process's group and those around it, for a controller of v1; for v2 if that is None."""
    for line in _lines(root / "proc/self/cgroup"):
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if (hierarchy == "0" and not controllers) if controller is None else controller in controllers.split(","):
            for mounted, mount_point in _mounts(root, controller):
                yield from _up(root, group, mounted, mount_point)


def _mounts(root: Path, controller: str | None) -> Iterator[tuple[str, str]]:
    """(which group, mounted where), from lines such as `35 31 0:32 /a /sys/fs/cgroup/memory rw - cgroup cgroup rw`."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, _, right = line.partition(" - ")
        places, kinds = left.split(" "), right.split(" ")
        if len(places) < 6 or len(kinds) < 3:
            continue
        if kinds[0] == "cgroup2" if controller is None else kinds[0] == "cgroup" and controller in kinds[2].split(","):
            yield _unescaped(places[3]), _unescaped(places[4])


def _up(root: Path, group: str, mounted: str, mount_point: str) -> Iterator[Path]:
    base = root / mount_point.lstrip("/")
    inside = PurePosixPath(os.path.normpath(group))
    try:
        below = inside.relative_to(mounted)
    except ValueError:  # another name for it: what is mounted is this process's own group
        below = PurePosixPath()
    if ".." in PurePosixPath(group).parts:
        below = PurePosixPath()
    for depth in range(len(below.parts), -1, -1):
        yield base.joinpath(*below.parts[:depth])


def _quota_v2(folder: Path) -> float | None:
    """From "max 100000" or "150000 100000": microseconds in each period of so many."""
    values = _text(folder / "cpu.max").split()
    return _ratio(values[0], values[1]) if len(values) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    found = _number(quota), _number(period)
    return found[0] / found[1] if found[0] and found[1] else None


def _room_v2(folder: Path) -> int | None:
    limits = [_number(_memory(folder, name)) for name in ("max", "high")]
    stat = _stat(folder)
    reclaimable = stat.get("inactive_file", 0) + stat.get("active_file", 0) + stat.get("slab_reclaimable", 0)
    return _room([limit for limit in limits if limit is not None], _memory(folder, "current"), reclaimable)


def _room_v1(folder: Path) -> int | None:
    limit = _number(_memory(folder, "limit_in_bytes"))
    stat = _stat(folder)
    reclaimable = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    limits = [] if limit is None or limit >= _NO_LIMIT else [limit]
    return _room(limits, _memory(folder, "usage_in_bytes"), reclaimable)


def _room(limits: list[int], usage: str, reclaimable: int) -> int | None:
    used = _number(usage)
    if not limits or used is None:
        return min(limits, default=None)
    return max(0, min(limits) - max(0, used - reclaimable))


def _stat(folder: Path) -> dict[str, int]:
    pairs = (line.split() for line in _memory(folder, "stat").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _memory(folder: Path, name: str) -> str:
    return _text(folder / f"memory.{name}")


def _number(text: str) -> int | None:
    """A whole number that is not negative; `max` and -1 mean no limit."""
    return int(text) if text.strip().isdigit() else None


def _unescaped(path: str) -> str:
    """Spaces and such are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    """A small file's text, empty if there is none: not every system has these files."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""

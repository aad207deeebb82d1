"""What the control group of this process (a container, a service) leaves it of time and memory.

Source: the kernel's documentation of cgroup v2 (`cpu.max`, `memory.max`) and v1 (`cpu.cfs_quota_us`,
`memory.limit_in_bytes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 60
"""v1 says 'no limit' with a number near 2^63."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`processors` as a share of time, `memory` in bytes; None where there is no limit."""

    processors: float | None
    memory: int | None


def limits_of(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Limits:
    """The tightest limits of the group and of those that contain it."""
    groups = list(_groups(mount, membership))
    shares = [share for group in groups if (share := _share(group)) is not None]
    sizes = [size for group in groups if (size := _size(group)) is not None]
    return Limits(min(shares, default=None), min(sizes, default=None))


def _groups(mount: Path, membership: Path) -> Iterator[Path]:
    """Folders of this process's groups, innermost first, up to the mount point."""
    for line in _words(membership, "\n"):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        roots = [mount / controllers, *(mount / name for name in controllers.split(","))] if controllers else [mount]
        inner = Path(path.strip("/"))
        for root in dict.fromkeys(roots):
            yield from (root / part for part in (inner, *inner.parents))


def _share(group: Path) -> float | None:
    words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
    quota, period = [*words, "", ""][:2]
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return None
    return int(quota) / int(period)


def _size(group: Path) -> int | None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        word = next(iter(_words(group / name)), "")
        if word.isdecimal() and int(word) < UNLIMITED:
            return int(word)
    return None


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().split(separator)
    except OSError:
        return []

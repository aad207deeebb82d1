"""Processors, and what a container leaves of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from thermocline.hardware.control_group import Limits, limits_of
from thermocline.hardware.cores import Cores, find_cores


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("siblings", "quota", "threads"),
    [
        (((0,), (1,)), None, 2),
        (((0, 4), (1, 5), (2, 6), (3, 7)), None, 4),
        (((0,), (1,), (2,), (3,)), 2.0, 2),
        (((0,), (1,), (2,), (3,)), 2.5, 3),
        (((0,), (1,)), 0.5, 1),
        (((0,),), 8.0, 1),
    ],
)
def test_one_thread_per_core_and_no_more_than_the_quota_feeds(siblings, quota, threads) -> None:
    allowed = tuple(cpu for group in siblings for cpu in group)
    assert Cores("cpu", 8, allowed, siblings, quota).threads == threads


def test_siblings_share_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    files = {}
    for cpu, core in enumerate((0, 1, 0, 1)):
        files[f"cpu{cpu}/topology/physical_package_id"] = "0\n"
        files[f"cpu{cpu}/topology/core_id"] = f"{core}\n"
    cores = find_cores(tree(tmp_path, files))
    assert cores.siblings == ((0, 2), (1, 3))
    assert cores.physical == 2


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    cores = find_cores(tmp_path, tmp_path / "none")
    assert cores.allowed == (3,)
    assert (cores.physical, cores.threads, cores.model) == (1, 1, "unknown processor")


def test_this_machine_has_cores() -> None:
    cores = find_cores()
    assert 1 <= cores.threads <= cores.physical <= len(cores.allowed)


@pytest.mark.parametrize(
    ("membership", "files", "wanted"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n", "memory.max": "1073741824\n"}, Limits(1.5, 1 << 30)),
        ("0::/\n", {"cpu.max": "max 100000\n", "memory.max": "max\n"}, Limits(None, None)),
        ("0::/a/b\n", {"cpu.max": "400000 100000", "a/b/cpu.max": "200000 100000"}, Limits(2.0, None)),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "200000 100000"}, Limits(1.0, None)),
        ("0::/../host/path\n", {"memory.max": "5000"}, Limits(None, 5000)),
        (
            "3:cpu,cpuacct:/box\n4:memory:/box\n",
            {
                "cpu,cpuacct/box/cpu.cfs_quota_us": "300000",
                "cpu,cpuacct/box/cpu.cfs_period_us": "100000",
                "memory/box/memory.limit_in_bytes": "7000",
                "memory/memory.limit_in_bytes": "9223372036854771712",
            },
            Limits(3.0, 7000),
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, Limits(None, None)),
        ("0::/\n", {"cpu.max": "garbage here", "memory.max": "-5"}, Limits(None, None)),
        ("0::/\n", {"cpu.max": "100000 0"}, Limits(None, None)),
        ("", {}, Limits(None, None)),
    ],
    ids=["both", "unlimited", "inner", "outer is tighter", "foreign path", "v1", "v1 off", "garbage", "zero", "none"],
)
def test_the_tightest_limit_counts(tmp_path: Path, membership: str, files: dict[str, str], wanted: Limits) -> None:
    mount = tree(tmp_path / "mount", files)
    (tmp_path / "cgroup").write_text(membership)
    assert limits_of(mount, tmp_path / "cgroup") == wanted


def test_no_control_groups_is_no_limit(tmp_path: Path) -> None:
    assert limits_of(tmp_path / "x", tmp_path / "y") == Limits(None, None)

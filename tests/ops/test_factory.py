import pytest

from thermocline import _native
from thermocline.config import OpsKind
from thermocline.errors import HardwareError, UsageError
from thermocline.ops.cpu import LEVELS, CpuOps
from thermocline.ops.factory import make_ops
from thermocline.ops.reference import ReferenceOps


def test_each_kind_is_made():
    assert isinstance(make_ops(OpsKind.REFERENCE, 1), ReferenceOps)
    ops = make_ops(OpsKind.CPU, 2)
    assert isinstance(ops, CpuOps)
    assert ops.name == f"cpu/{_native.isa_levels()[-1]}"
    assert ops.threads == 2
    assert make_ops(OpsKind.CPU, 1, "baseline").name == "cpu/baseline"


def test_levels_are_those_of_the_kernels():
    assert set(_native.isa_levels()) <= set(LEVELS)


def test_rows_are_fetched_as_is_asked() -> None:
    assert CpuOps(1).context.fetching in ("first", "second")
    for fetching in ("first", "second"):
        assert CpuOps(1, "baseline", fetching).context.fetching == fetching
    with pytest.raises(UsageError, match="fetching is 'third'; allowed: auto, first, second"):
        CpuOps(1, "auto", "third")


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_thread_counts_are_bounded(threads):
    with pytest.raises(UsageError, match=f"threads is {threads}; allowed: 1 to 1024"):
        make_ops(OpsKind.CPU, threads)


def test_unknown_levels_are_refused_with_those_there_are():
    with pytest.raises(UsageError, match="isa is 'mmx'; allowed: auto, baseline"):
        make_ops(OpsKind.CPU, 1, "mmx")


def test_the_reference_takes_no_level():
    with pytest.raises(UsageError, match="isa is avx2, and the reference has no kernels: leave --isa out"):
        make_ops(OpsKind.REFERENCE, 1, "avx2")


def test_levels_that_the_cpu_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(_native, "isa_levels", lambda: ["baseline"])
    with pytest.raises(HardwareError, match="this CPU lacks avx2; it has baseline"):
        make_ops(OpsKind.CPU, 1, "avx2")

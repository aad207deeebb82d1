"""The ledger keeps its promise."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.errors import BudgetError, UsageError
from thermocline.hardware.machine import Tier
from thermocline.placement.ledger import Demand, Ledger, Purpose

GIB = 1 << 30
DEMANDS = st.builds(
    Demand, st.sampled_from([Tier.VRAM, Tier.RAM, Tier.DISK]), st.sampled_from(list(Purpose)), st.integers(0, 1 << 62)
)


def test_reserve_and_release() -> None:
    ledger = Ledger({Tier.VRAM: 100})
    one = ledger.reserve(Demand(Tier.VRAM, Purpose.KV, 60))
    two = ledger.reserve(Demand(Tier.VRAM, Purpose.FFN, 40))
    assert (ledger.used(Tier.VRAM), ledger.free(Tier.VRAM)) == (100, 0)
    assert ledger.used(Tier.VRAM, Purpose.KV) == 60
    ledger.release(one)
    assert ledger.free(Tier.VRAM) == 60
    with pytest.raises(UsageError, match="not reserved"):
        ledger.release(one)
    with pytest.raises(UsageError, match="not reserved"):
        Ledger({Tier.VRAM: 100}).release(two)


def test_refusal_is_itemised_and_names_what_fits() -> None:
    ledger = Ledger({Tier.VRAM: 4 * GIB})
    ledger.reserve(Demand(Tier.VRAM, Purpose.ATTENTION, 3 * GIB))
    kv = Demand(Tier.VRAM, Purpose.KV, 2 * GIB, "--ctx-size", 4096, 2 * GIB // 4096)
    with pytest.raises(BudgetError) as refusal:
        ledger.reserve_all([kv, Demand(Tier.VRAM, Purpose.GRAPHS, 5)])
    text = str(refusal.value)
    assert refusal.value.missing == GIB + 5
    assert refusal.value.tier == Tier.VRAM
    assert "lower --ctx-size from 4096 to 2047" in text
    assert f"{5 * GIB + 5:,} bytes" in text
    for row in ("attention weights", "kv cache", "graph pools", "sum", "budget"):
        assert row in text
    assert ledger.used(Tier.VRAM) == 3 * GIB
    fitting = Demand(Tier.VRAM, Purpose.KV, 2047 * kv.step)
    ledger.reserve_all([fitting, Demand(Tier.VRAM, Purpose.GRAPHS, 5)])


def test_a_budget_that_does_is_named_even_where_no_setting_helps() -> None:
    with pytest.raises(BudgetError, match=r"raise --ram-budget to 7B or more \(7 bytes\)"):
        Ledger({Tier.RAM: 3}).reserve(Demand(Tier.RAM, Purpose.EMBEDDING, 7))


@pytest.mark.parametrize("budget", [-1, 1.5, float("nan"), "8", True, None])
def test_budgets_are_whole_numbers(budget: object) -> None:
    with pytest.raises(UsageError, match="whole numbers"):
        Ledger({Tier.RAM: budget})  # type: ignore[dict-item]


@pytest.mark.parametrize("size", [-1, 0.5, True])
def test_demands_are_whole_numbers(size: object) -> None:
    with pytest.raises(UsageError, match="whole numbers"):
        Demand(Tier.RAM, Purpose.KV, size)  # type: ignore[arg-type]


def test_a_failing_transaction_gives_everything_back() -> None:
    ledger = Ledger({Tier.RAM: 10})
    ledger.reserve(Demand(Tier.RAM, Purpose.MARGIN, 4))

    def failing() -> None:
        with ledger.transaction():
            ledger.reserve(Demand(Tier.RAM, Purpose.FFN, 3))
            ledger.release(ledger.reserve(Demand(Tier.RAM, Purpose.KV, 3)))
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        failing()
    assert ledger.used(Tier.RAM) == 4
    with ledger.transaction():
        ledger.reserve(Demand(Tier.RAM, Purpose.FFN, 3))
    assert ledger.used(Tier.RAM) == 7


def test_unbudgeted_tiers_are_counted_only() -> None:
    ledger = Ledger({})
    ledger.reserve(Demand(Tier.DISK, Purpose.FFN, 1 << 70))
    assert ledger.used(Tier.DISK) == 1 << 70
    with pytest.raises(UsageError, match="no budget"):
        ledger.free(Tier.DISK)
    assert "disk" in str(ledger)


@given(st.integers(0, 1 << 63), st.integers(0, 1 << 63), st.lists(DEMANDS, max_size=30))
def test_sums_are_exact_and_budgets_hold(vram: int, ram: int, demands: list[Demand]) -> None:
    budgets = {Tier.VRAM: vram, Tier.RAM: ram}
    ledger, held = Ledger(budgets), []
    for demand in demands:
        before = ledger.rows()
        if demand.tier in budgets and demand.nbytes > ledger.free(demand.tier):
            with pytest.raises(BudgetError) as refusal:
                ledger.reserve(demand)
            assert ledger.rows() == before
            assert refusal.value.missing == demand.nbytes - ledger.free(demand.tier)
        else:
            held.append(ledger.reserve(demand))
    for tier, budget in budgets.items():
        assert ledger.used(tier) == sum(r.nbytes for r in held if r.tier is tier) <= budget
        assert ledger.free(tier) == budget - ledger.used(tier)
    for reservation in held:
        ledger.release(reservation)
    assert not ledger.rows()


@given(st.lists(DEMANDS, max_size=10), st.integers(0, 1 << 63))
def test_all_or_none(demands: list[Demand], budget: int) -> None:
    ledger = Ledger({Tier.RAM: budget})
    wanted = sum(d.nbytes for d in demands if d.tier is Tier.RAM)
    if wanted > budget:
        with pytest.raises(BudgetError):
            ledger.reserve_all(demands)
        assert not ledger.rows()
    else:
        ledger.reserve_all(demands)
        assert ledger.used(Tier.RAM) == wanted

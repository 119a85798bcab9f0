"""Slots of an engine for requests that step in changing company: as each alone, and errors that stay where they belong."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sage_edge.engines.accelerator import OutOfMemoryError
from sage_edge.engines.null import NullRunner
from sage_edge.errors import EngineError, InputError
from sage_edge.irp.engine import EnginePlugin
from sage_edge.irp.plugin import Observation
from sage_edge.irp.slots import SlotBank
from sage_edge.specs import Array
from tests.irp_plugins import spec


def observation(*needs: int) -> dict[str, Array]:
    return {"inputs": np.repeat(np.array(needs, np.int32)[:, None], 4, axis=1)}


class Handle(dict[str, Array]):
    """A state whose end can be watched."""


class Faulty(NullRunner):
    fails = ""
    room = 100  # states that still fit

    def _refine(self, handle: dict[str, Array]) -> npt.NDArray[np.float32]:
        if self.fails == "refine":
            raise OSError("injected")
        return super()._refine(handle)

    def _admit(self, handle: dict[str, Array], rows: list[int], observation: dict[str, Array]) -> None:
        if self.fails == "admit":
            raise OSError("injected")
        super()._admit(handle, rows, observation)

    def _empty(self, slots: int) -> dict[str, Array]:
        if self.room == 0:
            raise OutOfMemoryError("injected")
        self.room -= 1
        made = Handle(super()._empty(slots))
        weakref.finalize(made, self.free)
        return made

    def free(self) -> None:
        self.room += 1


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=7),
    st.lists(st.sets(st.integers(0, 6), min_size=1), min_size=1, max_size=25),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
)
@settings(max_examples=200)
def test_a_request_is_as_it_is_alone_whoever_steps_with_it(
    needs: list[int], companies: list[set[int]], released: list[int], slots: int, limit: int
) -> None:
    with NullRunner(slots) as runner:
        bank = SlotBank(runner, limit)
        seats = [bank.take(observation(need))[0] for need in needs]
        taken = [0] * len(needs)
        gone: set[int] = set()
        for number, company in enumerate(companies):
            if number == 5:
                gone = {n for n in released if n < len(needs)}
                bank.release([seats[n] for n in sorted(gone)])
            chosen = [n for n in sorted(company) if n < len(needs) and n not in gone]
            if not chosen:
                continue
            bank.refine([seats[n] for n in chosen])
            for n in chosen:
                taken[n] += 1
                left = max(0, needs[n] - taken[n])
                assert seats[n].signals[2] == left
        for n in set(range(len(needs))) - gone:
            np.testing.assert_array_equal(bank.decode([seats[n]])["prediction"][0], np.full(4, min(needs[n], taken[n])))
            packed = bank.pack([seats[n]])
            np.testing.assert_array_equal(packed["context"], observation(needs[n])["inputs"])


def test_more_seats_than_slots_step_in_several_calls() -> None:
    with NullRunner(4) as runner:
        bank = SlotBank(runner)
        seats = bank.take(observation(*range(1, 11)))
        bank.refine(seats)
        bank.refine(seats)
        assert [int(seat.signals[2]) for seat in seats] == [max(0, need - 2) for need in range(1, 11)]
        assert bank.decode(seats)["prediction"][:, 0].tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 2, 2]


def counting(runner: NullRunner) -> list[int]:
    """Rows that were read to the host or written from there, call by call."""
    moved: list[int] = []
    read, restore = runner.read, runner.restore
    runner.read = lambda state, rows=None: moved.append(len(rows or ())) or read(state, rows)  # type: ignore[method-assign, func-returns-value]
    runner.restore = lambda state, rows, arrays: moved.append(len(rows)) or restore(state, rows, arrays)  # type: ignore[method-assign, func-returns-value]
    return moved


def test_seats_of_several_companies_stay_where_they_are() -> None:
    with NullRunner(4) as runner:
        bank = SlotBank(runner)
        seats = bank.take(observation(*range(1, 11)))
        moved = counting(runner)
        for _ in range(3):
            bank.refine(seats)
        bank.decode(seats)
        assert moved == []
        bank.refine(seats[2:])  # two rest; eight fit into two calls
        assert sum(moved) == 2 + 2, "the smaller of two halves moves to the other, and those who rest stay"
        bank.refine(seats[2:])
        assert sum(moved) == 2 + 2


def test_fewer_states_than_wished_where_memory_does_not_suffice() -> None:
    with Faulty(2) as runner:
        runner.room = 2
        bank = SlotBank(runner)
        seats = bank.take(observation(*range(1, 8)))
        bank.refine(seats)
        bank.refine(seats)
        assert [int(seat.signals[2]) for seat in seats] == [max(0, need - 2) for need in range(1, 8)]
        assert bank.limit == 1, "to change its size, a company needs two states"
        runner.room = 0
        other = SlotBank(runner)
        seats = other.take(observation(1))
        with pytest.raises(OutOfMemoryError):
            other.refine(seats)
        with pytest.raises(EngineError, match="lost"):
            other.refine(seats)


@pytest.mark.parametrize(("fails", "call"), [("refine", "refine"), ("admit", "decode"), ("admit", "pack")])
def test_an_engine_error_loses_those_it_struck_and_keeps_those_who_wait(fails: str, call: str) -> None:
    with Faulty(4) as runner:
        bank = SlotBank(runner)
        waits, struck = bank.take(observation(5))[0], bank.take(observation(3))[0]
        bank.refine([waits])
        runner.fails = fails
        with pytest.raises(OSError, match="injected"):
            getattr(bank, call)([struck])
        runner.fails = ""
        for look in (bank.refine, bank.decode, bank.pack):
            with pytest.raises(EngineError, match="lost"):
                look([struck])
        bank.refine([waits])
        assert waits.signals[2] == 3


def test_looking_without_memory_loses_nobody() -> None:
    with Faulty(2) as runner:
        bank = SlotBank(runner)
        seat = bank.take(observation(3))[0]
        room, runner.room = runner.room, 0
        with pytest.raises(OutOfMemoryError):
            bank.decode([seat])
        runner.room = room
        bank.refine([seat])
        assert seat.signals[2] == 2


def test_bad_arrays_are_refused_when_they_come() -> None:
    with NullRunner(4) as runner:
        bank = SlotBank(runner)
        with pytest.raises(InputError, match="outside 0..1000"):
            bank.take(observation(-1))
        packed = bank.pack(bank.take(observation(2, 3)))
        with pytest.raises(InputError, match="signals of shape"):
            bank.restore(packed, np.zeros((1, 4), np.float32))


class Tiled(EnginePlugin):
    """A request of several slots, as a large image has tiles; the note says how many there were."""

    def prepare(self, given: Observation) -> tuple[dict[str, Array], Any]:
        return observation(*given["tiles"]), len(given["tiles"])

    def finish(self, outputs: dict[str, Array], note: Any) -> dict[str, Any]:
        return {"sum": int(outputs["prediction"][:, 0].sum()), "tiles": note}


def test_a_request_may_take_several_slots() -> None:
    with Tiled(spec("tiled", 8), runner=NullRunner(2)) as plugin:
        state = plugin.init_state({"tiles": [1, 2, 3, 4, 5]})
        for index in range(3):
            state = plugin.step(state, index)
        assert plugin.energy(state) == pytest.approx((0 + 0 + 0 + 1 + 2) / 5)
        signals = dict(zip(plugin.signals[1:], plugin.read_signals(state), strict=True))
        assert signals["changed"] == 1, "one tile still changes, so the request does"
        assert plugin.result(state) == {"sum": 1 + 2 + 3 + 3 + 3, "tiles": 5}
        with pytest.raises(NotImplementedError, match="hold a note"):
            plugin.pack(state)
        again = plugin.unpack_seats(plugin.pack_seats(state), note=5)
        assert plugin.result(plugin.step(again, 3)) == {"sum": 1 + 2 + 3 + 4 + 4, "tiles": 5}


def test_outside_of_activate_there_is_no_engine() -> None:
    plugin = Tiled(spec("tiled", 8), runner=NullRunner(2))
    with pytest.raises(RuntimeError, match="not active"):
        plugin.init_state({"tiles": [1]})
    with pytest.raises(InputError, match="`engine` is missing"):
        EnginePlugin(spec("none", 8))

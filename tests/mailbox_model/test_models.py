"""No violation in any interleaving, and every seeded bug is found."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.mailbox_model import focus, ring, waiting
from tests.mailbox_model.explore import explore
from tests.mailbox_model.focus import Focus
from tests.mailbox_model.ring import Ring
from tests.mailbox_model.waiting import Waiting

RESTART = Focus(producers=1, consumers=1, sweepers=1, items=2, slots=2, entries=2, kills=1, restarts=1)
TWO_PRODUCERS = Focus(producers=2, consumers=1, sweepers=0, items=2, slots=2, entries=3, kills=0, drop_oldest=True)
TWO_CONSUMERS = Focus(producers=1, consumers=2, sweepers=1, items=2, slots=2, entries=3, kills=1)
TWO_SWEEPERS = Focus(producers=1, consumers=0, sweepers=2, items=2, slots=1, entries=1, kills=2, restarts=2)
TAP = Focus(producers=1, consumers=1, sweepers=1, items=2, slots=1, entries=2, kills=1, cancels=True, taps=1)
RING = Ring(cells=2, writers=2, records=2, readers=1, sweepers=2, kills=2)
WAIT = Waiting(signallers=2, waiters=2, kills=0)

SOUND = {
    "a producer or consumer is killed and restarted": RESTART,
    "two producers, drop-oldest": TWO_PRODUCERS,
    "two consumers, a kill": TWO_CONSUMERS,
    "two sweepers, two kills, two restarts": TWO_SWEEPERS,
    "cancels and a tap": TAP,
    "broadcast ring": RING,
    "waiting": WAIT,
    "waiting, three signals": Waiting(signallers=3, waiters=2, kills=0),
    "waiting, a kill": Waiting(signallers=2, waiters=2, kills=1),
}

# Bug → the smallest model that must find it. A bug missing here fails `test_every_bug_is_seeded`.
SEEDED: dict[Any, dict[str, Any]] = {
    focus.Bugs: {
        "sweep_without_recheck": TWO_SWEEPERS, "sweep_keeps_ticket": TWO_SWEEPERS, "cancel_keeps_ticket": TAP,
        "identity_first": TWO_SWEEPERS, "publish_first": RESTART, "blind_take": TWO_CONSUMERS, "careless_tap": TAP,
        "one_look": TWO_PRODUCERS, "release_first": RESTART, "timeout_is_death": RESTART, "steal_held": TWO_PRODUCERS,
    },
    ring.Bugs: dict.fromkeys((f.name for f in dataclasses.fields(ring.Bugs)), RING),
    waiting.Bugs: dict.fromkeys((f.name for f in dataclasses.fields(waiting.Bugs)), WAIT),
}  # fmt: skip


def run(model: Any) -> Any:
    return explore(model.start(), model.successors, model.check)


@pytest.mark.parametrize("name", SOUND)
def test_no_interleaving_breaks_the_protocol(name: str) -> None:
    result = run(SOUND[name])
    assert result.violation is None, str(result)
    assert result.states > 1000  # a model that hardly moves shows nothing


@pytest.mark.parametrize(("bugs", "name"), [(bugs, name) for bugs, names in SEEDED.items() for name in names])
def test_a_seeded_bug_is_found(bugs: Any, name: str) -> None:
    model = SEEDED[bugs][name]
    result = run(dataclasses.replace(model, bugs=bugs(**{name: True})))
    assert result.violation is not None, f"{name}: not found in {result.states} states"
    assert result.trace


def test_every_bug_is_seeded() -> None:
    for bugs, names in SEEDED.items():
        assert set(names) == {f.name for f in dataclasses.fields(bugs)}

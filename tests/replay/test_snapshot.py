"""A request that is stopped, kept as a file and resumed goes on as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sage_edge.engines.build import open_engine
from sage_edge.engines.null import NullRunner
from sage_edge.errors import InputError, IntegrityError
from sage_edge.irp.halting import Bools, Entropy, History
from sage_edge.pool import Answer, Pool
from sage_edge.snapshot import FORMAT, Snapshot, load_snapshot, save_snapshot

REQUEST = {"inputs": np.array([9, 2, 3, 4], np.int32)}


@pytest.fixture
def runner() -> Iterator[NullRunner]:
    with NullRunner(4) as active:
        yield active


def taken(runner: NullRunner, steps: int = 3, halt: Any = "learned") -> Snapshot:
    pool = Pool(runner, slots=1)
    ticket = pool.submit(REQUEST, halt)
    for _ in range(steps):
        pool.tick()
    return pool.snapshot(ticket)


def same(a: Answer, b: Answer) -> None:
    assert (a.steps, a.reason) == (b.steps, b.reason)
    np.testing.assert_array_equal(a.prediction, b.prediction)
    np.testing.assert_array_equal(a.trace, b.trace)


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("halt", ["learned", "patience:2", "slope:0.01,3", "full"])
def test_a_resumed_request_ends_as_if_it_had_never_stopped(
    runner: NullRunner, tmp_path: Path, steps: int, halt: str
) -> None:
    save_snapshot(tmp_path / "s.safetensors", taken(runner, steps, halt))
    expected = Pool(runner, slots=1).submit(REQUEST, halt).result()
    with NullRunner(2) as other:  # another process's engine: another batch size, busy with others
        pool = Pool(other)
        pool.submit({"inputs": np.array([5, 5, 5, 5])})
        same(pool.resume(load_snapshot(tmp_path / "s.safetensors")).result(), expected)


def test_a_real_engine_continues_with_the_same_bits(tiny_engine: Path, tmp_path: Path) -> None:
    request = {"inputs": np.arange(6), "puzzle_identifiers": np.array(2)}
    path = tmp_path / "s.safetensors"
    with open_engine(tiny_engine, threads=1) as first:
        pool = Pool(first)
        tickets = [pool.submit(request, "full") for _ in range(3)]
        pool.tick()
        pool.tick()
        save_snapshot(path, pool.snapshot(tickets[1]))
        pool.run_until_idle()
        expected = tickets[1].result()
    with open_engine(tiny_engine, threads=1) as second:
        pool = Pool(second)
        for _ in range(3):
            pool.submit({"inputs": np.zeros(6, int), "puzzle_identifiers": np.array(0)})
        same(pool.resume(load_snapshot(path)).result(), expected)


def test_time_goes_on_where_it_stopped(runner: NullRunner) -> None:
    times = iter((0.0, 1.0, 100.0, 101.0, 102.0))
    now = 0.0
    pool = Pool(runner, clock=lambda: now)
    ticket = pool.submit(REQUEST, "deadline:2500 or max_steps:9")
    for _ in range(2):
        now = next(times)
        pool.tick()
    snapshot = pool.snapshot(ticket)
    assert (snapshot.steps, snapshot.elapsed_ms) == (2, 1000)
    now = 100.0
    later = Pool(runner, clock=lambda: now)
    resumed = later.resume(snapshot)
    for _ in range(3):
        now = next(times)
        later.tick()
    assert (resumed.result().steps, resumed.result().reason) == (5, "deadline:2500")


def test_only_a_request_in_flight_can_be_kept(runner: NullRunner) -> None:
    pool = Pool(runner)
    ticket = pool.submit(REQUEST)
    with pytest.raises(InputError, match="not in flight"):
        pool.snapshot(ticket)
    ticket.result()
    with pytest.raises(InputError, match="not in flight"):
        pool.snapshot(ticket)


def test_a_policy_whose_text_says_less_than_it_is_is_refused(runner: NullRunner) -> None:
    assert taken(runner, halt=Entropy(0.5)).halt == "entropy:0.5"
    assert taken(runner, halt=Entropy(1 / 3)).halt == f"entropy:{1 / 3!r}"

    class Moody(Entropy):
        """Prints as an ordinary threshold and decides otherwise."""

        def halts(self, history: History) -> Bools:
            return np.zeros(len(history.steps), dtype=bool)

    with pytest.raises(InputError, match="submit it as text"):
        taken(runner, halt=Moody(0.5))


def test_every_truncation_and_every_changed_byte_is_refused(runner: NullRunner, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_snapshot(path, taken(runner))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(IntegrityError):
            load_snapshot(path)
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(IntegrityError):
            load_snapshot(path)
    path.write_bytes(content)
    assert load_snapshot(path).steps == 3


def test_other_models_other_files_and_other_shapes_are_refused(runner: NullRunner, tmp_path: Path) -> None:
    snapshot = taken(runner)
    runner.digest = "1" * 64
    with pytest.raises(IntegrityError, match="taken from model 000000000000, this engine is 111111111111"):
        Pool(runner).resume(snapshot)
    runner.digest = "0" * 64
    fields = {name: getattr(snapshot, name) for name in Snapshot.__dataclass_fields__}
    with pytest.raises(InputError, match="none is left"):
        Pool(runner).resume(Snapshot(**{**fields, "max_steps": 3}))
    wrong = {name: array[:, :2] for name, array in snapshot.arrays.items()}
    with pytest.raises(InputError, match="found shape"):
        Pool(runner).resume(Snapshot(**{**fields, "arrays": wrong}))
    path = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match="no such file"):
        load_snapshot(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(IntegrityError, match="no snapshot"):
        load_snapshot(path)


def test_the_file_is_what_the_module_says(runner: NullRunner, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save_snapshot(path, taken(runner))
    arrays = load_file(path)
    assert sorted(arrays) == ["history", "state.context", "state.z_H"]
    assert arrays["history"].shape == (3, 4)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    facts = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["snapshot"])
    assert facts["format"] == FORMAT
    assert facts["halt"] == "learned"

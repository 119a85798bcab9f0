"""The protocol carries what has no network: a closed form, and a memory that outlives requests and processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from sage_edge.errors import InputError
from sage_edge.irp.conformance import check_plugin
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.spec import EnergyRange, PluginSpec, load_spec
from sage_edge.sharing.loop import Loop
from tests.irp_plugins import Countdown, Fuse, Remember, spec


def faults(plugin: Plugin[Any]) -> list[str]:
    with plugin:
        return [f"{finding.name}: {finding.detail}" for finding in check_plugin(plugin) if not finding.passed]


def test_a_closed_form_is_a_plugin_of_one_step() -> None:
    assert faults(Fuse()) == []
    with Loop({"fuse": Fuse()}) as loop:
        answer = loop.submit("fuse", {"measured": np.array([2.0, 4.0, 3.0])}).result()
    assert answer.result == {"mean": 9 / 4, "variance": 1 / 4}
    assert (answer.steps, answer.reason) == (1, "max_steps:1")
    assert answer.energies.tolist() == [0.25]


def test_a_store_outlives_requests_and_processes(tmp_path: Path) -> None:
    store = tmp_path / "memory.json"
    with Loop({"remember": Remember(store)}) as loop:
        loop.submit("remember", {"cue": np.array([1.0, 2.0])}).result()
        recalled = loop.submit("remember", {"cue": np.array([1.2, 2.1])}).result()
        np.testing.assert_allclose(recalled.result["recalled"], [1, 2], atol=1e-4)
        loop.submit("remember", {"cue": np.array([9.0, 9.0])}).cancel()
    with Loop({"remember": Remember(store)}) as loop:  # another process would open the same file
        plugin = loop.plugins["remember"]
        assert isinstance(plugin, Remember)
        assert len(plugin.kept) == 2, "what was cancelled is not remembered"
        recalled = loop.submit("remember", {"cue": np.array([0.8, 1.7])}).result()
        np.testing.assert_allclose(recalled.result["recalled"], [1, 2], atol=1e-4)


def test_a_request_in_flight_does_not_see_what_is_stored_meanwhile(tmp_path: Path) -> None:
    plugin = Remember(tmp_path / "memory.json")
    with plugin:
        plugin.kept = [[0.0, 0.0]]
        state = plugin.init_state({"cue": np.array([1.0, 1.0])})
        plugin.commit(plugin.init_state({"cue": np.array([1.0, 1.0])}), "full")
        for index in range(6):
            state = plugin.step(state, index)
        np.testing.assert_allclose(plugin.result(state)["recalled"], [0, 0], atol=1e-5)


def test_the_memory_conforms(tmp_path: Path) -> None:
    assert faults(Remember(tmp_path / "memory.json")) == []


@dataclass
class Everything:
    array: np.ndarray
    number: int
    share: float
    flag: bool
    name: str


class Holder(Plugin[Everything]):
    state_type: ClassVar[type | None] = Everything

    def init_state(self, observation: Observation) -> Everything:
        return Everything(np.arange(3.0), 7, 0.1, True, "Grüße")

    def step(self, state: Everything, index: int) -> Everything:
        return state

    def energy(self, state: Everything) -> float:
        return 0.0

    def result(self, state: Everything) -> Result:
        return {"name": state.name}


def test_a_dataclass_is_packed_and_unpacked_field_by_field() -> None:
    plugin = Holder(spec("holder", 1))
    state = plugin.init_state({})
    again = plugin.unpack(plugin.pack(state))
    np.testing.assert_array_equal(again.array, state.array)
    assert (again.number, again.share, again.flag, again.name) == (7, 0.1, True, "Grüße")
    assert type(again.number) is int
    assert type(again.flag) is bool


def test_a_state_that_cannot_be_packed_says_what_to_do() -> None:
    class Odd(Holder):
        state_type = None

    with pytest.raises(NotImplementedError, match="set state_type"):
        Odd(spec("odd", 1)).pack(Odd(spec("odd", 1)).init_state({}))


def test_arrays_and_dicts_of_arrays_need_no_code() -> None:
    plugin = Countdown()
    np.testing.assert_array_equal(plugin.pack(np.arange(3))["state"], [0, 1, 2])  # type: ignore[arg-type]
    assert set(plugin.pack({"a": np.zeros(2), "b": np.ones(1)})) == {"a", "b"}  # type: ignore[arg-type]


def test_certified_without_a_certificate_is_refused_with_the_command_that_makes_one() -> None:
    with pytest.raises(InputError, match="sage-edge plugin calibrate count"):
        Countdown().policy("certified")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name: Reason", "expected lower case letters"),
        ("entry: plugin.py", "expected FILE:CLASS"),
        ("max_steps: 0", "expected at least 1"),
        ("energy_range: {best: 2, untouched: 1}", "expected a number below untouched"),
        ("invariants: {state_space: '', noise_model: x, energy: x, coherence: x}", "expected a sentence"),
        ("colour: red", "unknown key 'colour'"),
        ("bench: {calibration: a, test: b, quality: q, unit: 0}", "unit must be positive"),
    ],
)
def test_a_wrong_plugin_yaml_is_refused_naming_the_field(change: str, message: str, tmp_path: Path) -> None:
    good = Path(__file__).resolve().parents[2] / "plugins_irp" / "reason" / "plugin.yaml"
    key = change.partition(":")[0]
    kept, skipping = [], False
    for line in good.read_text().splitlines():
        skipping = line.startswith(f"{key}:") or (skipping and line.startswith(" "))
        if not skipping:
            kept.append(line)
    (tmp_path / "plugin.yaml").write_text("\n".join([*kept, change]) + "\n")
    with pytest.raises(InputError, match=r"plugin\.yaml, line \d+: ") as error:
        load_spec(tmp_path)
    assert message in str(error.value)


def test_energies_are_compared_by_their_declared_range() -> None:
    span = EnergyRange(-2.0, 2.0)
    assert [span.normalise(e) for e in (-3.0, -2.0, 0.0, 2.0, 5.0)] == [0, 0, 0.5, 1, 1]


def test_examples_must_match_in_number() -> None:
    with pytest.raises(ValueError, match="as many of each"):
        Examples([{}], [1, 2])


def test_the_default_contribution_is_the_share_of_energy_that_is_gone() -> None:
    plugin = Holder(PluginSpec(**{**vars(spec("holder", 3)), "energy_range": EnergyRange(0.0, 4.0)}))
    assert plugin.contribution([3.0, 1.0]) == 0.75
    assert plugin.contribution([9.0]) == -1.0

"""`sage-edge plugin new NAME`: a folder that is a working plugin from the first minute, to be changed bit by bit."""

from __future__ import annotations

import re
from pathlib import Path

from sage_edge.errors import InputError
from sage_edge.files import write_atomic
from sage_edge.irp.spec import NAME, PLUGIN_FILE

YAML = """\
format: sage-edge-plugin/1
name: {name}
version: 0.1.0
entry: plugin:{kind}
summary: Smooths a noisy signal, step by step (replace this)
invariants:
  state_space: a signal of any length
  noise_model: Gaussian noise on every sample, of unknown size
  energy: squared norm of the objective's gradient over that of the untouched signal; 0 at the optimum
  coherence: share of the gradient that is gone
max_steps: 40
energy_range: {{best: 0.0, untouched: 1.0}}  # what a perfect answer has; what knowing nothing has
halt: energy:0.001 or slope:0.0001,3  # until `sage-edge plugin calibrate {name}` has made a certificate
options: {{weight: 4.0}}  # keyword arguments of {kind}
bench:
  calibration: calibration  # whatever examples(source, limit) understands
  test: test
  quality: 1 - error left / error at the start
  unit: 1.0
  max_loss: 0.02
"""

PYTHON = '''\
"""{name}: what it refines, in one sentence.

Observation: `signal`, float [n]. Result: `signal`, float32 [n].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.errors import InputError
from sage_edge.irp.plugin import Examples, Observation, Plugin, Result
from sage_edge.irp.spec import PluginSpec

Signal = npt.NDArray[np.float64]


@dataclass
class State:
    """One request: all that a step needs, as arrays, numbers and strings."""

    noisy: Signal
    x: Signal
    start: float  # squared norm of the gradient at the untouched signal


class {kind}(Plugin[State]):
    """Gradient descent on |x - noisy|^2 / 2 + weight |differences of x|^2 / 2, which has one optimum."""

    state_type = State  # lets pack and unpack take the state apart

    def __init__(self, spec: PluginSpec, weight: float = 4.0) -> None:
        super().__init__(spec)
        self.weight = weight

    def init_state(self, observation: Observation) -> State:
        if "signal" not in observation:
            raise InputError("{name}: `signal` is missing: expected float [n]")
        noisy = np.asarray(observation["signal"], np.float64)
        if noisy.ndim != 1 or len(noisy) < 2 or not np.isfinite(noisy).all():
            raise InputError(f"{name}: signal: expected float [n], n >= 2, all finite, found shape {{list(noisy.shape)}}")
        state = State(noisy, noisy.copy(), 1.0)
        state.start = max(float((self._gradient(state) ** 2).sum()), 1e-30)
        return state

    def step(self, state: State, index: int) -> State:
        # 1 / (1 + 4 weight) is one over the largest curvature, so that no step overshoots.
        return State(state.noisy, state.x - self._gradient(state) / (1 + 4 * self.weight), state.start)

    def energy(self, state: State) -> float:
        return float((self._gradient(state) ** 2).sum()) / state.start

    def result(self, state: State) -> Result:
        return {{"signal": state.x.astype(np.float32)}}

    def _gradient(self, state: State) -> Signal:
        slope = np.diff(state.x)
        rough = np.concatenate(([-slope[0]], slope[:-1] - slope[1:], [slope[-1]]))
        return state.x - state.noisy + self.weight * rough

    # For `sage-edge plugin calibrate` and `sage-edge bench --suite irp`: data, and how good a result is. Use real data.

    def examples(self, source: str, limit: int | None = None) -> Examples:
        seeds = {{"calibration": 1, "test": 2}}
        if source not in seeds:
            raise InputError(f"{name}: examples {{source!r}}: expected calibration or test")
        rng = np.random.default_rng(seeds[source])
        pairs = [_example(rng) for _ in range(min(limit or 800, 800))]
        return Examples([{{"signal": noisy}} for noisy, _ in pairs], pairs)

    def quality(self, result: Result, reference: Any) -> float:
        noisy, clean = reference
        return 1 - float(((result["signal"] - clean) ** 2).sum() / ((noisy - clean) ** 2).sum())


def _example(rng: np.random.Generator) -> tuple[Signal, Signal]:
    """A noisy signal and the clean one."""
    time = np.linspace(0, 1, 128)
    clean = np.sin(2 * np.pi * (rng.uniform(0.5, 3) * time + rng.uniform()))
    return clean + rng.uniform(0.1, 0.5) * rng.standard_normal(len(time)), clean
'''

TEST = '''\
"""Run with `pytest {folder}`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sage_edge.irp.conformance import check_plugin
from sage_edge.irp.registry import open_plugin
from sage_edge.sharing.loop import Loop

FOLDER = Path(__file__).resolve().parent


def test_it_conforms() -> None:
    with open_plugin(FOLDER) as plugin:
        assert not [f"{{f.name}}: {{f.detail}}" for f in check_plugin(plugin) if not f.passed]


def test_it_answers_in_the_loop() -> None:
    signal = np.array([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    with Loop({{"{name}": open_plugin(FOLDER)}}) as loop:
        answer = loop.submit("{name}", {{"signal": signal}}).result()
    assert np.abs(np.diff(answer.result["signal"])).max() < 1
    assert answer.steps <= 40
'''


def new_plugin(name: str, parent: Path) -> Path:
    """Write the folder parent/name: plugin.yaml, plugin.py, test_plugin.py. Raises InputError when it exists or the name is
    none (lower case letters, digits, - and _)."""
    if not re.fullmatch(NAME, name):
        raise InputError(f"plugin name {name!r}: expected lower case letters, digits, - and _, a letter first")
    folder = parent / name
    if folder.exists():
        raise InputError(f"{folder}: exists already; choose another name or --dir")
    kind = "".join(part.capitalize() for part in re.split(r"[-_]", name)) or name
    facts = {"name": name, "kind": kind, "folder": folder}
    for file, template in ((PLUGIN_FILE, YAML), ("plugin.py", PYTHON), ("test_plugin.py", TEST)):
        write_atomic(folder / file, template.format(**facts))
    return folder

"""Plots are made from traces of any model, with or without a certificate."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from sage_edge.bench.plots import draw
from sage_edge.errors import MissingDependencyError
from sage_edge.irp.traces import Traces
from tests.unit.test_certificate import certificate
from tests.unit.traces_fixture import recorded


@pytest.mark.parametrize("kind", ["recorded", "certified", "never right", "entropy only"])
def test_three_pictures_are_written(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    traces = recorded().take(np.arange(120))
    if kind == "never right":
        traces = dataclasses.replace(traces, exact=np.zeros_like(traces.exact))
    if kind == "entropy only":
        traces = Traces(traces.signals[:, :, 2:3], traces.exact, traces.token_accuracy, ("entropy_mean",))
    written = draw(traces, certificate(max_steps=8) if kind == "certified" else None, tmp_path / "p", kind)
    assert [path.name for path in written] == ["threshold.png", "energy.png", "steps.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in written)
    assert len(list((tmp_path / "p").iterdir())) == 3


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sage-edge\[plots\]'"):
        draw(recorded(), None, tmp_path, "x")

"""The oldest Python that we promise (JetPack 6) and the newest (JetPack 7): does the package install and answer there?

From 3.12 on the compiled core is one module for all later versions.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SENT_AND_TAKEN = """
import numpy as np
from sage_edge.mailbox import Mailbox, PortSpec, _native
assert _native.__file__.endswith(".so") and {marker!r} in _native.__file__, _native.__file__
spec = PortSpec("focus", 3, dtype="float32", shape=(4, None), max_bytes=96)
with Mailbox("abi").focus("camera", spec) as port:
    with port.loan((4, 6)) as loan:
        loan.array[:] = np.arange(24).reshape(4, 6)
        loan.send(view=loan.array[:, ::2])
    with port.receive(1) as item:
        assert item.array.tolist() == np.arange(24).reshape(4, 6)[:, ::2].tolist()
        assert float(np.from_dlpack(item).sum()) == item.array.sum() == 132
"""
ANSWERED = """
import numpy as np
import sage_edge
row, column = np.divmod(np.arange(81), 9)
solution = (2 + (3 * (row % 3) + row // 3 + column) % 9).astype(np.int32)
holes = np.random.default_rng(0).permutation(81)[:30]
puzzle = solution.copy()
puzzle[holes] = 1
with sage_edge.load("sudoku9") as session:
    (answer,) = session.infer({"inputs": puzzle[None]}, halt="learned")
assert (answer.prediction == solution).all(), answer
"""


def python(version: str) -> str | None:
    """Path of a Python of this version, also of one that pyenv would hand out."""
    try:
        done = subprocess.run(
            [f"python{version}", "-c", "import sys; print(sys.executable)"],
            env={**os.environ, "PYENV_VERSION": version}, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@pytest.mark.parametrize(("version", "marker"), [("3.10", "cpython-310"), ("3.12", "abi3")])
def test_the_package_installs_and_answers(version: str, marker: str, tmp_path: Path) -> None:
    if (found := python(version)) is None:
        pytest.skip(f"no Python {version} here")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYENV_VERSION")}
    clean["SAGE_EDGE_SHM"] = str(tmp_path / "shm")

    def run(*command: str | Path) -> None:
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

    run(found, "-m", "venv", "venv")
    run("venv/bin/pip", "install", "--quiet", ROOT)
    run("venv/bin/python", "-c", SENT_AND_TAKEN.format(marker=marker))
    run("venv/bin/python", "-c", ANSWERED)

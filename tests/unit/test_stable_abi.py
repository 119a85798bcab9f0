"""From Python 3.12 on the compiled core is one module for all later versions: does it build and work there?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SENT_AND_TAKEN = """
import numpy as np
from sage_edge.mailbox import Mailbox, PortSpec, _native
assert _native.__file__.endswith(".abi3.so"), _native.__file__
spec = PortSpec("focus", 3, dtype="float32", shape=(4, None), max_bytes=96)
with Mailbox("abi").focus("camera", spec) as port:
    with port.loan((4, 6)) as loan:
        loan.array[:] = np.arange(24).reshape(4, 6)
        loan.send(view=loan.array[:, ::2])
    with port.receive(1) as item:
        assert item.array.tolist() == np.arange(24).reshape(4, 6)[:, ::2].tolist()
        assert float(np.from_dlpack(item).sum()) == item.array.sum() == 132
"""


def python312() -> str | None:
    """Path of a Python 3.12, also of one that pyenv would hand out."""
    try:
        done = subprocess.run(
            ["python3.12", "-c", "import sys; print(sys.executable)"], env={**os.environ, "PYENV_VERSION": "3.12"},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def test_the_native_core_builds_and_works_on_python_3_12(tmp_path: Path) -> None:
    if (python := python312()) is None:
        pytest.skip("no Python 3.12 here")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYENV_VERSION")}
    clean["SAGE_EDGE_SHM"] = str(tmp_path / "shm")

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=clean, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout

    run(python, "-m", "venv", "venv")
    run("venv/bin/pip", "install", "--quiet", "--no-deps", ROOT, "numpy", "pyyaml")
    run("venv/bin/python", "-c", SENT_AND_TAKEN)

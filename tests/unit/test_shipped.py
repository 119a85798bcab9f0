"""The reference model as it travels: in the repository, in the wheel, in the README."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.dataset import load_dataset
from sage_edge.evaluate import collect, score
from sage_edge.models import REFERENCE_MODEL, load, shipped

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "export" / REFERENCE_MODEL


def test_the_shipped_bundle_is_the_shipped_checkpoint() -> None:
    from sage_edge.export.recipe import read_recipe
    from sage_edge.files import sha256

    recipe = read_recipe(MODEL)
    assert recipe.checkpoint_sha256 == sha256(MODEL / "checkpoint.safetensors")
    assert load_bundle(MODEL / "bundle").provenance.checkpoint_sha256 == recipe.checkpoint_sha256


def test_the_shipped_engine_passes_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", REFERENCE_MODEL]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_the_shipped_model_solves_what_it_never_saw() -> None:
    """A floor far below its accuracy (see the model card): what is caught here is a broken model, not a weak one."""
    folder = shipped(REFERENCE_MODEL)
    assert folder is not None
    data = load_dataset(folder / "data").first(96)
    with load(REFERENCE_MODEL) as session:
        traces = collect(session, data, session.runner.model.max_steps)
    full, learned = score(traces, "full"), score(traces, "learned")
    assert full.exact_accuracy > 0.75
    assert learned.exact_accuracy > full.exact_accuracy - 0.05
    assert learned.mean_steps < 0.75 * full.mean_steps


def test_shipped_splits_share_no_grid_up_to_symmetry() -> None:
    pytest.importorskip("numba")
    spec = importlib.util.spec_from_file_location("sudoku9_generate", MODEL / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = generate
    spec.loader.exec_module(generate)
    hashes = []
    for split in ("test", "calibration"):
        data = load_dataset(MODEL / "data" / split)
        solution = (data.labels - 1).astype(np.uint8)
        puzzle = (data.inputs - 1).astype(np.uint8)
        assert ((puzzle == 0) | (puzzle == solution)).all()
        assert ((puzzle == 0).sum(1) == data.attributes["holes"]).all()
        hashes.append(generate.canonical_hash(solution, solution))
    assert len(np.unique(np.concatenate(hashes))) == sum(map(len, hashes))


def test_the_readmes_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    programs = [block for block in blocks if "import sage_edge" in block]  # the others are fragments
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    outputs = []
    for program in programs:
        (tmp_path / "example.py").write_text(program)
        command = [sys.executable, str(tmp_path / "example.py")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert re.fullmatch(r"[1-9]{81} \d+ \S.*\n", outputs[0])
    assert len(outputs) == 2


def test_the_readme_names_every_command() -> None:
    from sage_edge.cli.main import parser

    text = (REPOSITORY / "README.md").read_text()
    commands = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert commands is not None
    assert all(f"`sage-edge {name}" in text for name in commands)


def test_a_wheel_brings_the_model_and_benches_in_an_empty_folder(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("sage_edge-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("tests")]
        assert "sage_edge/recipes/engines/orin-nano-fp16.yaml" in archive.namelist()
        archive.extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    # -S: an editable installation's import hook would come before the unpacked wheel.
    paths = [str(tmp_path / "site"), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-m", "sage_edge.cli", "bench", "--examples", "8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=environment)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["accuracy"]["examples"] == 8
    assert report["accuracy"]["data"].startswith(str(tmp_path / "site"))
    assert report["commit"] is None
    assert [p.name for p in empty.rglob("*.json")] == ["sudoku9-" + report["machine"]["architecture"] + "-release.json"]
    command = [sys.executable, "-S", "-m", "sage_edge.cli", "plugin", "ls", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=empty, env=environment)
    assert done.returncode == 0, done.stderr
    found = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert found["reason"]["where"].startswith(str(tmp_path / "site"))
    assert not found["reason"]["error"]

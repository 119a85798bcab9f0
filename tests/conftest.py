"""Shared fixtures: a private engine cache, and one tiny HRM exported and built once a session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from sage_edge.specs import HRMConfig

if TYPE_CHECKING:
    from sage_edge.export.hrm import HRM

# No test here measures time, so none may fail for being slow.
settings.register_profile("house", deadline=None)
settings.load_profile("house")

SHARED = Path(__file__).resolve().parents[2] / "shared"

TINY = HRMConfig(
    vocab_size=7,
    seq_len=6,
    hidden_size=32,
    num_heads=2,
    H_layers=1,
    L_layers=2,
    H_cycles=2,
    L_cycles=2,
    halt_max_steps=4,
    num_puzzle_identifiers=3,
    puzzle_emb_ndim=40,
)


def pytest_configure(config: pytest.Config) -> None:
    """Workers that share the cores compute on one thread each: the threads of many small products would wait for each other
    most of the time."""
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's engine cache must neither help a test nor be touched by one."""
    path = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SAGE_EDGE_CACHE")
    os.environ["SAGE_EDGE_CACHE"] = str(path)
    yield path
    if before is None:
        del os.environ["SAGE_EDGE_CACHE"]
    else:
        os.environ["SAGE_EDGE_CACHE"] = before


@pytest.fixture
def mailbox_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private place in shared memory for the ports of one test, removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="sage-edge-test-", dir="/dev/shm"))
    monkeypatch.setenv("SAGE_EDGE_SHM", str(path))
    yield path
    shutil.rmtree(path)


def tiny_hrm(config: HRMConfig = TINY) -> HRM:
    """A seeded HRM whose heads and puzzle embeddings say something, as a trained one's would."""
    torch = pytest.importorskip("torch")
    from sage_edge.export.hrm import HRM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = HRM(config).eval()
        torch.nn.init.normal_(model.q_head.weight, std=0.3)
        if config.puzzle_emb_ndim:
            torch.nn.init.normal_(model.puzzle_emb.weights, std=0.5)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny HRM as a model folder (recipe.yaml, checkpoint.safetensors)."""
    model = tiny_hrm()
    from sage_edge.export.model_folder import save_model_folder

    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model_folder(folder, model.state_dict(), name="tiny", config=TINY, source="seeded, untrained")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_model_folder: Path) -> Path:
    """The tiny HRM's bundle."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.checkpoint import open_model

    recipe, model = open_model(tiny_model_folder)
    path = tiny_model_folder.parent / "bundle"
    export_bundle(model, recipe, path)
    return path


@pytest.fixture(scope="session")
def tiny_engine(tiny_bundle: Path) -> Path:
    """The tiny HRM's CPU engine."""
    from sage_edge.engines.build import BuildRecipe, build

    return build(tiny_bundle, BuildRecipe(slots=4)).path

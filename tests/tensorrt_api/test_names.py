"""Every name of TensorRT that the code touches exists in NVIDIA's own bindings of every supported release."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tensorrt_api import stubs
from tests.tensorrt_api.names import Use, missing, names_of_stub, uses

SOURCES = sorted((stubs.REPOSITORY / "sage_edge" / "engines").glob("tensorrt*.py"))


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    """The stubs by release. CI has made them before (`make tensorrt-api`), where a failure is a failure."""
    try:
        return stubs.make(stubs.DEFAULT)
    except stubs.UnavailableError as error:
        pytest.skip(f"no stubs of TensorRT's bindings: {error}")


@pytest.fixture(scope="module")
def releases(folders: dict[str, Path]) -> dict[str, set[str]]:
    return {version: names_of_stub(folder / "tensorrt.pyi") for version, folder in folders.items()}


def test_the_stubs_are_those_of_the_releases(releases: dict[str, set[str]]) -> None:
    """Facts that differ between the releases, so that no stub can stand for another."""
    assert set(releases) == {"10.3.0", "10.16.1.11", "11.4.0.106"}
    assert "BuilderFlag.FP16" in releases["10.3.0"]
    assert "BuilderFlag.FP16" not in releases["11.4.0.106"]
    assert "NetworkDefinitionCreationFlag.EXPLICIT_BATCH" not in releases["11.4.0.106"]
    assert "BuilderFlag.MONITOR_MEMORY" in releases["10.16.1.11"] - releases["10.3.0"]
    assert "Logger.log" in releases["10.3.0"]


def test_every_name_exists_in_every_release(releases: dict[str, set[str]]) -> None:
    found = [use for source in SOURCES for use in uses(source)]
    assert len(found) > 0
    wrong = {str(use): lacking for use in found if (lacking := missing(use, releases))}
    assert not wrong


def test_a_name_that_does_not_exist_is_found(releases: dict[str, set[str]], tmp_path: Path) -> None:
    source = tmp_path / "tensorrt_bad.py"
    source.write_text(
        "flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)\n"
        "config.set_flag(trt.BuilderFlag.FP16)\n"
        "optional_member(trt.BuilderFlag, 'FP16')\n"
        "optional_member(trt.BuilderFlag, 'FP17')\n"
        "trt.Bilder(logger)\n"
    )
    wrong = {use.name: missing(use, releases) for use in uses(source)}
    assert wrong["NetworkDefinitionCreationFlag.STRONGLY_TYPED"] == []
    assert missing(Use("BuilderFlag.FP16", False, "", 0), releases) == ["11.4.0.106"]
    assert missing(Use("BuilderFlag.FP16", True, "", 0), releases) == []
    assert wrong["BuilderFlag.FP17"] == wrong["Bilder"] == list(releases)


def test_the_stand_in_for_tensorrt_has_no_name_that_the_real_one_lacks(releases: dict[str, set[str]]) -> None:
    """The tests of tests/devices run against it; a method that only it had would prove nothing."""
    pytest.importorskip("cuda.bindings.runtime")
    from tests.devices import fake_tensorrt

    found = set()
    for name, value in vars(fake_tensorrt).items():
        if isinstance(value, type) and value.__module__ == fake_tensorrt.__name__ and name != "Behaviour":
            members = value.__members__ if issubclass(value, enum.Enum) else vars(value)
            found |= {name, *(f"{name}.{member}" for member in members if not member.startswith("_"))}
    assert len(found) > 80
    lacking = {
        name: versions for name in found if (versions := [v for v, names in releases.items() if name not in names])
    }
    assert lacking == {"NetworkDefinitionCreationFlag.EXPLICIT_BATCH": ["11.4.0.106"]}


def test_mypy_rejects_what_a_release_does_not_have(folders: dict[str, Path], tmp_path: Path) -> None:
    """What the AST cannot see, methods of objects, mypy does; here that it does."""
    source = tmp_path / "bad.py"
    source.write_text("import tensorrt as trt\n\n\ndef f(b: trt.Builder) -> None:\n    b.build_engine()\n")
    environment = os.environ | {"MYPYPATH": str(folders["11.4.0.106"])}
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert '"Builder" has no attribute "build_engine"' in done.stdout

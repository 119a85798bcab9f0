"""CUDA's driver as far as it goes without a GPU: imported when asked for, honest when it cannot, its names the official ones."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from typing import Any

import pytest

from sage_edge.errors import MissingDependencyError, SageError
from sage_edge.mailbox import cuda, devices, driver
from sage_edge.mailbox.memory import memory_kind
from sage_edge.mailbox.null_driver import NullDriver

KINDS = ("shm+cuda", "vmm")


def test_cuda_is_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from sage_edge.mailbox import Mailbox, PortSpec, devices, device_port\n"
        "assert not [m for m in sys.modules if m == 'cuda' or m.startswith('cuda.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_cuda_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if _has_gpu():
        pytest.skip("this machine has a CUDA device: tests/gpu has more to say")
    monkeypatch.setattr(devices, "make_driver", cuda.CudaDriver)
    for kind in KINDS:
        with pytest.raises(MissingDependencyError, match="(no CUDA driver|cuda.bindings)"):
            memory_kind(kind)


def test_every_cuda_name_exists_in_the_official_bindings() -> None:
    """Calls, constants and enumeration members that cuda.py uses, in the installed cuda.bindings."""
    bindings = pytest.importorskip("cuda.bindings.driver", reason="cuda.bindings is not installed (sage-edge[cuda])")
    tree = ast.parse(inspect.getsource(cuda))
    called = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_call"
        and node.args and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    attributes = {
        f"CU_DEVICE_ATTRIBUTE_{node.args[0].value!s}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_attribute"
        and isinstance(node.args[0], ast.Constant)
    }  # fmt: skip
    assert len(called) >= 20
    assert len(attributes) >= 7
    assert {str(name) for name in called if not hasattr(bindings, str(name))} == set()
    assert {name for name in attributes if not hasattr(bindings.CUdevice_attribute, name)} == set()
    chains = {chain for node in ast.walk(tree) if (chain := _chain(node)).startswith("self.cuda.")}
    assert len(chains) >= 10
    for chain in sorted(chains):
        found: Any = bindings
        for part in chain.split(".")[2:]:
            assert hasattr(found, part), f"{chain}: {part} is not in cuda.bindings.driver"
            found = getattr(found, part)


def _chain(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_chain(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _has_gpu() -> bool:
    try:
        cuda.CudaDriver()
    except SageError:
        return False
    return True


def test_both_drivers_keep_the_contract() -> None:
    wanted = {name for name in vars(driver.Driver) if not name.startswith("_")}
    assert len(wanted) >= 15
    for kind in (NullDriver, cuda.CudaDriver):
        for name in wanted:
            ours, theirs = inspect.signature(getattr(driver.Driver, name)), inspect.signature(getattr(kind, name))
            assert list(ours.parameters) == list(theirs.parameters), f"{kind.__name__}.{name}"

# SPDX-License-Identifier: Apache-2.0
"""The child process that opens pickles: it does its work, runs nobody's code, and stays within its limits."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors.numpy import load_file  # noqa: E402

from sage_edge.errors import InputError  # noqa: E402
from sage_edge.export._unpickle import HOOK, NAMESPACE, check_archive, convert, unpickle  # noqa: E402
from sage_edge.export.checkpoint import import_checkpoint, open_model  # noqa: E402
from tests.unit.original_format import random_weights, tiny, write_checkpoint  # noqa: E402

ROOT = Path(__file__).parents[2]
LIMIT = 1 << 30


class Malicious:
    """What a pickle can do to whoever opens it without care."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def complaint(source: Path, destination: Path, max_bytes: int = LIMIT, timeout: float = 120) -> str:
    with pytest.raises(InputError) as caught:
        unpickle(source, destination, max_bytes, timeout)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    assert "weights_only" not in message
    return message


def test_a_checkpoint_goes_through_the_child(tmp_path: Path) -> None:
    config = tiny()
    weights = random_weights(config)
    narrow = {name: torch.from_numpy(array).bfloat16() for name, array in weights.items()}
    folder = write_checkpoint(tmp_path / "c", config, narrow)
    found, imported, info = import_checkpoint(folder)
    assert (found, info.dtype) == (config, "bfloat16")
    assert info.isolation in (NAMESPACE, HOOK)
    assert all(np.array_equal(imported[name], array) for name, array in weights.items())


def test_dtypes_layouts_and_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    torch.save(
        {"a": base, "b": base.T, "c": torch.tensor([1, 2]), "d": torch.zeros(2, dtype=torch.float64)}, tmp_path / "s"
    )
    conversion = unpickle(tmp_path / "s", tmp_path / "o", LIMIT, 120)
    assert conversion.dtypes == {"a": "float16", "b": "float16", "c": "int64", "d": "float64"}
    arrays = load_file(tmp_path / "o")
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        "a": "float32", "b": "float32", "c": "int64", "d": "float64"
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["b"], base.float().numpy().T)


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    witness, folder = tmp_path / "witness", tmp_path / "c"
    write_checkpoint(folder, tiny())
    torch.save({"a": torch.zeros(2), "b": Malicious(witness)}, folder / "step_7")
    # The file is a real attack: whoever unpickles it plainly runs the command.
    with zipfile.ZipFile(folder / "step_7") as archive:
        payload = archive.read("step_7/data.pkl")
    assert b"touch" in payload
    with pytest.raises(InputError) as caught:
        open_model(folder)
    assert not witness.exists()
    message = str(caught.value)
    assert message.startswith(f"{folder / 'step_7'}: refused: it is not a plain dict of tensors (the pickle asks for ")
    assert message.endswith(".system)")  # posix.system, and no advice to load it all the same


def test_a_folder_cannot_slip_its_own_torch_under_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is on the module path of `python -m`."""
    folder = write_checkpoint(tmp_path / "c", tiny())
    (folder / "torch.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w')")
    monkeypatch.chdir(folder)
    import_checkpoint(Path())
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(2)], "not a state dict"),
        ({1: torch.zeros(2)}, "not a state dict: expected names"),
        ({"a": {"b": torch.zeros(2)}}, "'a' is of type dict, expected a tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "'a': expected a dense tensor of real numbers"),
        ({"a": torch.zeros(2).to_sparse()}, "'a': expected a dense tensor of real numbers"),
        (torch.nn.Linear(2, 2), "the pickle asks for torch.nn.modules.linear.Linear"),
    ],
    ids=["list", "numbers as keys", "nested", "complex", "sparse", "module"],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, tmp_path / "s")
    with (tmp_path / "s").open("rb") as handle, pytest.raises(InputError) as caught:
        convert(handle, tmp_path / "o")
    assert expected in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_memory_is_limited(tmp_path: Path) -> None:
    """Four bytes that say they are 12 GiB: the limit must stop them, not the size of the machine."""
    torch.save({"a": torch.zeros(1).expand(3 << 30)}, tmp_path / "s")
    assert "could not be read (RuntimeError): " in complaint(tmp_path / "s", tmp_path / "o")


def test_time_is_limited(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "s")
    assert "took longer than 0.01 s and was stopped" in complaint(tmp_path / "s", tmp_path / "o", timeout=0.01)


def test_size_is_limited(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, tiny())
    with pytest.raises(InputError, match="more than the limit of 1000"):
        import_checkpoint(folder, max_bytes=1000)
    with pytest.raises(InputError, match="more than the limit of 1000"):
        open_model(folder, max_bytes=1000)


def test_files_that_are_no_whole_archive(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    torch.save({"a": torch.zeros(3000)}, whole)
    data = whole.read_bytes()
    cuts = [data[:n] for n in (0, 1, 4, 100, len(data) // 2, len(data) - 30, len(data) - 1)]
    for content in [*cuts, b"hello", pickle.dumps({"a": 1}), data[:-22] + b"\xff" * 22]:
        path = tmp_path / "broken"
        path.write_bytes(content)
        assert "truncated or not a checkpoint" in complaint(path, tmp_path / "o")
    assert "cannot be read: No such file" in complaint(tmp_path / "absent", tmp_path / "o")
    assert check_archive(whole, LIMIT) == len(data)


def test_a_damaged_pickle_inside_a_whole_archive(tmp_path: Path) -> None:
    source = tmp_path / "s"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("s/data.pkl", b"\x80\x02}q\x00(X")
        archive.writestr("s/version", b"3\n")
    complaint(source, tmp_path / "o")


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    for name, entries, compression, expected in (
        ("foreign", {"a/other": b"x"}, zipfile.ZIP_STORED, "holds no data.pkl"),
        ("two", {"a/data.pkl": b"x", "b/data.pkl": b"x"}, zipfile.ZIP_STORED, "holds no data.pkl"),
        ("bomb", {"a/data.pkl": bytes(1 << 20)}, zipfile.ZIP_DEFLATED, "compressed or overlap"),
    ):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content)
        assert expected in complaint(tmp_path / name, tmp_path / "o")


def run_python(code: str, *arguments: str) -> str:
    """Stdout of `code` in a Python of its own; namespaces and audit hooks cannot be undone in this one."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


CONNECT = """
import socket, sys
from sage_edge.export import _unpickle
isolated = _unpickle.isolate() if sys.argv[2] == "yes" else None
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5).close()
    print(isolated, "connected")
except OSError:
    print(isolated, "unreachable")
"""


def test_the_namespace_reaches_no_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        assert run_python(CONNECT, port, "no") == "None connected"
        outcome = run_python(CONNECT, port, "yes")
    if outcome.startswith("False"):
        pytest.skip("this kernel or container forbids network namespaces; the audit hook stands alone here")
    assert outcome == "True unreachable"


@pytest.mark.parametrize(
    "action",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import ctypes; ctypes.CDLL('libc.so.6')",
    ],
)
def test_the_hook_refuses_sockets_and_processes(action: str) -> None:
    code = "import sys, ctypes, socket, subprocess; from sage_edge.export._unpickle import forbid; forbid()\ntry:\n    "
    code += "exec(sys.argv[1])\nexcept PermissionError as error:\n    print('forbidden', error)"
    assert run_python(code, action).startswith("forbidden ")

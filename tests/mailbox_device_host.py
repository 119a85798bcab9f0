"""device.cuh as host code: built once a session, for the tests that run the device side without a device."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

MAILBOX = Path(__file__).resolve().parents[1] / "mailbox"
SOURCES = (MAILBOX / "tests" / "device_host.cpp", MAILBOX / "src" / "layout.cpp")


@functools.cache
def device_host() -> ctypes.CDLL:
    """The library of mailbox/tests/device_host.cpp, with the C++ layout beside it; skips the test without a C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler: the device code is not run as host code")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", str(MAILBOX / "include")]
    with tempfile.TemporaryDirectory() as folder:  # what is loaded needs its file no more
        library = Path(folder) / "device_host.so"
        subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(library)], check=True, timeout=300)
        return ctypes.CDLL(str(library))

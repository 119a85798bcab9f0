"""The device side of the mailbox without a device: compiled by nvcc where there is one, and its numbers against the layout."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.mailbox_device_host import MAILBOX, device_host


def find_nvcc() -> str | None:
    """nvcc of the PATH, of $CUDA_HOME, or of the wheels nvidia-cuda-nvcc and nvidia-cuda-nvcc-cu12."""
    places = [Path(os.environ["CUDA_HOME"]) / "bin"] if "CUDA_HOME" in os.environ else []
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels.submodule_search_locations or []) if wheels else []:
        places += [path.parent for path in sorted(Path(root).glob("*/bin/nvcc"))]
    return shutil.which("nvcc") or next(
        (found for place in places if (found := shutil.which("nvcc", path=place))), None
    )


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc here: device code is not compiled")


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_87", "sm_90"])
def test_device_code_compiles(architecture: str, tmp_path: Path) -> None:
    command = [
        str(find_nvcc()),
        "-std=c++17",
        f"-arch={architecture}",
        "-Werror",
        "all-warnings",
        "-I",
        str(MAILBOX / "include"),
    ]
    done = subprocess.run(
        [*command, "-cubin", "-o", str(tmp_path / "pump.cubin"), str(MAILBOX / "device" / "pump.cu")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "pump.cubin").stat().st_size > 1000


@needs_nvcc
def test_every_access_to_shared_words_is_of_system_scope(tmp_path: Path) -> None:
    """The default scope of PTX would be the device alone: the CPU must see it, too."""
    ptx = tmp_path / "pump.ptx"
    command = [str(find_nvcc()), "-std=c++17", "-arch=sm_87", "-ptx", "-I", str(MAILBOX / "include"), "-o", str(ptx)]
    subprocess.run([*command, str(MAILBOX / "device" / "pump.cu")], check=True, capture_output=True, timeout=300)
    text = ptx.read_text()
    found = re.findall(
        r"^\s*(?:@\S+ )?((?:atom|red|fence|ld\.relaxed|ld\.acquire|st\.relaxed|st\.release)\S*)", text, re.M
    )
    assert {name.split(".")[0] for name in found} == {"atom", "red", "fence", "ld", "st"}
    assert [name for name in found if ".sys" not in name] == []
    assert "fence.sc.sys;" in found


@pytest.fixture(scope="session")
def host() -> ctypes.CDLL:
    return device_host()


@given(slots=st.integers(1, 1024), rings=st.integers(1, 64), data=st.data())
def test_offsets_are_those_of_the_layout(host: ctypes.CDLL, slots: int, rings: int, data: st.DataObject) -> None:
    ring, record_bytes = data.draw(st.integers(0, rings - 1)), data.draw(st.integers(1, 256))
    assert host.device_host_offsets(slots, rings, ring, record_bytes) == 0


@given(
    slot=st.integers(0, 3),
    ticket=st.integers(1, (1 << 48) - 1),
    right=st.booleans(),
    dtype=st.integers(0, 17),
    axes=st.integers(0, 10),
    strided=st.booleans(),
    extent=st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)), min_size=8, max_size=8),
    pages=st.integers(1, 1 << 28),
)
def test_descriptors_are_judged_as_by_the_host(
    host: ctypes.CDLL,
    slot: int,
    ticket: int,
    right: bool,
    dtype: int,
    axes: int,
    strided: bool,
    extent: list[int],
    pages: int,
) -> None:
    identity = ticket << 16 | slot if right else ticket << 16 | (slot + 1)
    raw = struct.pack("<QQIIHHBBBB8I", identity, 0, 0, 0, 0, 0, dtype, axes | 0x80 * strided, 1, 0, *extent)
    assert host.device_host_agrees(raw, slot, ctypes.c_ulonglong(ticket), ctypes.c_ulonglong(pages * 4096)) == 1

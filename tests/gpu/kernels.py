"""Compiles mailbox/device/pump.cu for the device at hand (NVRTC, else nvcc) and launches its kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from sage_edge.mailbox.cuda import CudaDriver
from sage_edge.mailbox.device_port import include_directory

SOURCE = Path(__file__).resolve().parents[2] / "mailbox" / "device" / "pump.cu"


class Kernels:
    """The module on one device. Raises RuntimeError when there is neither NVRTC nor nvcc."""

    def __init__(self, driver: CudaDriver, folder: Path) -> None:
        self.driver = driver
        architecture = (
            f"sm_{driver._attribute('COMPUTE_CAPABILITY_MAJOR')}{driver._attribute('COMPUTE_CAPABILITY_MINOR')}"
        )
        image = _nvrtc(architecture) or _nvcc(architecture, folder)
        driver._enter()
        self.module = driver._call("cuModuleLoadData", np.frombuffer(image, np.uint8).ctypes.data)

    def launch(self, name: str, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
        """arguments: NumPy scalars, or bytes for structures passed by value. Returns at once."""
        function = self.driver._call("cuModuleGetFunction", self.module, name.encode())
        values = [np.frombuffer(bytearray(a), np.uint8) if isinstance(a, bytes) else np.array([a]) for a in arguments]
        addresses = np.array([value.ctypes.data for value in values], np.uint64)
        self.driver._enter()
        self.driver._call(
            "cuLaunchKernel",
            function,
            blocks,
            1,
            1,
            threads,
            1,
            1,
            0,
            self.driver._stream(stream),
            addresses.ctypes.data,
            0,
        )


def _nvrtc(architecture: str) -> bytes | None:
    try:
        from cuda.bindings import nvrtc

        status, program = nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"pump.cu", 0, [], [])
    except (ImportError, RuntimeError):
        return None
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS
    options = [b"--std=c++17", f"--gpu-architecture={architecture}".encode(), f"-I{include_directory()}".encode()]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC: {log.decode(errors='replace')}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    image: bytes = b" " * size
    nvrtc.nvrtcGetCUBIN(program, image)
    return image


def _nvcc(architecture: str, folder: Path) -> bytes:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise RuntimeError("neither NVRTC (nvidia-cuda-nvrtc) nor nvcc is here")
    output = folder / "pump.cubin"
    command = [nvcc, "-std=c++17", f"-arch={architecture}", "-I", str(include_directory()), "-cubin", "-o", str(output)]
    subprocess.run([*command, str(SOURCE)], check=True, timeout=300)
    return output.read_bytes()

"""The only place that opens a pickle: a torch checkpoint becomes safetensors in a child process with narrow limits.

    python -m sage_edge.export._unpickle SOURCE DESTINATION MEMORY_BYTES OUTPUT_BYTES

What guards what, from the strongest to the weakest:

- `torch.load(weights_only=True)` builds tensors and plain containers and calls nothing else that the pickle names.
- Before that, the parent refuses files that are too large, truncated, or compressed (a small file that unpacks large).
- The child may map only so much memory beyond torch itself, write only so many bytes to a file, and is killed when its
  time is up.
- Network: the child moves into an empty network namespace, so that neither Python nor native code reaches any address
  (sockets in the file system stay reachable). Kernels and containers may forbid that; the audit hook, set in any case,
  then stands alone: it refuses sockets and new processes that Python code asks for, and does not see native code.
  `Conversion.isolation` says which of the two was had. Files are not hidden: the child reads what the user may read.

The child says what is wrong in one line on stdout and exits with 2; any other end is described by the parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sage_edge.errors import InputError

CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
NAMESPACE, HOOK = "network namespace and audit hook", "audit hook only"
FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "pty.", "ctypes.dlopen"
)  # fmt: skip
NOT_A_CHECKPOINT = "truncated or not a checkpoint (expected a zip archive as torch.save writes it)"
HEADER_BYTES = 16 << 20  # for the safetensors header, and so that tiny files have room


@dataclass(frozen=True)
class Conversion:
    """`dtypes`: tensor name to its dtype in the pickle, e.g. "bfloat16"; `isolation`: NAMESPACE or HOOK."""

    dtypes: dict[str, str]
    isolation: str


def unpickle(source: Path, destination: Path, max_bytes: int, timeout: float) -> Conversion:
    """Convert the torch state dict `source` to the safetensors file `destination`, in a child process.

    float16 and bfloat16 are widened to float32; other dtypes are kept for the caller to judge. Raises InputError, one
    line naming `source`, for anything that is not a state dict of tensors within the limits.
    """
    size = check_archive(source, max_bytes)
    # Twice the file when float16 becomes float32; in memory the file, its float32 form and its bytes live side by side.
    limits = (6 * size + (1 << 30), 2 * size + HEADER_BYTES)
    command = [sys.executable, "-m", __name__, str(source.resolve()), str(destination.resolve()), *map(str, limits)]
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    # One thread and one arena: else glibc reserves 64 MiB of address space for every thread, against the memory limit.
    environment = os.environ | {
        "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    try:
        # `-m` searches the working directory first: it must be ours, the destination's, not one with a foreign torch.py
        child = subprocess.run(
            command, cwd=destination.parent, env=environment, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{source}: reading it took longer than {timeout:g} s and was stopped") from error
    answer = child.stdout.decode(errors="replace").strip().splitlines()
    if child.returncode == 0 and answer:
        return Conversion(**json.loads(answer[-1]))
    if child.returncode == 2 and answer:
        raise InputError(f"{source}: {answer[-1]}")
    how = f"was killed by signal {-child.returncode}" if child.returncode < 0 else f"ended with {child.returncode}"
    raise InputError(f"{source}: could not be read: the process that unpickles it {how}")


def check_archive(source: Path, max_bytes: int) -> int:
    """Size of `source`, in bytes. Raises InputError when it is no whole torch zip archive of at most `max_bytes`."""
    try:
        size = source.stat().st_size
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    if size > max_bytes:
        raise InputError(f"{source}: {size} bytes, more than the limit of {max_bytes}; raise the limit if you trust it")
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged directory: BadZipFile, NotImplementedError, UnicodeDecodeError, struct.error
        raise InputError(f"{source}: {NOT_A_CHECKPOINT}") from error
    if sum(entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl") for entry in entries) != 1:
        raise InputError(f"{source}: {NOT_A_CHECKPOINT}: it holds no data.pkl")
    # torch stores its records; compressed or overlapping ones are how a small archive unpacks to a huge one.
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise InputError(f"{source}: its records are compressed or overlap, which torch.save does not do; refused")
    return size


def convert(source: IO[bytes], destination: Path) -> dict[str, str]:
    """Write the state dict in `source` to `destination`; returns the original dtype of each tensor. Runs in the child.

    Raises InputError (without the file's name) for content that is not a flat dict of dense tensors.
    """
    import pickle

    import torch
    from safetensors.numpy import save_file

    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's text advises to load without weights_only; that advice must not reach anybody.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"the pickle asks for {asked.group(1)}" if asked else "the pickle is damaged or unusual"
        raise InputError(f"refused: it is not a plain dict of tensors ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise InputError("not a state dict: expected names with tensors")
    arrays: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for key in list(state):
        value = state.pop(key)  # released at once, so that both forms are never held in full
        if not isinstance(value, torch.Tensor):
            raise InputError(f"not a state dict: {key!r} is of type {type(value).__name__}, expected a tensor")
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise InputError(f"{key!r}: expected a dense tensor of real numbers, found {value.dtype}, {value.layout}")
        dtypes[key] = str(value.dtype).removeprefix("torch.")
        widened = value.detach().float() if value.is_floating_point() and value.itemsize < 4 else value.detach()
        arrays[key] = widened.contiguous().numpy()
    save_file(arrays, destination)
    return dtypes


def isolate() -> bool:
    """Move this process into an empty network namespace; False when the kernel does not let it.

    Must run before any thread starts, hence before torch is imported: a user namespace takes single-threaded processes.
    """
    try:
        unshare = ctypes.CDLL(None, use_errno=True).unshare  # os.unshare exists only from Python 3.12 on
    except (OSError, AttributeError):
        return False
    # A root that need not enter a user namespace keeps its right to read other users' files, torch among them.
    return any(unshare(flags) == 0 for flags in (CLONE_NEWNET, CLONE_NEWUSER | CLONE_NEWNET))


def forbid() -> None:
    """From now on Python code of this process that asks for a socket or a new process gets a PermissionError."""

    def hook(event: str, _: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is forbidden while a checkpoint is read")

    sys.addaudithook(hook)


def limit(memory: int, output: int) -> None:
    """Cap what this process may map beyond what it has mapped now, and the size of a file it may write, in bytes."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (output, output))


def main(arguments: list[str]) -> int:
    source, destination, memory, output = arguments
    try:
        with open(source, "rb") as handle:  # before the namespace, which may cost the right to open it
            isolation = NAMESPACE if isolate() else HOOK
            # Imported before the limits: how much torch maps differs by gigabytes between its builds.
            import safetensors.numpy  # noqa: F401
            import torch

            torch.set_num_threads(1)
            forbid()
            limit(int(memory), int(output))
            dtypes = convert(handle, Path(destination))
    except Exception as error:
        kind = "" if isinstance(error, InputError) else f"could not be read ({type(error).__name__}): "
        print(kind + " ".join(str(error).split())[:300])
        return 2
    print(json.dumps({"dtypes": dtypes, "isolation": isolation}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

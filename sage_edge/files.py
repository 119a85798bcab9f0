"""Files that are whole or absent: atomic writes and digests."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sage_edge.errors import InputError


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that `path` holds either the old or the new content, never a part (temporary, fsync, rename)."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def require_writable(path: Path) -> None:
    """Find out before long work that `path` can become a file after it. Raises InputError."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written: {folder} is no folder that you may write to; name another")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file beside `path`; when the block ends well it is synced and renamed to `path`, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o644)  # mkstemp gives 0600; artefacts are shared like any other file
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_directory(path: Path, marker: str) -> Iterator[Path]:
    """Give a temporary directory beside `path`; when the block ends well it takes `path`'s place, else it is removed.

    Raises InputError when `path` exists, is not empty and does not hold `marker`: such a folder is not ours to replace.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: a folder was expected here, but it is a file; choose another output")
    if path.is_dir() and any(path.iterdir()) and not (path / marker).exists():
        raise InputError(f"{path}: not empty and holds no {marker}, so it is not replaced; choose another output")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        temporary.chmod(0o755)
        retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
        try:
            if path.exists():
                path.rename(retired / "old")
            temporary.rename(path)
        finally:
            shutil.rmtree(retired, ignore_errors=True)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

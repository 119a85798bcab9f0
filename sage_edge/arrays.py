"""Reading and writing .npz files: plain arrays only, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sage_edge.errors import InputError
from sage_edge.files import replacing
from sage_edge.specs import Array


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file. Raises InputError when it is none, or holds pickled objects."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an .npz file of arrays")
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: a single array; expected an .npz file with named arrays (np.savez)")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except InputError:
        raise
    except Exception as error:  # zipfile, zlib, NumPy and struct errors have no base class in common
        raise InputError(f"{path}: not an .npz file of plain arrays: {error}") from error


def write_npz(path: Path, arrays: dict[str, Array]) -> None:
    """Write arrays to an .npz file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as handle:
        np.savez_compressed(handle, **arrays)  # type: ignore[arg-type]

"""One door to TensorRT: what is installed, and enum members that only some releases have.

Modules called tensorrt_* import `tensorrt` at their top and are therefore imported only after `require` said that it is
there. All of them are type-checked against NVIDIA's own bindings of 10.3, 10.16 and 11.4 (`make tensorrt-api`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, TypeVar

from sage_edge.errors import MissingDependencyError

if TYPE_CHECKING:
    import tensorrt as trt

Member = TypeVar("Member")
OLDEST = (10, 3)  # strongly typed networks with opset 19, JetPack 6.2


def require(what: str) -> str:
    """The version of TensorRT. Raises MissingDependencyError when it cannot be imported or is too old; `what` needs it."""
    try:
        module = importlib.import_module("tensorrt")
    except ImportError as error:
        # On a Jetson, TensorRT comes with JetPack's Debian packages and is invisible inside a plain virtual environment.
        raise MissingDependencyError(
            f"{what} needs TensorRT, which cannot be imported ({error}); on a Jetson: apt install python3-libnvinfer and a "
            "virtual environment made with --system-site-packages; elsewhere: pip install 'sage-edge[tensorrt]'"
        ) from error
    version: str = module.__version__
    if numbers(version) < OLDEST:
        raise MissingDependencyError(
            f"{what} needs TensorRT {'.'.join(map(str, OLDEST))} or newer; found {version} (JetPack 6.2 brings 10.3)"
        )
    return version


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.16.1.11" gives (10, 16, 1, 11)."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def optional_member(enum: type[Member], name: str) -> Member | None:
    """A member that this release may not have. Enum *values* differ between releases, so it is always looked up by name."""
    found: Member | None = getattr(enum, name, None)
    return found


def network_flags(network: type[trt.NetworkDefinitionCreationFlag]) -> int:
    """Creation flags of a strongly typed network: precision is what the graph says, the only way that 11 knows."""
    flags = 1 << int(network.STRONGLY_TYPED)
    batch = optional_member(network, "EXPLICIT_BATCH")  # absent in 11, where there is nothing else
    return flags if batch is None else flags | 1 << int(batch)

"""sage-edge: run recurrent refinement models (HRM) that halt as soon as they are done.

import sage_edge
with sage_edge.load("sudoku9") as session:
    answers = session.infer({"inputs": puzzles}, halt="learned")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Answer", "SageError", "Session", "load"]

if TYPE_CHECKING:
    from sage_edge.errors import SageError
    from sage_edge.models import load
    from sage_edge.runtime import Answer, Session

_HOME = {"load": "models", "Answer": "runtime", "Session": "runtime", "SageError": "errors"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import sage_edge` and `sage-edge --help` stay quick."""
    if name in _HOME:
        import importlib

        return getattr(importlib.import_module(f"sage_edge.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sage_edge' has no attribute {name!r}")

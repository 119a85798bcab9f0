"""TensorRT's own messages: kept, so that an error can say what TensorRT said."""

from __future__ import annotations

import threading

import tensorrt as trt

KEPT = 8  # lines in an error message


class BuildLog(trt.ILogger):
    """Collects errors and warnings; nothing is printed. Called from TensorRT's threads."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._lock = threading.Lock()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        with self._lock:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(msg)

    @property
    def out_of_memory(self) -> bool:
        """Whether an error says that an allocation failed."""
        words = ("out of memory", "outofmemory", "failed to allocate", "mem_alloc", "insufficient memory")
        return any(word in line.lower() for line in self.errors for word in words)

    def text(self, otherwise: str = "TensorRT gave no reason") -> str:
        """The last errors as one line."""
        lines = [" ".join(line.split()) for line in self.errors[-KEPT:]]
        return "; ".join(lines) or otherwise

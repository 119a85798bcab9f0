"""One graph of a model as something a device can run: what TensorRT, ONNX Runtime and torch have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from sage_edge.engines.accelerator import Device, Stream


class Execution(ABC):
    """A graph at one number of slots.

    not_capturable: why its work must not be captured as a device graph; empty where it can be. captures_itself: it makes
    device graphs of its own, and nobody else should; own_graphs: how many; not_captured: why it gave that up, empty if not.
    """

    not_capturable: str = ""
    captures_itself: bool = False
    own_graphs: int = 0
    not_captured: str = ""

    @abstractmethod
    def enqueue(self, stream: Stream, addresses: Mapping[str, int]) -> None:
        """Run once on `stream`; `addresses` gives the device address of every input and output by name."""


class Program(ABC):
    """A graph; nothing is loaded before `open`."""

    @abstractmethod
    def open(self, device: Device, stream: Stream) -> None:
        """Load onto an open device; all work will come on `stream`. Raises InputError for a file that does not load."""

    @abstractmethod
    def execution(self, slots: int) -> Execution:
        """Prepare to run `slots` slots. Raises OutOfMemoryError when there is no room for it beside what is prepared."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back, executions included. May be called twice; `open` may follow."""

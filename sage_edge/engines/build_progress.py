"""Progress of a long build that reports nested phases from its own threads, and Ctrl-C that reaches it.

While TensorRT builds, the main thread sits in C++ and Python's signal handlers do not run. The interpreter still writes
the signal's number to a wake-up descriptor at once, from C: whoever reports progress looks there.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Report = Callable[[str, float], None]


@dataclass
class Phase:
    """A phase of `steps` steps, `done` of them done, inside step `slot` of its parent."""

    name: str
    parent: Phase | None
    steps: int
    slot: int
    done: int = 0


class BuildProgress:
    """Turns phases into one fraction; thread-safe. report(name of the innermost phase, 0..1), never falling."""

    def __init__(self, title: str, report: Report, interrupted: Callable[[], bool] = lambda: False) -> None:
        self.title = title
        self._report = report
        self._interrupted = interrupted
        self._phases: dict[str, Phase] = {}
        self._lock = threading.Lock()
        self._furthest = 0.0
        self.cancelled = False

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            above = self._phases.get(parent) if parent else None
            self._phases[name] = Phase(name, above, max(1, steps), above.done if above else 0)
        self._show(name)

    def step(self, name: str, step: int) -> bool:
        """Step number `step` (from 0) is done. False: the build must stop."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = max(phase.done, step + 1)
        self._show(name)
        if self._interrupted():
            self.cancelled = True
        return not self.cancelled

    def finish(self, name: str) -> None:
        with self._lock:
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = phase.steps
        self._show(name)
        with self._lock:
            self._phases.pop(name, None)

    def _show(self, name: str) -> None:
        with self._lock:
            phase = self._phases.get(name)
            if phase is None:
                return
            self._furthest = fraction = max(self._furthest, _fraction(phase))
        self._report(f"{self.title}: {name}", fraction)


def _fraction(phase: Phase | None) -> float:
    """How far the whole is: a phase fills the step of its parent in which it began."""
    inner = 0.0
    while phase is not None:
        # The parent's step that this phase fills may have been counted already.
        inner = min(1.0, (max(phase.done, 0) + (inner if phase.done < phase.steps else 0.0)) / phase.steps)
        if phase.parent is None:
            return inner
        begun, above = phase.slot, phase.parent
        inner = inner if above.done <= begun else 0.0
        phase = above
    return inner


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Give a function that says, from any thread, whether Ctrl-C was pressed in the block; it does not raise there.

    Outside of the main thread, where signals cannot be asked for, it always says no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def asked() -> bool:
        while select.select([reader], [], [], 0)[0]:
            if signal.SIGINT in os.read(reader, 64):
                pressed.set()
        return pressed.is_set()

    try:
        yield asked
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGINT, before)
        os.close(reader)
        os.close(writer)

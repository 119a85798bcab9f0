"""Clocks for the loop: the system's, one that moves when told to, and one that says again what another one said."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from sage_edge.errors import SageError

NAP_S = 0.005  # the longest sleep at a time: somebody may submit a request meanwhile


class Clock(Protocol):
    """Seconds, monotonic. epoch: what to add for seconds since 1970."""

    epoch: float

    def now(self) -> float: ...

    def sleep_until(self, moment: float) -> None: ...


class SystemClock:
    """time.monotonic."""

    def __init__(self) -> None:
        self.epoch = time.time() - time.monotonic()

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, moment: float) -> None:
        time.sleep(max(0.0, min(moment - time.monotonic(), NAP_S)))


class SimulatedClock:
    """Stands still but for `advance` and `sleep_until`."""

    def __init__(self) -> None:
        self.epoch = 0.0
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def sleep_until(self, moment: float) -> None:
        self._now = max(self._now, moment)


class RecordingClock:
    """Another clock, whose readings are kept until they are taken."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.epoch = clock, clock.epoch
        self._readings: list[float] = []

    def now(self) -> float:
        reading = self._clock.now()
        self._readings.append(reading)
        return reading

    def sleep_until(self, moment: float) -> None:
        self._clock.sleep_until(moment)

    def taken(self) -> list[float]:
        """The readings since the last call."""
        readings, self._readings = self._readings, []
        return readings


class ReadingsDifferError(SageError):
    """A replay asked the clock more or less often than the recorded run did (exit code 1)."""

    exit_code = 1


class ReplayClock:
    """Gives the readings that it was fed, in their order."""

    def __init__(self, epoch: float) -> None:
        self.epoch = epoch
        self._readings: deque[float] = deque()

    def feed(self, readings: list[float]) -> None:
        if self._readings:
            raise ReadingsDifferError(f"{len(self._readings)} recorded clock readings were not asked for")
        self._readings.extend(readings)

    def now(self) -> float:
        if not self._readings:
            raise ReadingsDifferError("the clock was read more often than in the recorded run")
        return self._readings.popleft()

    def sleep_until(self, moment: float) -> None:
        pass

"""Whether to start the next step before the last one's signals are read.

Started early, the step hides the time that the host needs to look at the signals and to come back. Started in vain
(the request halted, a slot was refilled), it delays whatever comes next by up to a step. Pure: numbers in, decision out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MEMORY = 0.1  # weight of the newest observation: about ten steps are remembered


@dataclass(frozen=True)
class Foresight:
    """Running means: stops: share of steps after which the state was not simply refined again; gap_s: from the return
    of a step to the call for the next; step_s: of a step itself. None: not observed yet."""

    stops: float | None = None
    gap_s: float | None = None
    step_s: float | None = None

    def continued(self, gap_s: float) -> Foresight:
        """The same state was refined again after `gap_s` seconds."""
        return replace(self, stops=_mean(self.stops, 0.0), gap_s=_mean(self.gap_s, gap_s))

    def stopped(self) -> Foresight:
        """The state was changed or given up instead."""
        return replace(self, stops=_mean(self.stops, 1.0))

    def took(self, step_s: float) -> Foresight:
        """A step that was waited for from its start took `step_s` seconds."""
        return replace(self, step_s=_mean(self.step_s, step_s))

    @property
    def pays(self) -> bool:
        """Whether the expected time saved exceeds the expected time lost; False as long as too little is known."""
        if self.stops is None or self.gap_s is None or self.step_s is None:
            return False
        return (1 - self.stops) * min(self.gap_s, self.step_s) > self.stops * self.step_s


def _mean(old: float | None, new: float) -> float:
    return new if old is None else (1 - MEMORY) * old + MEMORY * new

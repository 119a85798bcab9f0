"""Energy that the device has used, from whatever sensor the machine has. A machine without one has none: None, never 0.

Known: Intel RAPL (`/sys/class/powercap/intel-rapl:N/energy_uj`, a counter of microjoules that wraps at
`max_energy_range_uj`; Linux Documentation/power/powercap) and INA3221 rails as on Jetson (hwmon: `inN_input` in mV times
`currN_input` in mA; Documentation/hwmon/ina3221), whose power is integrated between readings.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sage_edge.errors import InputError

SYSFS = Path("/sys")
TOTAL_RAIL = "VDD_IN"  # the whole module, on every Jetson Orin board


class EnergySensor:
    """`read()` gives millijoules since the sensor was opened, rising."""

    name = ""

    def read(self) -> float:
        raise NotImplementedError


class Rapl(EnergySensor):
    """The sum of all CPU packages."""

    name = "intel-rapl"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = zones
        self._last = [_number(zone / "energy_uj") for zone in zones]
        self._ranges = [_number(zone / "max_energy_range_uj") for zone in zones]
        self._total = 0.0

    def read(self) -> float:
        for index, zone in enumerate(self._zones):
            now = _number(zone / "energy_uj")
            gone = now - self._last[index]
            self._total += gone if gone >= 0 else gone + self._ranges[index]
            self._last[index] = now
        return self._total / 1e3


class Ina3221(EnergySensor):
    """Power of one rail, integrated by trapezoids between readings; blind to what happens between them."""

    name = "ina3221"

    def __init__(self, volts: Path, amperes: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._volts, self._amperes, self._clock = volts, amperes, clock
        self._total = 0.0
        self._time, self._power = clock(), self._watts()

    def _watts(self) -> float:
        return _number(self._volts) * _number(self._amperes) / 1e6

    def read(self) -> float:
        now, power = self._clock(), self._watts()
        self._total += (now - self._time) * (power + self._power) / 2 * 1e3
        self._time, self._power = now, power
        return self._total


def find_sensor(sysfs: Path = SYSFS) -> EnergySensor | None:
    """The machine's sensor, or None when there is none or it may not be read (RAPL asks for root on most systems)."""
    for label in sorted(sysfs.glob("class/hwmon/hwmon*/in*_label")):
        if _text(label) == TOTAL_RAIL:
            number = label.name.removeprefix("in").removesuffix("_label")
            volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            if _readable(volts) and _readable(amperes):
                return Ina3221(volts, amperes)
    zones = [z for z in sorted(sysfs.glob("class/powercap/intel-rapl:*")) if z.name.count(":") == 1]
    if zones and all(_readable(zone / "energy_uj") and _readable(zone / "max_energy_range_uj") for zone in zones):
        return Rapl(zones)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _readable(path: Path) -> bool:
    return _text(path).lstrip("-").isdigit()


def _number(path: Path) -> float:
    text = _text(path)
    if not text.lstrip("-").isdigit():
        raise InputError(f"{path}: the energy sensor cannot be read any more; run without a budget in millijoules")
    return float(text)

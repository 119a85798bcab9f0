"""Energy sensors, on trees of files laid out as the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_edge.errors import InputError
from sage_edge.sharing.power import Ina3221, Rapl, find_sensor


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n")


def rapl(root: Path, microjoules: int, zone: str = "intel-rapl:0") -> None:
    write(root / "class/powercap" / zone / "energy_uj", microjoules)
    write(root / "class/powercap" / zone / "max_energy_range_uj", 1_000_000)


def test_no_sensor_is_none(tmp_path: Path) -> None:
    assert find_sensor(tmp_path) is None


def test_rapl_sums_packages_and_survives_its_wrap(tmp_path: Path) -> None:
    rapl(tmp_path, 999_000)
    rapl(tmp_path, 500_000, "intel-rapl:1")
    rapl(tmp_path, 123, "intel-rapl:0:0")  # a part of a package, counted in it already
    sensor = find_sensor(tmp_path)
    assert isinstance(sensor, Rapl)
    rapl(tmp_path, 2_000)
    rapl(tmp_path, 504_000, "intel-rapl:1")
    assert sensor.read() == pytest.approx(3.0 + 4.0)
    assert sensor.read() == pytest.approx(7.0)


def test_ina3221_integrates_the_rail_of_the_whole_module(tmp_path: Path) -> None:
    hwmon = tmp_path / "class/hwmon/hwmon3"
    for number, label, volts, amperes in ((1, "VDD_IN", 5000, 1000), (2, "VDD_CPU_GPU_CV", 5000, 400)):
        write(hwmon / f"in{number}_label", label)
        write(hwmon / f"in{number}_input", volts)
        write(hwmon / f"curr{number}_input", amperes)
    found = find_sensor(tmp_path)
    assert isinstance(found, Ina3221)
    assert 0 <= found.read() < 5000 * 10
    now = 0.0
    sensor = Ina3221(hwmon / "in1_input", hwmon / "curr1_input", lambda: now)
    now = 2.0
    write(hwmon / "curr1_input", 3000)
    assert sensor.read() == pytest.approx(2 * (5 + 15) / 2 * 1e3)


def test_a_sensor_that_may_not_be_read_is_none_and_one_that_vanishes_says_so(tmp_path: Path) -> None:
    rapl(tmp_path, 1)
    sensor = find_sensor(tmp_path)
    assert sensor is not None
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").write_text("")
    assert find_sensor(tmp_path) is None
    with pytest.raises(InputError, match="cannot be read any more"):
        sensor.read()

"""Roofline arithmetic by hand, the cache that it plays against, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sage_edge.bench.roofline import Cache, Ceilings, ceilings_of, known_devices, predict
from sage_edge.bench.this_machine import copy_ceiling, last_cache_mib
from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.engines.graph_cost import GraphCost, NodeCost
from sage_edge.errors import InputError

MIB = 1 << 20


def product(name: str, weight: str, mib: int, gflop: float, kind: str = "fp32") -> NodeCost:
    return NodeCost(name, "MatMul", kind, int(gflop * 1e9), ((weight, mib * MIB),), ((name, 1000),))


def cost(*nodes: NodeCost) -> GraphCost:
    return GraphCost(1, nodes, 0, 0, ())


def ceilings(l2_mib: float | None) -> Ceilings:
    return Ceilings({"fp32": 1.0, "fp16": 10.0}, dram_gbs=100, l2_mib=l2_mib, source="a test")


def test_an_operator_takes_the_longer_of_arithmetic_and_memory() -> None:
    nodes = (product("a", "wa", 10, gflop=1.0), product("b", "wb", 10, gflop=0.001))
    found = predict("refine", cost(*nodes), ceilings(None))
    moved = 10 * MIB / 100e9 * 1e3
    assert found.milliseconds == pytest.approx(1.0 + moved, rel=1e-3)  # a: 1 ms of arithmetic; b: its weights
    assert found.dram_mib == pytest.approx(20, abs=0.1)
    assert (found.bound, found.weights_resident) == ("compute", False)
    assert found.intensity == pytest.approx(1.001e9 / (20 * MIB), rel=1e-3)


def test_weights_that_fit_stay_from_step_to_step() -> None:
    nodes = (product("a", "wa", 10, gflop=0.001), product("b", "wb", 10, gflop=0.001))
    assert predict("refine", cost(*nodes), ceilings(21)).weights_resident
    partly = predict("refine", cost(*nodes), ceilings(19))
    assert not partly.weights_resident
    assert partly.weights_read_mib == 20  # round and round through too small a cache: nothing is ever still there
    assert predict("refine", cost(*nodes), ceilings(21)).intensity is None


def test_a_module_used_twice_in_a_row_is_read_once() -> None:
    """L, L, H with 8 MiB each in a cache of 10: the second L finds its weights, the next step does not."""
    nodes = (product("a", "L", 8, 0.001), product("b", "L", 8, 0.001), product("c", "H", 8, 0.001))
    assert predict("refine", cost(*nodes), ceilings(10)).weights_read_mib == 16


def test_a_type_without_a_figure_counts_as_the_next_wider_one() -> None:
    nodes = (product("a", "w", 1, gflop=1.0, kind="int8"),)
    assert predict("refine", cost(*nodes), ceilings(8)).milliseconds == pytest.approx(0.1)
    with pytest.raises(ValueError, match="must hold fp32"):
        Ceilings({"fp16": 1.0}, 1, None, "")


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache = Cache(3)
    assert [cache.touch(name, 1) for name in "abcaded"] == [False, False, False, True, False, False, True]
    assert "b" not in cache
    assert "c" not in cache
    assert not cache.touch("large", 4)  # passes through
    assert cache.used == 3
    cache.drop("d")
    assert cache.used == 2


def test_power_modes_are_devices() -> None:
    orin = {name: known_devices()[f"orin-nano:{name}"] for name in ("15W", "25W", "MAXN_SUPER")}
    assert [c.tflops["fp16"] for c in orin.values()] == [10.0, 15.0, 16.7]
    assert "fp8" not in orin["15W"].tflops
    assert ceilings_of("Orin-Nano:maxn_super") == orin["MAXN_SUPER"]
    with pytest.raises(InputError, match="its power modes: orin-nano:15W, orin-nano:25W, orin-nano:MAXN_SUPER"):
        ceilings_of("orin-nano:7W")


def test_sysfs_names_the_largest_cache(tmp_path: Path) -> None:
    for index, text in enumerate(("48K", "2048K", "33M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{text}\n")
    assert last_cache_mib(tmp_path) == 33
    assert last_cache_mib(tmp_path / "absent") is None


def test_a_copy_has_a_speed() -> None:
    assert 0 < copy_ceiling(1, seconds=0.01) < 1e4


def test_the_command_predicts_for_a_device(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", str(tiny_bundle), "--device", "h200", "--slots", "1", "4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    steps = load_bundle(tiny_bundle).max_steps
    for row, slots in zip(report["rows"], (1, 4), strict=True):
        graphs = row["graphs"]
        whole = steps * graphs["refine"]["milliseconds"] + sum(graphs[n]["milliseconds"] for n in ("encode", "decode"))
        assert row["answer_ms"] == pytest.approx(whole)
        assert row["answers_per_s"] == pytest.approx(1e3 * slots / whole)
        assert graphs["refine"]["weights_resident"]
        assert graphs["refine"]["gflop"] == pytest.approx(slots * load_bundle(tiny_bundle).step_gflop, rel=0.1)
    assert "measured_step" not in report["rows"][0]


def test_this_machine_is_measured_beside_the_prediction(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sage_edge.cli.roofline.SECONDS", 0.02)
    arguments = ["roofline", str(tiny_bundle), "--device", "this", "--slots", "2", "--threads", "1"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["rows"]
    assert row["measured_step"]["p50_ms"] > 0
    assert row["predicted_of_measured"] == pytest.approx(
        row["graphs"]["refine"]["milliseconds"] / row["measured_step"]["p50_ms"]
    )
    assert report["ceilings"]["tflops"]["fp32"] > 0
    assert main(arguments) == 0
    assert "predicted / measured" in capsys.readouterr().out


def test_wrong_use_is_explained(tiny_engine: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tiny_engine), "--device", "h200"], "counts the graphs of a bundle"),
        ([str(tiny_bundle), "--device", "h200", "--threads", "2"], "only with --device this"),
        ([str(tiny_bundle), "--device", "tpu"], "device 'tpu' is not known; there is this, orin-nano:15W"),
    ):
        assert main(["roofline", *arguments]) == 2
        assert message in capsys.readouterr().err

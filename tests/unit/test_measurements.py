"""The scripts behind `make gpu` and `make jetson`, run where there is neither: same code, smaller case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from benchmarks.gpu import compare  # noqa: E402
from benchmarks.jetson import report as jetson  # noqa: E402
from sage_edge.device import machine  # noqa: E402
from sage_edge.sharing.power import EnergySensor  # noqa: E402


def test_the_comparison_runs_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "gpu.json"
    arguments = [
        "--device",
        "cpu",
        "--case",
        "sudoku9",
        "--batches",
        "1",
        "2",
        "--seconds",
        "0.01",
        "--output",
        str(output),
    ]
    assert compare.main(arguments) == 0
    report = json.loads(output.read_text())
    assert [row["batch"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert set(row["latency"]) == {"sage-edge cpu fp32", "PyTorch eager fp32"}
        for name, entry in row["latency"].items():
            assert row["answers_per_s"][name] == pytest.approx(1e3 * row["batch"] / (8 * entry["mean_ms"]))
        assert row["roofline"]["milliseconds"] > 0
    assert report["ceilings"]["tflops"]["fp32"] > 0
    assert "PyTorch eager fp32" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [[], ["--check"]])
def test_without_a_gpu_nothing_is_measured(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(arguments) == 2
    said = capsys.readouterr()
    assert (said.out, "no GPU, nothing was run: torch" in said.err) == ("", True)


@pytest.mark.skipif(machine().jetson is not None, reason="this is a Jetson")
def test_without_a_jetson_there_is_no_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert jetson.main([]) == 2
    assert "no Jetson, nothing was run" in capsys.readouterr().err


def test_a_jetson_builds_each_precision_gates_it_and_benches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson, "power_mode", lambda: "MAXN_SUPER")
    steps = {
        step.name: step.argv for step in jetson.plan("sudoku9", Path("data"), Path("out"), dry=False, examples=512)
    }
    assert list(steps) == ["doctor", "support", "roofline", "build fp16", "gate fp16", "bench fp16", "build int8", "gate int8",
                           "bench int8"]  # fmt: skip
    assert steps["roofline"] == ("roofline", "sudoku9", "--device", "orin-nano:MAXN_SUPER", "--json")
    assert steps["build int8"][2:8] == ("--target", "orin-nano", "--precision", "int8", "--data", "data")


class Sensor(EnergySensor):
    name = "test"

    def __init__(self) -> None:
        self.total = 0.0

    def read(self) -> float:
        self.total += 2.0
        return self.total


def test_energy_is_counted_over_the_block_and_none_without_a_sensor() -> None:
    with jetson.metered(None) as nothing:
        pass
    assert nothing["millijoules"] is None
    with jetson.metered(Sensor()) as used:
        pass
    assert used["millijoules"] is not None
    assert used["millijoules"] >= 2.0
    assert used["seconds"] is not None


def test_energy_for_a_right_answer_is_more_than_for_any(sudoku_engine: Path) -> None:
    from sage_edge.models import shipped

    own = shipped("sudoku9")
    assert own is not None
    found = jetson.energy(sudoku_engine, own / "data", 4, Sensor())
    assert found["examples"] == 4
    if found["exact_accuracy"] > 0:
        assert found["mj_per_correct_answer"] == pytest.approx(found["mj_per_answer"] / found["exact_accuracy"])
    assert jetson.energy(sudoku_engine, own / "data", 4, None)["mj_per_correct_answer"] is None


@pytest.fixture(scope="module")
def sudoku_engine() -> Path:
    from sage_edge.models import engine_of

    return engine_of("sudoku9")


def test_a_failed_step_is_reported_with_its_output() -> None:
    result = jetson.run_step(jetson.Step("wrong", ("check", "no-such-model", "--json")))
    assert result["exit_code"] == 2
    assert result["report"] is None
    assert "no such folder" in " ".join(result["output"])

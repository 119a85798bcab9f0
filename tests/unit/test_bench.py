"""The bench: its arithmetic, its cases, and one small real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sage_edge.bench.ceiling import gemm_ceiling
from sage_edge.bench.suite import Case
from sage_edge.bench.timing import Latency, interleave
from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from tests.conftest import TINY

REPOSITORY = Path(__file__).resolve().parents[2]


def test_contestants_take_turns() -> None:
    order: list[str] = []
    measured = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0, minimum_rounds=3, calls=2
    )
    turn = ["a"] * 3 + ["b"] * 3  # one untimed call, then two timed ones
    assert order == ["a", "b", *turn * 3]
    assert measured["a"].samples == 6


def test_percentiles_are_of_milliseconds() -> None:
    latency = Latency.of([0.001 * n for n in range(1, 101)])
    assert latency.samples == 100
    assert latency.p50_ms == pytest.approx(50.5)
    assert latency.min_ms == pytest.approx(1)
    assert latency.p95_ms == pytest.approx(95.05)


def test_flops_are_counted_by_hand(tiny_bundle: Path) -> None:
    """Projections, attention and heads of every unrolled layer; nothing else multiplies matrices."""
    hidden, tokens, width = TINY.hidden_size, TINY.positions, 256
    block = 2 * tokens * (4 * hidden * hidden + 3 * hidden * width) + 4 * tokens * tokens * hidden
    layers = TINY.H_cycles * (TINY.H_layers + TINY.L_cycles * TINY.L_layers)
    heads = 2 * (2 * tokens * hidden * TINY.vocab_size) + 2 * hidden * 2
    assert load_bundle(tiny_bundle).step_gflop == pytest.approx((layers * block + heads) / 1e9, abs=1e-6)


def test_the_ceiling_is_a_speed() -> None:
    assert 0 < gemm_ceiling(1, seconds=0.05) < 1e6


@pytest.mark.parametrize("path", sorted((REPOSITORY / "benchmarks" / "cases").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_cases_are_valid(path: Path) -> None:
    assert load_yaml(path, Case).name == path.stem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\n", "exactly one of `engine` and `random`"),
        ("name: x\nengine: y\nbatches: []\n", "must be positive"),
        ("name: x\nengine: y\nbatch: [1]\n", "line 3: unknown key 'batch'; did you mean 'batches'"),
        ("name: x\nengine: y\nexamples: many\n", "line 3: 'examples': expected a whole number"),
    ],
)
def test_a_bad_case_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "case.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_yaml(tmp_path / "case.yaml", Case)
    assert message in str(error.value)


def test_a_small_run_reports_everything(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "case.yaml").write_text(
        f"name: tiny\nengine: {tiny_engine}\nbatches: [1, 2]\nseconds: 0.05\ncold_runs: 1\n"
    )
    output = tmp_path / "report.json"
    assert main(["bench", "--case", str(tmp_path / "case.yaml"), "--output", str(output), "--json"]) == 0
    report = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert [entry["batch"] for entry in report["steps"]] == [1, 2]
    assert report["cold_start"]["first_answer_s"] > 0
    assert report["machine"]["cores"] >= 1
    assert {a["policy"] for a in report["answers"]} == {"full", "learned"}
    assert all(a["mean_steps"] == TINY.halt_max_steps for a in report["answers"] if a["policy"] == "full")
    assert "accuracy" not in report  # no data was named


def test_bench_and_run_never_import_torch(tiny_engine: Path, tmp_path: Path) -> None:
    """Torch is made unimportable in the process: whoever touches it fails."""
    import numpy as np

    np.savez(tmp_path / "in.npz", inputs=np.zeros((1, TINY.seq_len), np.int32))
    (tmp_path / "case.yaml").write_text(
        f"name: tiny\nengine: {tiny_engine}\nbatches: [1]\nseconds: 0.05\ncold_runs: 1\n"
    )
    commands = [
        ["bench", "--case", str(tmp_path / "case.yaml"), "--output", str(tmp_path / "r.json")],
        ["run", str(tiny_engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "out.npz")],
        ["check", str(tiny_engine)],
    ]
    program = (
        "import sys\nsys.modules['torch'] = None\nfrom sage_edge.cli.main import main\n"
        f"sys.exit(max(main(command) for command in {commands!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

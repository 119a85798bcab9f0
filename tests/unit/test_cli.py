"""The command line as a user meets it: commands that teach, errors in one line, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sage_edge.cli.main import main
from sage_edge.cli.output import print_table
from tests.conftest import TINY

COMMANDS = ("doctor", "export", "build", "check", "calibrate", "run", "eval", "bench", "mailbox")


def inputs(count: int = 5) -> np.ndarray:
    return np.random.default_rng(3).integers(0, TINY.vocab_size, (count, TINY.seq_len)).astype(np.int32)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", inputs=inputs())
    return tmp_path / "in.npz"


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error; a traceback or a second line is a failure."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sage-edge: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_knows_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_tables_show_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("[bold]", ("[red]", "n"), [("pip install 'sage-edge[language]'", 1)])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[bold]", "[red]", "'sage-edge[language]'"))


def test_the_top_level_help_teaches_the_way_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert "exit codes" in text


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["run"], ["bench", "--examples", "0"], ["build", "x", "--slots", "-1"]]
)
def test_wrong_use_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_doctor_reports_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["cores"] >= 1
    assert report["packages"]["onnxruntime"]
    assert report["ok"] == (not report["problems"])


def test_run_writes_predictions_steps_and_reasons(
    tiny_engine: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, trace = tmp_path / "out.npz", tmp_path / "t.jsonl"
    arguments = ["run", str(tiny_engine), "--inputs", str(requests), "--outputs", str(out), "--halt", "max_steps:2",
                 "--trace", str(trace), "--all-steps", "--json"]  # fmt: skip
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["halt_reasons"] == {"max_steps:2": 5}
    with np.load(out) as arrays:
        assert set(arrays.files) == {"prediction", "steps", "halt_reason", "settled"} | {
            f"{name}_{k}" for name in ("logits", "q_halt", "q_continue") for k in range(1, 5)
        }
        assert arrays["steps"].tolist() == [2] * 5
        np.testing.assert_array_equal(arrays["prediction"], arrays["logits_2"].argmax(-1))
        assert arrays["logits_4"].shape == (5, TINY.seq_len, TINY.vocab_size)
        q_halt = arrays["q_halt_1"]
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [line["request"] for line in lines] == list(range(5))
    np.testing.assert_allclose([line["signals"]["q_halt"][0] for line in lines], q_halt, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": inputs()}, "unknown array 'input'"),
        ({"puzzle_identifiers": np.zeros(5, np.int32)}, "missing array 'inputs'"),
        ({"inputs": inputs().astype(float)}, "found dtype float64"),
        ({"inputs": inputs()[:, :3]}, "found shape [5, 3]"),
        ({"inputs": inputs() + 100}, "outside 0..6"),
        ({"inputs": inputs(), "puzzle_identifiers": np.zeros(4, np.int32)}, "disagree on the number of requests"),
        ({"inputs": inputs(), "puzzle_identifiers": np.full(5, 3)}, "outside 0..2"),
    ],
)
def test_bad_arrays_are_refused_and_nothing_is_written(
    arrays: dict[str, np.ndarray], message: str, tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
    code = main(["run", str(tiny_engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "out.npz")])
    assert code == 2
    line = error_of(capsys)
    assert message in line
    assert "in.npz" in line
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"nonsense", "not an .npz"), (b"", "not an .npz")]
)
def test_a_file_that_is_no_npz_is_named(
    content: bytes | None, message: str, tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.npz"
    if content is not None:
        path.write_bytes(content)
    assert main(["run", str(tiny_engine), "--inputs", str(path), "--outputs", str(tmp_path / "o.npz")]) == 2
    assert message in error_of(capsys)


def test_pickled_arrays_are_refused(tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "in.npz", inputs=np.array([object()], dtype=object))
    assert main(["run", str(tiny_engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "o")]) == 2
    assert "not an .npz file of plain arrays" in error_of(capsys)


def test_what_is_no_engine_is_said_plainly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "no such folder, and no shipped model" in error_of(capsys)
    assert main(["check", str(tmp_path)]) == 2
    assert "holds none of manifest.yaml (engine), bundle.yaml" in error_of(capsys)


def test_a_bad_policy_is_refused(
    tiny_engine: Path, requests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", str(tiny_engine), "--inputs", str(requests), "--outputs", str(tmp_path / "o.npz")]
    assert main([*arguments, "--halt", "soon"]) == 2
    assert "halting policy 'soon'" in error_of(capsys)


def test_build_is_instant_the_second_time_and_names_its_path(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "engine"
    for cached in (False, True):
        assert main(["build", str(tiny_bundle), "-o", str(target), "--slots", "2", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["engine"], report["cached"], report["slots"]) == (str(target), cached, 2)
    assert main(["build", str(tiny_bundle), "-o", str(target), "--slots", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cached"] is False


def test_build_does_not_replace_what_is_not_an_engine(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["build", str(tiny_bundle), "-o", str(tmp_path)]) == 2
    assert "not empty and holds no manifest.yaml" in error_of(capsys)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_recipe_with_an_unknown_key_names_file_line_and_key(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text("target: cpu\nslot: 4\n")
    assert main(["build", str(tiny_bundle), "--recipe", str(tmp_path / "r.yaml")]) == 2
    line = error_of(capsys)
    assert "r.yaml, line 2" in line
    assert "unknown key 'slot'; did you mean 'slots'?" in line


def test_check_passes_a_good_engine_and_fails_a_dead_one(
    tiny_bundle: Path, tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (tiny_bundle, tiny_engine):
        assert main(["check", str(target), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"]
        assert len(report["steps"]) == TINY.halt_max_steps


def test_check_exits_with_1_for_a_wrong_graph(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle whose digests are in order but whose reference is another model's."""
    import dataclasses
    import shutil

    from sage_edge.bundle import load_bundle, save_bundle
    from sage_edge.check import load_reference
    from sage_edge.files import sha256

    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    reference = load_reference(folder / "reference.npz")
    arrays = {
        name: a + np.float32(0.01) if name.endswith("output/logits") else a for name, a in reference.arrays().items()
    }
    np.savez(folder / "reference.npz", **arrays)  # type: ignore[arg-type]
    bundle = load_bundle(tiny_bundle)
    files = bundle.files | {"reference.npz": sha256(folder / "reference.npz")}
    save_bundle(folder, dataclasses.replace(bundle, files=files))
    assert main(["check", str(folder)]) == 1
    assert "FAILED parity_logits" in capsys.readouterr().out
    assert main(["build", str(folder), "-o", str(tmp_path / "engine")]) == 1
    assert "the gate refused the engine: parity_logits" in error_of(capsys)
    assert not (tmp_path / "engine").exists()


def test_a_changed_byte_in_an_engine_is_refused(
    tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    content = bytearray((folder / "refine.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "refine.onnx").write_bytes(content)
    assert main(["check", str(folder)]) == 2
    assert "refine.onnx: changed since manifest.yaml was written" in error_of(capsys)


@pytest.mark.parametrize("key", ["device", "versions"])
def test_an_engine_of_another_machine_or_runtime_is_refused(
    key: str, tiny_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dataclasses
    import shutil

    from sage_edge.config import dump_yaml
    from sage_edge.engines.manifest import load_manifest

    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    manifest, _ = load_manifest(folder)
    other = (
        dataclasses.replace(manifest, device="abacus")
        if key == "device"
        else dataclasses.replace(manifest, versions={})
    )
    (folder / "manifest.yaml").write_text(dump_yaml(other))
    assert main(["check", str(folder)]) == 2
    assert "again from its bundle" in error_of(capsys) or key == "device"


def test_the_command_is_installed_and_quiet_about_interrupts() -> None:
    done = subprocess.run([sys.executable, "-m", "sage_edge.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("sage-edge ")


@pytest.mark.parametrize("command", ["--help", "run --help", "bench --help"])
def test_start_up_imports_neither_torch_nor_onnx(command: str) -> None:
    program = (
        "import sys\nfrom sage_edge.cli.main import main\n"
        f"try: main({command.split()!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""Certificates: bound to their engine and data, refused after any change of a byte, used by default, able to abstain."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sage_edge
from sage_edge.cli.main import main
from sage_edge.config import dump_yaml, parse_yaml
from sage_edge.dataset import load_dataset, save_dataset
from sage_edge.engines.null import NullRunner
from sage_edge.errors import InputError, IntegrityError
from sage_edge.irp.calibrate import Acceptance, Certified
from sage_edge.irp.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    load_certificate,
    save_certificate,
    unseal,
    uses_certificate,
)
from sage_edge.runtime import Session
from tests.conftest import TINY

ITEMS = 40


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine, tmp_path / "engine")
    return tmp_path / "engine"


def dataset(path: Path, seed: int = 0, count: int = ITEMS) -> Path:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(1, TINY.vocab_size, (count, TINY.seq_len)) for name in ("inputs", "labels")}
    save_dataset(path, arrays, TINY.seq_len, TINY.vocab_size)
    return path


def chosen(policy: str = "entropy:1.25", threshold: float | None = 1.25) -> Certified:
    return Certified("entropy", policy, threshold, 30, 1.0, 0.09, 1.7)


def certificate(**changes: object) -> Certificate:
    whole = Certificate("sage-edge-certificate/1", "tiny", "a" * 64, "b" * 64, "exact_lost", 0.1, 0.9, ("entropy",), 40, 4,
                        chosen(), (chosen(),), None)  # fmt: skip
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def calibrated(engine: Path, tmp_path: Path, *more: str) -> Path:
    data = dataset(tmp_path / "data")
    arguments = [
        "calibrate",
        str(engine),
        "--data",
        str(data),
        "--max-loss",
        "0.3",
        "--confidence",
        "0.8",
        *more,
        "--json",
    ]
    assert main(arguments) == 0
    return data


def test_calibrate_writes_a_certificate_that_run_uses_by_default(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated(engine, tmp_path, "--policy", "entropy")
    report = json.loads(capsys.readouterr().out)
    assert report["chosen"]["items"] == report["items_total"] == ITEMS
    assert report["chosen"]["bound"] <= 0.3
    np.savez(tmp_path / "in.npz", inputs=load_dataset(tmp_path / "data").inputs)
    results = []
    for halt in ([], ["--halt", "certified"], ["--halt", report["chosen"]["policy"]], ["--halt", "full"]):
        out = tmp_path / "out.npz"
        assert main(["run", str(engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(out), *halt]) == 0
        with np.load(out) as arrays:
            results.append(arrays["steps"].tolist())
            assert arrays["settled"].all()
    assert results[0] == results[1] == results[2]
    # Every item certifies (a single path), so the mean over the same data is the certificate's own.
    assert np.mean(results[0]) == pytest.approx(report["chosen"]["mean_steps"])
    with sage_edge.load(str(engine)) as session:
        assert session.default_halt == "certified"
        assert [a.steps for a in session.infer({"inputs": load_dataset(tmp_path / "data").inputs})] == results[0]


def test_without_a_certificate_learned_is_the_default_and_certified_is_refused(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", inputs=np.ones((1, TINY.seq_len), np.int32))
    arguments = ["run", str(engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "o.npz")]
    assert main([*arguments, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["halt_reasons"]) <= {"learned", "max_steps:4"}
    assert main([*arguments, "--halt", "certified"]) == 2
    assert "this engine has no certificate; `sage-edge calibrate" in capsys.readouterr().err
    assert main(["calibrate", str(engine), "--verify"]) == 2
    assert "has no certificate" in capsys.readouterr().err


def test_verify_accepts_engine_and_data_and_nothing_else(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = calibrated(engine, tmp_path)
    assert main(["calibrate", str(engine), "--verify"]) == 0
    assert main(["calibrate", str(engine), "--verify", "--data", str(data)]) == 0
    assert "what this data gives" in capsys.readouterr().out
    for other in (dataset(tmp_path / "seed", seed=1), dataset(tmp_path / "fewer", count=ITEMS - 1)):
        assert main(["calibrate", str(engine), "--verify", "--data", str(other)]) == 2
        assert "is not the data that the certificate was made with" in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "elsewhere")  # the digest is of the content, not of the folder
    assert main(["calibrate", str(engine), "--verify", "--data", str(tmp_path / "elsewhere")]) == 0
    assert main(["calibrate", str(engine), "--verify", "--max-loss", "0.1"]) == 2
    assert "leave --max-loss out" in capsys.readouterr().err


def test_verify_finds_a_forged_promise(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A digest is no signature; deriving the certificate again is what finds a lie."""
    data = calibrated(engine, tmp_path)
    true = load_certificate(engine)
    assert true is not None
    save_certificate(engine, dataclasses.replace(true, chosen=dataclasses.replace(true.chosen, mean_steps=1.01)))
    assert main(["calibrate", str(engine), "--verify", "--data", str(data)]) == 1
    assert "now give another chosen" in capsys.readouterr().err


def test_every_single_changed_byte_is_refused(engine: Path, tmp_path: Path) -> None:
    calibrated(engine, tmp_path)
    path = engine / CERTIFICATE_FILE
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (1, 32):
            changed = bytearray(content)
            changed[position] ^= bit
            with pytest.raises(IntegrityError):
                unseal(bytes(changed), "x")
    for cut in (content[:-1], content[:-70], content[: len(content) // 2], b"", content + b"\n", b"\n" + content):
        path.write_bytes(cut)
        with pytest.raises(InputError):
            load_certificate(engine)
    path.write_bytes(content.replace(b"\n", b"\r\n"))
    with pytest.raises(IntegrityError, match="changed since it was written"):
        load_certificate(engine)
    path.write_bytes(content)
    assert load_certificate(engine) is not None


def test_an_altered_certificate_stops_every_command_that_would_use_it(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated(engine, tmp_path)
    path = engine / CERTIFICATE_FILE
    path.write_bytes(path.read_bytes().replace(b"max_loss: 0.3", b"max_loss: 0.1"))
    capsys.readouterr()
    np.savez(tmp_path / "in.npz", inputs=np.ones((1, TINY.seq_len), np.int32))
    for command in (["run", str(engine), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "o.npz")],
                    ["calibrate", str(engine), "--verify"], ["eval", str(engine), "--data", str(tmp_path / "data")]):  # fmt: skip
        assert main(command) == 2
        assert "certificate.yaml: changed since it was written" in capsys.readouterr().err
    calibrated(engine, tmp_path)  # a new calibration replaces it
    assert load_certificate(engine) is not None


def test_a_certificate_of_another_engine_is_refused(engine: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    from sage_edge.engines.build import BuildRecipe, build

    calibrated(engine, tmp_path)
    other = build(tiny_bundle, BuildRecipe(slots=2), tmp_path / "other").path
    shutil.copyfile(engine / CERTIFICATE_FILE, other / CERTIFICATE_FILE)
    with pytest.raises(IntegrityError, match="is of another engine"):
        sage_edge.load(str(other))
    build(tiny_bundle, BuildRecipe(slots=4), other)
    assert not (other / CERTIFICATE_FILE).exists()  # a new engine does not inherit the old one's certificate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-loss", "0.001"], "too little data: 40 items cannot show"),
        (["--max-loss", "2"], "max-loss: expected a number between 0 and 1"),
        (["--confidence", "1"], "confidence: expected a number between 0 and 1"),
        (["--loss", "regret"], "loss 'regret': not known; use exact_lost"),
        (["--loss", "no.such:thing"], "cannot be imported"),
        (["--loss", "math:pi"], "expected a function or a Loss"),
        (["--max-loss", "0.3", "--accept", "0.9"], "too little data|accept 0.9"),
    ],
)
def test_what_cannot_be_promised_is_refused_and_nothing_is_written(
    arguments: list[str], message: str, engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", str(engine), "--data", str(dataset(tmp_path / "data")), *arguments]) == 2
    err = capsys.readouterr().err
    assert any(part in err for part in message.split("|")), err
    assert err.count("\n") == 1
    assert not (engine / CERTIFICATE_FILE).exists()


def test_calibrate_without_data_says_so(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(engine)]) == 2
    assert "--data DIR is needed" in capsys.readouterr().err


def token_share(traces: object, taken: np.ndarray) -> np.ndarray:
    return np.full(len(taken), 0.125)


def test_a_plugins_loss_is_named_in_the_certificate(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{__name__}:token_share"
    data = calibrated(engine, tmp_path, "--loss", name)
    report = json.loads(capsys.readouterr().out)
    assert (report["loss"], report["chosen"]["loss_sum"]) == (name, 0.125 * report["chosen"]["items"])
    assert main(["calibrate", str(engine), "--verify", "--data", str(data)]) == 0


finite = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.floats(1e-9, 1e3), st.floats(0.01, 0.99), st.none() | finite, st.text(max_size=20))
def test_a_certificate_reads_back_to_the_last_bit(threshold: float, loss: float, rate: float | None, name: str) -> None:
    accept = None if rate is None else Acceptance(f"entropy_max:{threshold!r}", rate, 9, 8, 0, 1 - rate, 8 / 9)
    core = dataclasses.replace(chosen(f"entropy:{threshold!r}", threshold), bound=loss / 2)
    whole = certificate(chosen=core, max_loss=loss, acceptance=accept, families=(core,))
    assert parse_yaml(dump_yaml(whole), Certificate, "x") == whole


@pytest.mark.parametrize(
    ("field", "value"),
    [("engine_sha256", "A" * 64), ("data_sha256", "b" * 63), ("max_steps", 0), ("items_total", 3), ("max_loss", 0.0),
     ("max_loss", 0.05), ("confidence", 1.0), ("chosen", chosen("luck"))],
)  # fmt: skip
def test_a_certificate_that_no_calibration_gives_is_not_made(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field.split("_")[0] if field != "chosen" else "policy"):
        certificate(**{field: value})


def test_the_word_certified_may_be_joined_with_other_policies() -> None:
    own = certificate(chosen=chosen("entropy:3.5 or patience:2"))
    assert own.expand("certified or deadline:5") == "(entropy:3.5 or patience:2 or max_steps:4) or deadline:5"
    assert certificate(chosen=chosen("full", None)).expand("certified") == "(max_steps:4)"
    assert uses_certificate("(certified)")
    assert not uses_certificate("learned or uncertified")


def test_an_unsettled_answer_is_marked_and_keeps_its_best_prediction() -> None:
    """Null model: entropy is what is left to do. Certified: stop below 3.5 left; settled: below 1.5 left at that moment."""
    accept = Acceptance("entropy:1.5", 0.9, 9, 8, 0, 0.05, 0.8)
    own = certificate(chosen=chosen("entropy:3.5 or patience:2"), acceptance=accept, max_steps=16)
    inputs = np.zeros((3, 4), np.int32)
    inputs[:, 0] = [2, 9, 40]
    with Session(NullRunner(2), own) as session:
        answers = session.infer({"inputs": inputs})
        assert [(a.steps, a.settled) for a in answers] == [(1, True), (6, False), (16, False)]
        assert answers[1].prediction.tolist() == [6] * 4
        # Without the certificate's policy nothing is claimed; cut short by something else, nothing is covered.
        assert all(a.settled for a in session.infer({"inputs": inputs}, "learned"))
        assert [a.settled for a in session.infer({"inputs": inputs}, "certified or max_steps:2")] == [
            True,
            False,
            False,
        ]
        cut = session.infer({"inputs": np.full((1, 4), 5, np.int32)}, "certified or deadline:0.000001")
        assert (cut[0].steps, cut[0].settled) == (1, False)


def test_eval_shows_what_is_certified(engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = calibrated(engine, tmp_path)
    capsys.readouterr()
    assert main(["eval", str(engine), "--data", str(data), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = [row["policy"] for row in report["policies"]]
    own = load_certificate(engine)
    assert own is not None
    assert f"certified: {own.policy}" in names
    assert {name.partition(",")[0] for name in names if ", certified: " in name} == {c.family for c in own.families}
    assert report["settled"] is None
    assert main(["eval", str(engine), "--data", str(data), "--halt", "certified", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["policies"]) == 2  # that one and the oracle

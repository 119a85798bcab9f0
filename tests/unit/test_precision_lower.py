"""Lowering as a whole: what passes, which layers stay higher, what is refused, and what the files say of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from sage_edge.bundle import BUNDLE_FILE, load_bundle, save_bundle
from sage_edge.cli.main import main
from sage_edge.dataset import load_dataset
from sage_edge.engines.build import BuildRecipe, build, open_engine
from sage_edge.engines.manifest import load_manifest
from sage_edge.engines.ort import OrtRunner
from sage_edge.errors import GateError, InputError
from sage_edge.files import sha256
from sage_edge.precision.lower import LoweringError, lower_bundle
from sage_edge.precision.plan import parse_request
from tests.precision_models import (
    HUGE,
    SPIKE,
    calm_bundle,
    calm_data,
    calm_hrm,
    make_bundle,
    own_answers,
    scale_channel,
    spiked_layer,
)  # fmt: skip

__all__ = ["calm_bundle", "calm_data"]  # fixtures

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def int8_bundle(calm_bundle: Path, calm_data: Path) -> Path:
    """Made by the command line, as a user makes it; nothing may have to stay higher."""
    path = calm_bundle.parent / "int8"
    assert main(["export", str(calm_bundle), "-o", str(path), "--precision", "int8", "--data", str(calm_data)]) == 0
    return path


def test_int8_passes_where_it_should_and_the_bundle_says_how(
    int8_bundle: Path, calm_bundle: Path, calm_data: Path
) -> None:
    bundle, fp32 = load_bundle(int8_bundle), load_bundle(calm_bundle)
    assert bundle.precision == "int8"
    lowering = bundle.lowering
    assert lowering is not None
    assert lowering.fp32_sha256 == sha256(calm_bundle / BUNDLE_FILE)
    assert lowering.data_sha256 == load_dataset(calm_data).sha256
    assert bundle.provenance == fp32.provenance
    assert lowering.modules == {"H": "int8", "L": "int8"}
    assert lowering.cost == 0.25
    assert lowering.range_items > 0
    assert not any(layer.reason for layer in lowering.layers)
    assert sum(layer.share for layer in lowering.layers) == pytest.approx(1, abs=1e-3)
    assert all(finding.passed for finding in lowering.gate)
    assert {f.name for f in lowering.gate} >= {
        "step_error", "accuracy_full", "accuracy_learned", "halting_agreement", "fp16_headroom", "finite"
    }  # fmt: skip
    assert len(lowering.steps) == bundle.max_steps
    assert all(step.amplification is not None for step in lowering.steps)
    assert lowering.steps[-1].free_error > 10 * (lowering.steps[-1].amplification or 0)
    assert (int8_bundle / "refine.onnx").stat().st_size < 0.6 * (calm_bundle / "refine.onnx").stat().st_size


def test_check_judges_a_lowered_bundle_and_its_engine(
    int8_bundle: Path, calm_bundle: Path, calm_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target in (int8_bundle, build(int8_bundle, BuildRecipe(slots=4)).path):
        assert main(["check", str(target), "--against", str(calm_bundle), "--data", str(calm_data), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["passed"]
        assert {"accuracy_full", "halting_agreement", "step_error"} <= {f["name"] for f in report["findings"]}
        assert main(["check", str(target), "--json"]) == 0
        assert {"accuracy_full"}.isdisjoint(f["name"] for f in json.loads(capsys.readouterr().out)["findings"])


def test_check_wants_the_model_that_it_was_made_from(
    int8_bundle: Path, tiny_bundle: Path, calm_bundle: Path, calm_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(int8_bundle), "--against", str(tiny_bundle), "--data", str(calm_data)]) == 2
    assert "not the fp32 bundle that" in capsys.readouterr().err
    assert main(["check", str(int8_bundle), "--against", str(calm_bundle)]) == 2
    assert "give both" in capsys.readouterr().err
    assert main(["check", str(calm_bundle), "--data", str(calm_data)]) == 2
    assert "belong to lowered models" in capsys.readouterr().err


def test_the_int8_engine_is_a_product(int8_bundle: Path, calm_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Built from the bundle, bound to it, calibrated, and its certificate is void for the fp32 engine."""
    engine = build(int8_bundle, BuildRecipe(slots=4, spin=False)).path
    manifest, _ = load_manifest(engine)
    assert (manifest.precision, manifest.spin) == ("int8", False)
    assert manifest.fused["int8_product"] > 0
    runner = open_engine(engine)
    assert isinstance(runner, OrtRunner)
    assert runner.spin is False
    assert main(["calibrate", str(engine), "--data", str(calm_data), "--max-loss", "0.1"]) == 0
    assert main(["calibrate", str(engine), "--verify"]) == 0
    capsys.readouterr()
    other = build(int8_bundle, BuildRecipe(slots=2)).path
    shutil.copyfile(engine / "certificate.yaml", other / "certificate.yaml")
    assert main(["calibrate", str(other), "--verify"]) == 2
    assert "is of another engine" in capsys.readouterr().err


def test_an_answer_of_the_int8_engine_does_not_depend_on_its_neighbours(int8_bundle: Path) -> None:
    """A scale taken from all slots together, as dynamic quantisation does, would fail here."""
    with open_engine(build(int8_bundle, BuildRecipe(slots=4)).path) as runner:
        quiet = runner.model.random_observation(4)
        state, other = runner.encode(quiet), runner.encode(quiet)
        arrays = runner.read(other)
        for array in arrays.values():
            array[1:] *= 50  # neighbours far louder than the first request
        loud = runner.write(arrays)
        for _ in range(3):
            np.testing.assert_array_equal(runner.refine(state)[0], runner.refine(loud)[0])
        np.testing.assert_array_equal(runner.read(state)["z_H"][0], runner.read(loud)["z_H"][0])


def test_a_layer_with_an_outlier_is_found_and_kept_higher(tmp_path: Path) -> None:
    """One hidden channel is far larger than the rest: the function is the same, but 8 bits cannot hold it."""
    spiked = make_bundle(calm_hrm(scale_channel(SPIKE)), tmp_path / "spiked", "spiked")
    data = load_dataset(own_answers(spiked, tmp_path / "data"))
    with pytest.raises(LoweringError, match="gate refused int8"):
        lower_bundle(spiked, tmp_path / "out", parse_request("int8"), data, strict=True)
    assert not (tmp_path / "out").exists()
    made = lower_bundle(spiked, tmp_path / "out", parse_request("int8"), data)
    assert made.report.passed
    lowering = made.bundle.lowering
    assert lowering is not None
    assert made.bundle.precision == "mixed"
    kept = {layer.layer: layer for layer in lowering.layers if layer.precision != "int8"}
    assert spiked_layer() in kept
    assert len(kept) <= 3
    assert kept[spiked_layer()].precision == "fp16"
    assert kept[spiked_layer()].reason.startswith("breaks ")
    assert kept[spiked_layer()].error == max(layer.error or 0 for layer in lowering.layers)
    assert lowering.cost < 0.4


def test_a_layer_that_would_overflow_float16_stays_fp32(tmp_path: Path) -> None:
    huge = make_bundle(calm_hrm(scale_channel(HUGE)), tmp_path / "huge", "huge")
    data = load_dataset(own_answers(huge, tmp_path / "data"))
    made = lower_bundle(huge, tmp_path / "out", parse_request("fp16"), data)
    lowering = made.bundle.lowering
    assert lowering is not None
    wide = {layer.layer: layer.reason for layer in lowering.layers if layer.precision == "fp32"}
    assert spiked_layer() in wide
    assert all("float16 would overflow" in reason for reason in wide.values())
    assert len(wide) <= 2
    with pytest.raises(GateError, match="fp16_headroom|finite"):
        lower_bundle(huge, tmp_path / "no", parse_request("fp16"), data, strict=True)


def test_a_quantised_model_whose_accuracy_collapses_is_refused(
    int8_bundle: Path, calm_bundle: Path, calm_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges of a bad calibration: every activation clipped. The graph is well-formed, alive, and answers something."""
    folder = tmp_path / "clipped"
    shutil.copytree(int8_bundle, folder)
    model = onnx.load(folder / "refine.onnx")
    for tensor in model.graph.initializer:
        if tensor.name.endswith(("/int8/scale", "/int8/scale16")) and not tensor.dims:
            array = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array((array / 16).astype(array.dtype), tensor.name))
    onnx.save(model, folder / "refine.onnx")
    bundle = load_bundle(int8_bundle)
    save_bundle(
        folder, dataclasses.replace(bundle, files=bundle.files | {"refine.onnx": sha256(folder / "refine.onnx")})
    )
    arguments = ["check", str(folder), "--against", str(calm_bundle), "--data", str(calm_data), "--json"]
    assert main(arguments) == 1
    failed = {f["name"] for f in json.loads(capsys.readouterr().out)["findings"] if not f["passed"]}
    assert {"accuracy_full", "step_error"} <= failed
    with pytest.raises(GateError, match="step_error"):
        build(folder, BuildRecipe(), tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_auto_ends_with_the_cheapest_graph_that_passes(calm_bundle: Path, calm_data: Path, tmp_path: Path) -> None:
    made = lower_bundle(calm_bundle, tmp_path / "out", parse_request("auto"), load_dataset(calm_data))
    assert made.bundle.lowering is not None
    assert made.bundle.lowering.asked == "auto"
    assert made.bundle.lowering.cost == 0.25
    assert made.bundle.precision == "int8"  # FP8 costs the same here, and errs more


def test_modules_chosen_apart_reach_the_bundle(
    calm_bundle: Path, calm_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed"
    arguments = ["export", str(calm_bundle), "-o", str(out), "--precision", "mixed", "--data", str(calm_data), "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["modules"] == {"H": "fp16", "L": "fp8"}
    assert {layer["precision"] for layer in report["layers"] if layer["module"] == "L"} == {"fp8"}
    assert load_bundle(out).precision == "mixed"
    assert main(["build", str(out), "--target", "cpu"]) == 2
    assert "which a CPU cannot compute in" in capsys.readouterr().err


def test_untrained_models_can_be_lowered_without_answers(tiny_bundle: Path, tmp_path: Path) -> None:
    observation = load_bundle(tiny_bundle).model.random_observation(8)
    made = lower_bundle(tiny_bundle, tmp_path / "out", parse_request("fp16"), observation)
    assert {f.name: f.detail for f in made.report.findings}["accuracy"].startswith("not judged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "--data DIR is needed"),
        (["--precision", "Q: int8", "--data", "DATA"], "this model has no module 'Q'; it has H, L"),
        (["--precision", "H: fp32", "--data", "DATA"], "lowers nothing"),
        (["--precision", "int4", "--data", "DATA"], "expected fp32, fp16, int8, fp8"),
        (["--precision", "int8", "--data", "DATA", "--limit", "100"], "too little data: of 100 examples"),
        (["--precision", "fp16", "--allow", "fp16", "--data", "DATA"], "--allow: belongs to --precision auto"),
        (["--precision", "fp16", "--data", "DATA", "--name", "x"], "--name: belongs to the fp32 export"),
        (["--data", "DATA"], "--data: belongs to --precision other than fp32"),
    ],
)
def test_wrong_use_is_explained(
    arguments: list[str], message: str, calm_bundle: Path, calm_data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = [str(calm_data) if a == "DATA" else a for a in arguments]
    assert main(["export", str(calm_bundle), "-o", str(tmp_path / "out"), *filled]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_lowered_bundle_is_not_lowered_again(int8_bundle: Path, calm_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is lowered already"):
        lower_bundle(int8_bundle, tmp_path / "out", parse_request("fp16"), load_dataset(calm_data))


def test_build_lowers_an_fp32_bundle_once_and_finds_it_again(
    calm_bundle: Path, calm_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["build", str(calm_bundle), "--precision", "int8", "--data", str(calm_data), "--json"]
    paths = []
    for cached in (False, True):
        assert main(arguments) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["cached"], report["precision"]) == (cached, "int8")
        paths.append(report["engine"])
    assert paths[0] == paths[1]
    assert main(["build", str(calm_bundle), "--precision", "int8"]) == 2
    assert "--data DIR is needed" in capsys.readouterr().err


def test_an_int8_recipe_does_not_turn_an_fp32_bundle_into_one(calm_bundle: Path) -> None:
    with pytest.raises(InputError, match="the recipe asks for int8, but this bundle gives fp32"):
        build(calm_bundle, BuildRecipe(precision="int8"))

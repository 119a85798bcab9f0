"""The vision plugin as it is shipped: images of any size in, images without noise out, through the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from plugins_irp.vision.data import data_folder, load_sets, psnr, with_noise
from plugins_irp.vision.drive import answer
from plugins_irp.vision.facts import MODEL, WEIGHTS, ModelFile
from plugins_irp.vision.measure import beside_opencv, judged, record
from plugins_irp.vision.plugin import FOLDER, OPPONENT, Vision
from plugins_irp.vision.scenes import scene
from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.config import load_yaml
from sage_edge.engines.graph_cost import graph_cost
from sage_edge.errors import InputError
from sage_edge.files import sha256
from sage_edge.irp.conformance import check_plugin
from sage_edge.irp.measure import calibrated, record_traces
from sage_edge.irp.registry import find_plugins
from sage_edge.irp.spec import load_spec

needs_data = pytest.mark.skipif(not data_folder().is_dir(), reason=f"no images at {data_folder()}")
RULE = load_spec(FOLDER).halt


@pytest.fixture(scope="module")
def plugin() -> Iterator[Vision]:
    spec = load_spec(FOLDER)
    with Vision(spec, threads=1, **spec.options) as opened:
        yield opened


def noisy_scene(height: int, width: int, sigma: float, seed: int = 0) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(noisy float32, clean uint8), both [height, width]."""
    rng = np.random.default_rng(seed)
    clean = scene(max(height, width), rng)[:height, :width]
    return with_noise(clean, sigma, rng), clean


def test_the_shipped_files_belong_together_and_are_small() -> None:
    file = load_yaml(FOLDER / MODEL, ModelFile)
    bundle = load_bundle(FOLDER / "bundle")
    assert file.weights_sha256 == sha256(FOLDER / WEIGHTS) == bundle.provenance.checkpoint_sha256
    assert bundle.model.max_steps == file.config.max_steps == load_spec(FOLDER).max_steps
    assert bundle.parameters <= 600_000
    shipped = [FOLDER / WEIGHTS, *(FOLDER / "bundle").glob("*.onnx")]
    assert sum(path.stat().st_size for path in shipped) <= 8_000_000


def test_the_arithmetic_of_a_step_is_counted() -> None:
    """Convolutions make up the step: by hand from the sizes, output values times filter, two operations each."""
    file = load_yaml(FOLDER / MODEL, ModelFile)
    c, pixels = file.config, file.config.tile**2
    fine = (8 * c.fine + 2 * c.fine_blocks * c.fine**2 + 4 * c.fine) * 9 * pixels / 4
    middle = (2 * c.middle**2 * 9 + 4 * c.middle * c.fine + 4 * c.fine * c.middle) * pixels / 16
    coarse = (2 * c.coarse**2 * 9 + 4 * c.coarse * c.middle + 4 * c.middle * c.coarse) * pixels / 64
    products = 2 * (fine + middle + coarse)
    assert load_bundle(FOLDER / "bundle").step_gflop == pytest.approx(products / 1e9, rel=1e-3)
    cost = graph_cost(FOLDER / "bundle" / "refine.onnx", 1)
    assert sum(node.flops for node in cost.nodes if node.op in ("Conv", "ConvTranspose")) == pytest.approx(
        products, rel=1e-6
    )


def test_the_bundle_passes_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(FOLDER / "bundle")]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_the_plugin_is_found_and_keeps_the_protocol(plugin: Vision) -> None:
    assert "vision" in [found.name for found in find_plugins() if not found.error]
    assert [(f.name, f.detail) for f in check_plugin(plugin) if not f.passed] == []


@pytest.mark.parametrize(("sigma", "gain"), [(15.0, 2.5), (50.0, 7.0)])
def test_noise_is_taken_off_at_any_level(plugin: Vision, sigma: float, gain: float) -> None:
    """Floors below what it reaches: what is caught here is a broken model, not a weak one."""
    noisy, clean = noisy_scene(150, 100, sigma)
    found = answer(plugin, noisy, "full", clean)
    assert found.quality[0] > psnr(noisy, clean) + 0.7 * gain
    assert found.quality[-1] > psnr(noisy, clean) + gain
    assert found.energies[-1] <= found.energies[0]


def test_an_image_without_noise_stays_as_it_is(plugin: Vision) -> None:
    _, clean = noisy_scene(100, 100, 0)
    assert psnr(answer(plugin, clean).image, clean) > 33


def test_the_noise_level_is_found(plugin: Vision) -> None:
    for sigma in (10.0, 30.0, 50.0):
        noisy, clean = noisy_scene(128, 128, sigma)
        state = plugin.step(plugin.init_state({"image": noisy}), 0)
        result = plugin.result(state)
        plugin.release(state)
        assert result["sigma"] == pytest.approx(sigma, rel=0.2)
        left = float(np.sqrt(np.mean((result["image"].astype(float) - clean) ** 2)))
        assert result["error"] == pytest.approx(left, rel=0.5)


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (64, 64), (130, 65), (40, 33, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_any_size_and_type_comes_back_as_it_went_in(plugin: Vision, shape: tuple[int, ...], dtype: Any) -> None:
    image = np.full(shape, 90, dtype)
    found = answer(plugin, image, "max_steps:1").image
    assert found.shape == shape
    assert found.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert np.abs(found.astype(float) - 90).max() <= 1  # nothing to take off


def test_no_seams_show_where_tiles_meet(plugin: Vision) -> None:
    """The same image with its tiles elsewhere: what differs at the tiles' borders is small beside the error, and what a
    single large overlap gives is no better."""
    noisy, clean = noisy_scene(180, 180, 25)
    restored = answer(plugin, noisy).image.astype(float)
    other = Vision(plugin.spec, threads=1, overlap=32)
    with other:
        again = answer(other, noisy).image.astype(float)
    assert abs(psnr(restored, clean) - psnr(again, clean)) < 0.15
    error = restored - clean
    tiling = plugin.tiling(noisy[None])
    cuts = sorted({left for _, left in tiling.corners} - {0}) + [left + 64 for _, left in tiling.corners[:-1]]
    cuts = sorted({cut for cut in cuts if 2 < cut < 178})
    jump = np.abs(np.diff(error, axis=1)).mean(0)  # from each column to the next
    at = [cut - 1 for cut in cuts]
    elsewhere = np.delete(jump, at)
    assert jump[at].mean() < elsewhere.mean() + 3 * elsewhere.std() / np.sqrt(len(at))


def test_each_tile_rests_when_it_is_done(plugin: Vision) -> None:
    """Half flat, half texture: tiles do not all take every step, and those that rest are not refined."""
    rng = np.random.default_rng(0)
    clean = np.full((64, 256), 120, np.uint8)
    clean[:, 128:] = scene(128, rng)[:64, :]
    noisy = with_noise(clean, 20, rng)
    with Vision(plugin.spec, threads=1, rest=0.05) as restful:
        found = answer(restful, noisy, "full", clean)
    assert found.tile_steps[-1] < plugin.max_steps
    with Vision(plugin.spec, threads=1, rest=-1e9) as restless:
        every = answer(restless, noisy, "full", clean)
    assert every.tile_steps[-1] == plugin.max_steps
    assert found.quality[-1] > every.quality[-1] - 0.1
    state = plugin.init_state({"image": noisy})
    assert not any(plugin.rests(seat) for seat in state.seats)  # never before the first step
    plugin.release(state)


def test_colours_go_through_orthonormal_channels(plugin: Vision) -> None:
    assert np.allclose(OPPONENT @ OPPONENT.T, np.eye(3), atol=1e-6)
    rng = np.random.default_rng(1)
    clean = np.stack([scene(96, np.random.default_rng(2)).astype(float) * f for f in (1.0, 0.8, 0.5)], -1)
    clean = clean.round().astype(np.uint8)
    noisy = with_noise(clean, 25, rng)
    together = answer(plugin, noisy).image
    alone = np.stack([answer(plugin, noisy[..., k]).image for k in range(3)], -1)
    assert psnr(together, clean) > psnr(alone, clean) + 0.3
    grey = np.repeat(scene(64, rng)[..., None], 3, -1)
    assert np.ptp(answer(plugin, grey).image.astype(int), axis=-1).max() <= 1  # grey stays grey


@pytest.mark.parametrize(
    "wrong",
    [
        {}, {"image": "x"}, {"image": np.zeros((3, 4, 4))}, {"image": np.zeros((4, 4), np.int64)}, {"image": np.zeros(5)},
        {"image": np.zeros((0, 4))}, {"image": np.full((4, 4), np.nan)}, {"image": np.full((4, 4), 1e9)},
    ],
)  # fmt: skip
def test_bad_images_are_refused(plugin: Vision, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="`image`"):
        plugin.init_state(wrong)


def test_a_bad_overlap_is_refused() -> None:
    with pytest.raises(InputError, match="overlap"):
        Vision(load_spec(FOLDER), overlap=1000)


def test_halting_is_certified_on_scenes_without_any_data(
    plugin: Vision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_EDGE_DATA", str(tmp_path))
    found = calibrated(plugin, record_traces(plugin, plugin.examples("calibration", 300)))
    assert found.chosen.bound <= 0.05
    test = judged(record_traces(plugin, plugin.examples("report", 80)), found.chosen.policy)
    assert test[0]["lost"] <= 0.05
    assert test[0]["steps"] < plugin.max_steps


def test_unknown_examples_are_refused(plugin: Vision) -> None:
    with pytest.raises(InputError, match="calibration or report"):
        plugin.examples("test")


@needs_data
def test_quality_on_set12_and_opencv_beside(plugin: Vision) -> None:
    """Floors below the model card's numbers, on two small images of the set."""
    pytest.importorskip("cv2")
    images = load_sets(data_folder()).chosen[:2]
    (row,) = beside_opencv(plugin, images, RULE, [25.0])
    decibels = row["decibels"]
    assert decibels["halted"] > decibels["one_step"] > decibels["opencv"]
    halting = judged(record(plugin, images, 5), RULE)
    assert halting[0]["lost"] < 0.15


def test_the_engine_in_int8_keeps_its_quality_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lower = ["plugin", "lower", "vision", "--examples", "24", "--threads", "1", "-o", str(tmp_path / "low")]
    assert main(lower) == 1  # so few examples cannot show so small a loss
    assert "allowed 0.05" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*lower, "--max-loss", "1"]) == 2
    assert "expected less than 1 (PSNR, dB)" in capsys.readouterr().err
    assert main([*lower, "--max-loss", "0.6", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["precision"] for layer in report["layers"]} == {"int8"}
    assert 0 < report["quality"]["lost"] < report["quality"]["bound"] <= 0.6
    noisy, clean = noisy_scene(100, 90, 25)
    spec = load_spec(FOLDER)
    decibels = []
    for engine in ("bundle", str(tmp_path / "low")):
        with Vision(spec, engine, threads=1) as opened:
            decibels.append(psnr(answer(opened, noisy).image, clean))
    assert decibels[0] != decibels[1]
    assert decibels[1] > decibels[0] - 0.1
    assert main(["plugin", "check", "vision", "--engine", str(tmp_path / "low")]) == 0


def test_a_plugin_without_an_engine_cannot_be_lowered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugin", "new", "plain"]) == 0
    assert main(["plugin", "lower", "plain", "-o", "low"]) == 2
    assert "plugin plain: has no engine that could be lowered" in capsys.readouterr().err
    assert not Path("low").exists()

"""The vision model, its tiles, scenes and training steps, without the shipped weights."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from plugins_irp.vision.data import load_sets, noisy_examples, psnr, scene_examples, with_noise
from plugins_irp.vision.facts import VisionConfig
from plugins_irp.vision.scenes import scene
from plugins_irp.vision.tiles import Tiling
from sage_edge.errors import InputError

torch = pytest.importorskip("torch")

from plugins_irp.vision.graphs import load_model  # noqa: E402
from plugins_irp.vision.judge import EVIDENCE, evidence  # noqa: E402
from plugins_irp.vision.model import UNIT, VisionModel  # noqa: E402
from plugins_irp.vision.train import Stream, continued, main, parser, teach_judge  # noqa: E402

SMALL = VisionConfig(tile=32, fine=8, middle=8, coarse=8, judge_width=16, max_steps=3)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 70), (64, 64), (65, 64), (180, 180), (321, 481), (100, 53)])
@pytest.mark.parametrize("overlap", [0, 12, 32])
def test_tiles_put_together_are_the_image(height: int, width: int, overlap: int) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (height, width)).astype(np.float32)
    tiling = Tiling(height, width, 64, overlap)
    tiles = tiling.cut(image)
    assert tiles.shape == (len(tiling.corners), 64, 64)
    assert np.allclose(tiling.blend(tiles), image, atol=1e-3)
    tops = sorted({top for top, _ in tiling.corners})
    assert all(64 - (b - a) >= overlap for a, b in itertools.pairwise(tops))


def test_where_tiles_disagree_the_blend_has_no_seam() -> None:
    """Two neighbours a hundred grey levels apart: over the overlap no pixel jumps by more than one part of it."""
    tiling = Tiling(64, 64 + 52, 64, 12)
    assert len(tiling.corners) == 2
    tiles = np.stack([np.zeros((64, 64), np.float32), np.full((64, 64), 100, np.float32)])
    rows = tiling.blend(tiles)
    assert np.abs(np.diff(rows, axis=1)).max() < 100 / 12
    assert rows[:, 0].max() == 0
    assert rows[:, -1].min() == 100


def test_an_overlap_of_a_whole_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Tiling(10, 10, 8, 8)


def test_a_tile_that_does_not_fit_the_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        VisionConfig(tile=60)


def test_the_model_scales_with_contrast_and_ignores_brightness() -> None:
    """Without biases, and with the mean taken off, a x + b has the noise of x times a."""
    torch.manual_seed(0)
    model = VisionModel(SMALL).eval()
    image = 255 * torch.rand(2, 1, 32, 32)

    def found(noisy: Any) -> Any:
        parts, *state = model.encode(noisy)
        for _ in range(3):
            state = list(model.step(parts, *state))
        return model.decode(state[-1])

    with torch.no_grad():
        base = found(image)
        assert torch.allclose(found(image + 40), base, atol=1e-3)
        assert torch.allclose(found(3 * image), 3 * base, rtol=1e-3, atol=1e-3)
    assert base.abs().max() > 1e-3


def test_parts_and_decode_are_inverse() -> None:
    model = VisionModel(SMALL)
    noise = UNIT * torch.randn(2, 1, 32, 32)
    noise -= noise.mean((2, 3), keepdim=True)
    assert torch.allclose(model.decode(model.encode(noise)[0]), noise, atol=1e-4)


def test_a_grown_model_computes_what_the_smaller_one_does_and_can_learn_more() -> None:
    torch.manual_seed(0)
    smaller, grown = VisionModel(SMALL), VisionModel(dataclasses.replace(SMALL, fine_blocks=3))
    grown.grow_from(smaller)
    parts, *state = smaller.encode(255 * torch.rand(2, 1, 32, 32))
    for ours, theirs in zip(grown.step(parts, *state), smaller.step(parts, *state), strict=True):
        assert torch.equal(ours, theirs)
    loss = grown.step(parts, *state)[-1].square().sum()
    seconds = [p for name, p in grown.named_parameters() if name.startswith("core_fine") and "second" in name]
    assert len(seconds) == 3
    assert all(gradient.abs().max() > 0 for gradient in torch.autograd.grad(loss, seconds))


@pytest.mark.parametrize(
    ("other", "named"), [({"coarse": 16}, "coarse=16"), ({"fine_blocks": 2}, "expected at most 1")]
)
def test_a_model_that_is_not_smaller_is_no_beginning(other: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        VisionModel(SMALL).grow_from(VisionModel(dataclasses.replace(SMALL, **other)))


def test_evidence_tells_white_noise_from_an_image() -> None:
    """Averaged over 2, 4 and 8 pixels a side, the deviation of white noise falls by as much; a plain does not."""
    torch.manual_seed(0)
    nothing = torch.zeros(1, 4, 64, 64)
    white, plain = (evidence(nothing, nothing, x)[0].exp() for x in (torch.randn(1, 4, 64, 64), nothing + 1))
    assert white.shape == (EVIDENCE,)
    assert white[4:7].tolist() == pytest.approx([0.5, 0.25, 0.125], rel=0.1)
    assert plain[4:7].tolist() == pytest.approx([1, 1, 1], rel=0.01)


@pytest.fixture
def small_run(tmp_path: Path) -> list[str]:
    """Data in `tmp_path`, and the options of a run on it that takes seconds."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "train400.npz", images=np.stack([scene(64, rng) for _ in range(10)]))
    np.savez(tmp_path / "set12.npz", a=scene(64, rng), b=scene(72, rng))
    return ["--data", str(tmp_path), "--batch", "2", "--patch", "16", "--fine", "8", "--middle", "8", "--coarse", "8",
            "--tile", "16", "--max-steps", "3", "--shallow", "2", "--shallow-until", "3", "--eval-every", "6",
            "--save-every", "3", "--log-every", "3", "--judge-patches", "4", "--device", "cpu"]  # fmt: skip


def trained(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "state.pt", weights_only=True)["model"]
    return found


def test_training_steps_lower_the_loss_and_a_run_resumes_bit_for_bit(tmp_path: Path, small_run: list[str]) -> None:
    assert parser().parse_args(["--data", "x", "--run", "y"]).max_steps == 6
    main([*small_run, "--run", str(tmp_path / "whole"), "--steps", "12", "--decay", "0.1"])
    # The same in two goes: the second begins from the state of the first.
    main([*small_run, "--run", str(tmp_path / "parts"), "--steps", "6", "--decay", "0"])
    main([*small_run, "--run", str(tmp_path / "parts"), "--steps", "12", "--decay", "0.1"])
    states = [trained(tmp_path / name) for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    rows = (tmp_path / "whole" / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "3", "6", "9", "12"]
    assert (tmp_path / "whole" / "hold.pt").is_file()
    assert {p.name for p in (tmp_path / "whole" / "model").iterdir()} == {"model.yaml", "weights.safetensors"}
    losses = [float(row.split(",")[3]) for row in rows[1:]]
    assert losses[-1] < losses[0]
    grow = ["--run", str(tmp_path / "grown"), "--steps", "3", "--grow", str(tmp_path / "whole" / "model")]
    main([*small_run, *grow, "--fine-blocks", "2"])
    model, file = load_model(tmp_path / "grown" / "model")
    assert len(model.core_fine) == 2
    assert "3 steps of batch 2" in file.source
    assert "grown from plugins_irp/vision/train.py: 12 steps" in file.source
    main([*small_run, *grow, "--run", str(tmp_path / "fast"), "--fine-blocks", "2", "--bfloat16"])
    exact, rounded = trained(tmp_path / "grown"), trained(tmp_path / "fast")
    assert any(not torch.equal(exact[name], rounded[name]) for name in exact)
    assert all(torch.allclose(exact[name], rounded[name], atol=0.05) for name in exact)
    with pytest.raises(SystemExit, match=r"whole/model: expected .*coarse=16"):
        main([*small_run, *grow, "--coarse", "16"])
    with pytest.raises(SystemExit, match="fine_blocks: expected at least 1, found 0"):
        main([*small_run, *grow, "--fine-blocks", "0"])
    for bad in ("0", "nan"):
        with pytest.raises(SystemExit, match="weights: expected finite numbers above 0, found 1.0 "):
            main([*small_run, *grow, "--fine-blocks", "2", "--weights", "1", bad])


def test_processes_that_share_the_batches_learn_what_one_learns(tmp_path: Path, small_run: list[str]) -> None:
    main([*small_run, "--run", str(tmp_path / "one"), "--steps", "6"])
    run = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--",
               "plugins_irp.vision.train", *small_run, "--run", str(run), "--steps", "6"]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = trained(tmp_path / "one"), trained(run)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)
    assert [row.split(",")[0] for row in (run / "log.csv").read_text().splitlines()] == ["step", "3", "6"]
    assert (run / "model" / "weights.safetensors").is_file()


def test_the_judge_learns_from_the_finished_model_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    model, rng = VisionModel(SMALL).eval(), np.random.default_rng(1)
    images = np.stack([scene(64, rng) for _ in range(8)])
    before = {name: p.clone() for name, p in model.named_parameters()}

    def misjudged() -> float:
        """Mean squared error of the guesses after the first step, on other patches."""
        clean, noisy, _ = Stream(images, 200, 32, 9).draw()
        parts, *state = model.encode(noisy)
        state = list(model.step(parts, *state))
        error = (model.decode(state[-1]) - (noisy - clean)).square().mean((1, 2, 3)).sqrt()
        guess = model.judged(parts, torch.zeros_like(state[-1]), state[-1])[:, 0]
        return float((guess - torch.log(error / UNIT)).square().mean())

    with torch.no_grad():
        first = misjudged()
    teach_judge(model, Stream(images, 10, 32, 2), 3000, Console(quiet=True))
    with torch.no_grad():
        assert misjudged() < 0.5 * first
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("judge")


def test_the_last_weight_stands_for_all_further_steps() -> None:
    assert continued([1.0, 2.0, 3.0], 5) == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert continued([1.0, 2.0, 3.0], 2) == [1.0, 2.0]


def test_patches_larger_than_the_images_are_refused() -> None:
    with pytest.raises(InputError, match="expected at most 16 pixels, as in the images, found 24"):
        Stream(np.zeros((2, 16, 32), np.uint8), 1, 24, 0)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "train400.npz", images=np.stack([scene(32, rng) for _ in range(10)]))
    np.savez(tmp_path / "set12.npz", a=scene(32, rng))
    torch.save({"model": {}}, tmp_path / "other.pt")
    small = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--patch", "32", "--tile", "32"]
    with pytest.raises(SystemExit, match=r"other\.pt: no state of this model: .*; Missing key"):
        main([*small, "--export", str(tmp_path / "other.pt")])
    (tmp_path / "damaged.pt").write_text("bad")
    with pytest.raises(SystemExit, match=r"damaged\.pt: no state of this model"):
        main([*small, "--export", str(tmp_path / "damaged.pt")])


def test_missing_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train400\.npz .* set12\.npz"):
        load_sets(tmp_path)


def test_every_tenth_image_is_held_out(tmp_path: Path) -> None:
    images = np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    np.savez(tmp_path / "train400.npz", images=images)
    np.savez(tmp_path / "set12.npz", a=images[0])
    sets = load_sets(tmp_path)
    assert sets.held[:, 0, 0].tolist() == [9, 19]
    assert len(sets.train) == 18


def test_scenes_are_the_same_each_time_and_have_the_statistics_of_images() -> None:
    few, more = scene_examples("calibration", 2, 64), scene_examples("calibration", 4, 64)
    other = scene_examples("report", 2, 64)
    for i in range(2):
        assert np.array_equal(few.references[i], more.references[i])
        assert np.array_equal(few.observations[i]["image"], more.observations[i]["image"])
        assert not np.array_equal(few.references[i], other.references[i])
    picture = scene(128, np.random.default_rng(0)).astype(np.float64)
    assert picture.std() > 20
    # Neighbours are alike: most differences are small, some (edges) are large.
    step = np.abs(np.diff(picture, axis=1))
    assert np.median(step) < 8 < np.percentile(step, 97)


def test_noise_has_its_level_and_levels_are_spread_evenly() -> None:
    flat = np.full((64, 64), 128, np.uint8)
    assert abs((with_noise(flat, 25, np.random.default_rng(0)) - 128.0).std() - 25) < 1
    found = noisy_examples([flat] * 200, 3)
    sigmas = np.array(found.groups["sigma"])
    assert sigmas.min() < 5
    assert sigmas.max() > 50
    assert psnr(found.observations[0]["image"], flat) == pytest.approx(20 * np.log10(255 / sigmas[0]), abs=0.5)

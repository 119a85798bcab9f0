"""Measure the shipped vision model: PSNR beside published figures, halting, OpenCV's non-local means beside it.

    python -m plugins_irp.vision.measure [--data DATA] [--engine BUNDLE] [-o results.json] [--pictures FOLDER]

Halting is certified on crops of the 40 images of train400 that were not trained on, and judged on crops of Set12; once more
with the certificate that synthetic scenes give, which is the one that a machine without the data has. Noise is seeded.
`--final FILE.npz` measures another set (BSD68) likewise, for the final comparison. Wants the extra `peers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sage_edge.arrays import read_npz
from sage_edge.cli.output import print_table
from sage_edge.device import machine
from sage_edge.errors import InputError, one_line_errors
from sage_edge.files import require_writable, write_atomic
from sage_edge.irp.measure import Recorded, calibrated, record_traces
from sage_edge.irp.spec import load_spec
from sage_edge.irp.traces import steps_taken

from .data import MAX_SIGMA, Bytes, crops, data_folder, load_sets, noisy_examples, psnr, with_noise
from .drive import Answer, answer
from .plugin import FOLDER, Vision

# PSNR in dB on Set12 and BSD68 as published by the DnCNN paper (arXiv 1608.03981, tables 2 and 3), sigma 25.
PUBLISHED = {"BM3D": (29.97, 28.57), "DnCNN-S": (30.44, 29.23), "DnCNN-B": (30.36, 29.16)}
SIGMAS = (5.0, 15.0, 25.0, 35.0, 50.0)
COMPARED = (15.0, 25.0, 50.0)  # what the literature reports
DRAWS = 4  # noise levels for each calibration crop; more would count as items what is hardly new
PARTS = (0, 11, 22, 33, 44, 55)  # steps are shown by noise level, between these
WAYS = ("opencv", "halted", "one_step")
FAST = 0.6  # dB that may be lost on average where time counts more
REPEATS = 3  # of a timed image: its median counts
STRENGTHS = (0.5, 0.65, 0.8, 0.95)  # of non-local means, in proportion to the noise level


def quality(plugin: Vision, images: Sequence[Bytes], policy: str, sigmas: Sequence[float]) -> list[dict[str, Any]]:
    """Whole images, noise as the literature has it: mean PSNR by step and halted."""
    rows = []
    for sigma in sigmas:
        every = [_run(plugin, image, sigma, number, policy) for number, image in enumerate(images)]
        rows.append({
            "sigma": sigma, "per_step": [float(v) for v in np.mean([one.quality for one in every], 0)],
            "halted": float(np.mean([one.quality[one.halted - 1] for one in every])),
            "steps": float(np.mean([one.halted for one in every])),
            "tile_steps": float(np.mean([one.tile_steps[one.halted - 1] for one in every])),
            "tile_steps_full": float(np.mean([one.tile_steps[-1] for one in every])),
        })  # fmt: skip
    return rows


def _run(plugin: Vision, clean: Bytes, sigma: float, seed: int, policy: str) -> Answer:
    return answer(plugin, with_noise(clean, sigma, np.random.default_rng(seed)), policy, clean)


def beside_opencv(
    plugin: Vision, images: Sequence[Bytes], policy: str, sigmas: Sequence[float]
) -> list[dict[str, Any]]:
    """The same 8-bit noisy images through the halted plugin, one step of it, and cv2.fastNlMeansDenoising, interleaved, one
    thread each; an image's time is the median of REPEATS. Non-local means is told the noise level, and its strength is chosen
    for it on the first four images. Raises InputError without OpenCV."""
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise InputError("the comparison needs OpenCV: pip install 'sage-edge[peers]'") from error
    cv2.setNumThreads(1)
    rows = []
    for sigma in sigmas:
        noisy = [_bytes(with_noise(im, sigma, np.random.default_rng(n))) for n, im in enumerate(images)]
        strengths = [
            np.mean(
                [psnr(cv2.fastNlMeansDenoising(n, None, f * sigma), c) for n, c in zip(noisy[:4], images, strict=False)]
            )
            for f in STRENGTHS
        ]
        best = STRENGTHS[int(np.argmax(strengths))]
        ways: dict[str, Callable[[Bytes], npt.NDArray[Any]]] = {
            "opencv": partial(cv2.fastNlMeansDenoising, dst=None, h=best * sigma),
            "halted": lambda image: answer(plugin, image, policy).image,
            "one_step": lambda image: answer(plugin, image, "max_steps:1").image,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        decibels: dict[str, list[float]] = {way: [] for way in ways}
        for image, clean in zip(noisy, images, strict=True):
            taken: dict[str, list[float]] = {way: [] for way in ways}
            restored: dict[str, npt.NDArray[Any]] = {}
            for way, restore in REPEATS * list(ways.items()):
                began = time.perf_counter()
                restored[way] = restore(image)
                taken[way].append(time.perf_counter() - began)
            for way in ways:
                seconds[way].append(float(np.median(taken[way])))
                decibels[way].append(psnr(restored[way], clean))
        ratio = {way: np.percentile(np.divide(seconds[way], seconds["opencv"]), (25, 50, 75)).tolist() for way in ways}
        rows.append(
            {
                "sigma": sigma,
                "strength": best,
                "decibels": {way: float(np.mean(v)) for way, v in decibels.items()},
                "seconds": {way: float(np.mean(v)) for way, v in seconds.items()},
                "time_ratio_quartiles": ratio,
            }
        )
    return rows


def _bytes(image: npt.NDArray[np.float32]) -> Bytes:
    return np.asarray(image.clip(0, 255).round(), np.uint8)


def record(plugin: Vision, images: Sequence[Bytes], seed: int, draws: int = 1) -> Recorded:
    """Traces of all crops of one tile, each with `draws` noise levels."""
    whole = [crop for _ in range(draws) for crop in crops(images, plugin.tile)]
    return record_traces(plugin, noisy_examples(whole, seed))


def judged(recorded: Recorded, policy: str) -> list[dict[str, Any]]:
    """What halting by `policy` costs and saves, over all and by noise level. oracle: the first step within 0.01 dB of the
    last, which nobody can know."""
    taken = steps_taken(recorded.traces, policy)
    sigma, full = recorded.groups["sigma"], recorded.quality[:, -1]
    halted = recorded.quality[np.arange(len(full)), taken - 1]
    oracle = (recorded.quality >= full[:, None] - 0.01).argmax(1) + 1
    parts = [("all", 0.0, MAX_SIGMA + 1), *((f"{a}-{b}", a, b) for a, b in itertools.pairwise(PARTS))]
    rows = []
    for name, low, high in parts:
        at = np.flatnonzero((sigma >= low) & (sigma < high))
        rows.append({
            "sigma": name, "examples": len(at), "full": float(full[at].mean()), "halted": float(halted[at].mean()),
            "first": float(recorded.quality[at, 0].mean()), "lost": float((full - halted)[at].mean()),
            "steps": float(taken[at].mean()), "saved": 1 - float(taken[at].mean()) / recorded.quality.shape[1],
            "oracle_steps": float(oracle[at].mean()),
        })  # fmt: skip
    return rows


def colour(plugin: Vision, policy: str, sigmas: Sequence[float]) -> list[dict[str, Any]]:
    """The two photographs that scikit-learn ships (CC BY 2.0), 256 x 256 from their middle: PSNR after halting in opponent
    colours, and of the same model on R, G and B one by one. Empty without scikit-learn."""
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError:
        return []
    images = [np.ascontiguousarray(im[80:336, 192:448]) for im in load_sample_images().images]
    rows = []
    for sigma in sigmas:
        noisy = [with_noise(im, sigma, np.random.default_rng(n)) for n, im in enumerate(images)]
        ours = [psnr(answer(plugin, n, policy).image, c) for n, c in zip(noisy, images, strict=True)]
        split = [
            psnr(np.stack([answer(plugin, n[..., k], policy).image for k in range(3)], -1), c)
            for n, c in zip(noisy, images, strict=True)
        ]
        rows.append({"sigma": sigma, "opponent": float(np.mean(ours)), "separate": float(np.mean(split)),
                     "noisy": float(np.mean([psnr(n, c) for n, c in zip(noisy, images, strict=True)]))})  # fmt: skip
    return rows


def measure(
    plugin: Vision, folder: Path, sigmas: Sequence[float], final: Path | None, peers: bool, limit: int | None = None
) -> dict[str, Any]:
    """Everything; the plugin is active."""
    sets, spec = load_sets(folder), plugin.spec.bench
    assert spec is not None
    count = min(spec.calibration_examples, limit or spec.calibration_examples)
    held = record(plugin, list(sets.held), 11, max(1, DRAWS * count // spec.calibration_examples))
    photographs, fast = calibrated(plugin, held), calibrated(plugin, held, FAST)
    scenes = calibrated(plugin, record_traces(plugin, plugin.examples(spec.calibration, count)))
    test = record(plugin, sets.chosen, 12)
    policy = photographs.chosen.policy
    found = {
        "weights_sha256": plugin.file.weights_sha256, "source": plugin.file.source, "engine": Path(plugin.engine).name,
        "machine": asdict(machine()), "command": "python -m plugins_irp.vision.measure " + " ".join(sys.argv[1:]),
        "published": PUBLISHED,
        "certified": {
            "photographs": asdict(photographs.chosen), "scenes": asdict(scenes.chosen), "photographs, fast": asdict(fast.chosen)
        },
        "held_per_step": held.quality.mean(0).tolist(),
        "halting": {
            "photographs": judged(test, policy), "scenes": judged(test, scenes.chosen.policy),
            "photographs, fast": judged(test, fast.chosen.policy),
        },
        "set12": quality(plugin, sets.chosen, policy, [s for s in sigmas if s in COMPARED]),
        "colour": colour(plugin, policy, [25.0]),
    }  # fmt: skip
    if peers:
        found["opencv"] = beside_opencv(plugin, sets.chosen, policy, sigmas)
    if final:
        images = [array.astype(np.uint8) for array in read_npz(final).values()]
        found["final"] = quality(plugin, images, policy, COMPARED)
    return found


def show(found: dict[str, Any]) -> None:
    """The results as tables on standard output."""
    for name in ("set12", "final"):
        if name in found:
            print_table(f"{name}, whole images, PSNR in dB", ("sigma", "per step", "halted", "steps", "steps a tile"),
                        [(f"{r['sigma']:g}", " ".join(f"{v:.2f}" for v in r["per_step"]), f"{r['halted']:.2f}",
                         f"{r['steps']:.2f}", f"{r['tile_steps']:.2f}") for r in found[name]])  # fmt: skip
    print("mean PSNR on the certificate's crops by step, dB:", *(f"{v:.3f}" for v in found["held_per_step"]))
    for name, chosen in found["certified"].items():
        promise = f"{chosen['policy']} (bound {chosen['bound']:.4f} dB, {chosen['items']} items)"
        print_table(f"Set12 crops, certified on {name}: {promise}",
                    ("sigma", "examples", "first step", "full", "halted", "lost", "steps", "saved", "oracle's steps"),
                    [(r["sigma"], str(r["examples"]), *(f"{r[k]:.2f}" for k in ("first", "full", "halted")), f"{r['lost']:.3f}",
                     f"{r['steps']:.2f}", f"{r['saved']:.0%}", f"{r['oracle_steps']:.2f}")
                     for r in found["halting"][name]])  # fmt: skip
    if found.get("opencv"):
        print_table("8-bit Set12, one thread: certified halting, and one step, beside OpenCV's fastNlMeansDenoising",
                    ("sigma", "OpenCV, dB", "halted, dB", "one step, dB", "OpenCV, ms", "halted, ms", "one step, ms",
                     "halted / OpenCV", "one step / OpenCV"),
                    [(f"{r['sigma']:g}", *(f"{r['decibels'][w]:.2f}" for w in WAYS),
                     *(f"{1e3 * r['seconds'][w]:.0f}" for w in WAYS),
                     *("{1:.2f} ({0:.2f}-{2:.2f})".format(*r["time_ratio_quartiles"][w]) for w in WAYS[1:]))
                     for r in found["opencv"]])  # fmt: skip
    if found["colour"]:
        print_table("colour, two photographs, PSNR in dB", ("sigma", "noisy", "opponent channels", "R, G, B one by one"),
                    [(f"{r['sigma']:g}", *(f"{r[k]:.2f}" for k in ("noisy", "opponent", "separate")))
                     for r in found["colour"]])  # fmt: skip


@one_line_errors()
def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with train400.npz and set12.npz")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS), help="noise levels of whole images")
    parser.add_argument("--final", type=Path, metavar="NPZ", help="images uint8 [h, w] of another set, e.g. BSD68")
    parser.add_argument("--engine", help="a bundle or an engine instead of the plugin's own (`sage-edge plugin lower`)")
    parser.add_argument("--no-peers", action="store_true", help="without OpenCV")
    parser.add_argument("--pictures", type=Path, help="write pictures and energy curves to this folder")
    parser.add_argument("--limit", type=int, help="only this many calibration items, for a quick look")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if arguments.output:
        require_writable(arguments.output)
    spec = load_spec(FOLDER)
    options = {**spec.options, **({"engine": arguments.engine} if arguments.engine else {})}
    with Vision(spec, threads=arguments.threads, **options) as plugin:
        found = measure(
            plugin, arguments.data, arguments.sigmas, arguments.final, not arguments.no_peers, arguments.limit
        )
        if arguments.pictures:
            from .pictures import draw

            draw(plugin, found["certified"]["photographs"]["policy"], arguments.pictures)
    show(found)
    if arguments.output:
        write_atomic(arguments.output, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""A look inside the torch model while it thinks: how z_H and z_L move cycle by cycle, and what attention looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sage_edge.export.hrm import HRM
from sage_edge.export.layers import Attention
from sage_edge.specs import Array

Floats = npt.NDArray[np.float64]
LEVELS = ("z_H", "z_L")


@dataclass(frozen=True)
class Evolution:
    """One level over c cycles for n requests; cycle 0 is the initial state, so that arrays have c + 1 columns.

    norm [n, c + 1]: root mean square of the state. velocity [n, c + 1]: RMS of the change since the cycle before, relative
    to the norm there; 0 at cycle 0. cosine [n, c + 1]: between a state and the one before; 1 at cycle 0. path [n, c + 1, 2]:
    the first two principal components of all states of all requests. explained: share of variance of the two.
    """

    norm: Floats
    velocity: Floats
    cosine: Floats
    path: Floats
    explained: tuple[float, float]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` saw. prediction int [n, steps, seq_len]; attention by level: the last layer's weights after the last
    cycle, averaged over heads, [n, positions, positions] with the puzzle prefix first."""

    cycles_per_step: int
    prefix: int
    evolution: dict[str, Evolution]
    attention: dict[str, npt.NDArray[np.float32]]
    prediction: Array


def inspect(model: HRM, observation: dict[str, Array], steps: int) -> Inspection:
    """Run n requests for `steps` steps in fp32 and record every cycle. observation: `inputs` int [n, seq_len],
    `puzzle_identifiers` int [n], checked by the caller."""
    config = model.config
    states: dict[str, list[Array]] = {name: [] for name in LEVELS}
    predictions = []
    with torch.inference_mode(), _watched(model) as attention:
        tokens, identifiers = (torch.from_numpy(observation[k]) for k in ("inputs", "puzzle_identifiers"))
        context, z_H, z_L = model.encode(tokens, identifiers)
        _keep(states, z_H, z_L)
        for _ in range(steps):
            for _ in range(config.H_cycles):
                z_H, z_L = model.cycle(context, z_H, z_L)
                _keep(states, z_H, z_L)
            predictions.append(model.logits(z_H).argmax(-1).numpy())
    return Inspection(
        config.H_cycles,
        config.prefix,
        {name: evolution(np.stack(kept, axis=1)) for name, kept in states.items()},
        attention,
        np.stack(predictions, axis=1),
    )


def _keep(states: dict[str, list[Array]], z_H: Tensor, z_L: Tensor) -> None:
    for name, state in zip(LEVELS, (z_H, z_L), strict=True):
        states[name].append(state.float().flatten(1).numpy().copy())


@contextmanager
def _watched(model: HRM) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
    """Weights of the last layer of each level at its latest call, averaged over heads; filled while the block runs."""
    seen: dict[str, npt.NDArray[np.float32]] = {}

    def watch(name: str) -> Callable[[Attention, tuple[Any, ...]], None]:
        def hook(module: Attention, arguments: tuple[Any, ...]) -> None:
            seen[name] = module.weights(*arguments)[0].float().mean(1).numpy()

        return hook

    handles = [
        level.layers[-1].self_attn.register_forward_pre_hook(watch(name))  # type: ignore[union-attr]
        for name, level in zip(LEVELS, (model.H_level, model.L_level), strict=True)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def evolution(states: Array) -> Evolution:
    """Measures of states [n, c + 1, d]."""
    x = states.astype(np.float64)
    norm = np.sqrt((x**2).mean(-1))
    move = np.zeros_like(norm)
    move[:, 1:] = np.sqrt(((x[:, 1:] - x[:, :-1]) ** 2).mean(-1))
    velocity = move.copy()
    velocity[:, 1:] /= np.maximum(norm[:, :-1], 1e-12)
    cosine = np.ones_like(norm)
    cosine[:, 1:] = (x[:, 1:] * x[:, :-1]).mean(-1) / np.maximum(norm[:, 1:] * norm[:, :-1], 1e-12)
    flat = x.reshape(-1, x.shape[-1])
    centred = flat - flat.mean(0)
    # The Gram matrix is small (requests x cycles); the states have thousands of dimensions.
    values, vectors = np.linalg.eigh(centred @ centred.T)
    values = np.maximum(values[::-1], 0)
    path = vectors[:, ::-1][:, :2] * np.sqrt(values[:2])
    total = max(float(values.sum()), 1e-30)
    explained = (float(values[0]) / total, float(values[1]) / total)
    return Evolution(norm, velocity, cosine, path.reshape(*norm.shape, 2), explained)


def as_json(found: Inspection) -> dict[str, Any]:
    """The numbers as plain lists; attention maps go to inspection.npz, for they are large."""
    levels = {
        name: {
            "norm": e.norm.tolist(), "velocity": e.velocity.tolist(), "cosine": e.cosine.tolist(), "path": e.path.tolist(),
            "explained": e.explained,
        }
        for name, e in found.evolution.items()
    }  # fmt: skip
    changed = (found.prediction[:, 1:] != found.prediction[:, :-1]).sum(-1)
    return {"cycles_per_step": found.cycles_per_step, "prefix": found.prefix, "levels": levels,
            "tokens_changed": changed.tolist(), "prediction": found.prediction[:, -1].tolist()}  # fmt: skip


def plot(found: Inspection, folder: Path) -> list[Path]:
    """Write evolution.png, path.png and attention.png. Needs matplotlib."""
    from matplotlib.figure import Figure

    cycles = np.arange(found.evolution["z_H"].norm.shape[1])
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(3, 2, sharex=True)
    rows = (("norm", "RMS"), ("velocity", "relative change"), ("cosine", "cosine to the cycle before"))
    for column, level in enumerate(LEVELS):
        for (field, label), axis in zip(rows, axes[:, column], strict=True):
            values = getattr(found.evolution[level], field)
            begin = 0 if field == "norm" else 1  # nothing comes before cycle 0
            axis.plot(cycles[begin:], values[:, begin:].T, color="tab:blue", alpha=max(0.3, 1 / len(values)), lw=1)
            axis.plot(cycles[begin:], np.median(values[:, begin:], axis=0), color="black", lw=2)
            if field == "velocity":
                axis.set_yscale("log")
            for end in range(found.cycles_per_step, len(cycles), found.cycles_per_step):
                axis.axvline(end, color="0.85", lw=1, zorder=0)
            axis.set_ylabel(label)
        axes[0, column].set_title(f"{level}: requests (blue), median (black)")
        axes[2, column].set_xlabel("cycle (grey lines: ends of steps)")
    paths = [folder / "evolution.png"]
    figure.savefig(paths[0], dpi=110)

    figure = Figure(figsize=(11, 5), layout="constrained")
    for level, axis in zip(LEVELS, figure.subplots(1, 2), strict=True):
        e = found.evolution[level]
        for one in e.path:
            axis.plot(*one.T, color="0.75", lw=0.8, zorder=1)
        dots = axis.scatter(*e.path.reshape(-1, 2).T, c=np.tile(cycles, len(e.path)), cmap="viridis", s=12, zorder=2)
        axis.set_title(f"{level}: principal components")
        axis.set_xlabel(f"first ({e.explained[0]:.0%} of variance)")
        axis.set_ylabel(f"second ({e.explained[1]:.0%})")
        figure.colorbar(dots, ax=axis, label="cycle")
    paths.append(folder / "path.png")
    figure.savefig(paths[1], dpi=110)

    shown = min(3, len(found.attention["z_H"]))
    figure = Figure(figsize=(4.2 * shown + 0.6, 8), layout="constrained")
    axes = figure.subplots(2, shown, squeeze=False)
    for line, level in zip(axes, LEVELS, strict=True):
        for request, axis in enumerate(line):
            weights = found.attention[level][request]
            image = axis.imshow(weights, cmap="magma", vmin=0, vmax=float(np.quantile(weights, 0.995)))
            axis.set_title(f"{level}, request {request}")
            figure.colorbar(image, ax=axis, shrink=0.8)
    axes[1, 0].set_xlabel("attended position (puzzle prefix first)")
    axes[1, 0].set_ylabel("position")
    paths.append(folder / "attention.png")
    figure.savefig(paths[2], dpi=110)
    return paths

"""Trained weights on disk: the original training code's checkpoints come in, model folders are what we keep.

An original checkpoint is a folder as sapientinc/HRM writes it: `all_config.yaml` and `step_N` (a torch state dict),
here with the data set's `dataset.json` beside them where the shapes need it. `import_checkpoint` reads one;
`open_model` takes it or a model folder (`sage_edge.export.model_folder`), whose functions are offered here too.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from safetensors.numpy import load_file

from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.export._unpickle import unpickle
from sage_edge.export.hrm import HRM
from sage_edge.export.model_folder import (
    Weights,
    build,
    check_weights,
    count_layers,
    load_model_folder,
    save_model_folder,
)
from sage_edge.export.recipe import CHECKPOINT, RECIPE, Recipe, model_name
from sage_edge.files import sha256
from sage_edge.specs import Array, Family, HRMConfig

__all__ = ["ImportInfo", "import_checkpoint", "load_model_folder", "open_model", "save_model_folder"]

CONFIG, DATASET = "all_config.yaml", "dataset.json"
MAX_BYTES = 8 << 30
TIMEOUT_S = 600.0
PREFIX = re.compile(r"(?:_orig_mod\.)?model\.inner\.")  # torch.compile and the loss wrapper put themselves in front
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# Buffers that the original does not persist, but that other versions of it may have: all can be computed again.
LEFTOVERS = frozenset(
    ("rotary_emb.cos_cached", "rotary_emb.sin_cached", "rotary_emb.inv_freq", "rotary.cos", "rotary.sin",
     "puzzle_emb.local_weights", "puzzle_emb.local_ids")
)  # fmt: skip


@dataclass(frozen=True)
class ImportInfo:
    """Where imported weights come from: the step file, its digest, its precision, and how it was opened.

    `dtype` is that of the weights before widening, several joined by "+"; `forward_dtype` is the precision in which the
    original computed (we compute in float32); `isolation` is `_unpickle.Conversion.isolation`.
    """

    file: str
    step: int
    sha256: str
    dtype: str
    forward_dtype: str
    dropped: tuple[str, ...]
    isolation: str

    @property
    def source(self) -> str:
        return f"imported from {self.file} (sha256 {self.sha256})"


@dataclass(frozen=True)
class _Arch:
    """`arch` of all_config.yaml, as far as it shapes the model; defaults are the original's."""

    FOREIGN: ClassVar[bool] = True
    hidden_size: int
    num_heads: int
    H_layers: int
    L_layers: int
    H_cycles: int
    L_cycles: int
    halt_max_steps: int
    expansion: float
    pos_encodings: Literal["rope", "learned"]
    puzzle_emb_ndim: int = 0
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    forward_dtype: str = "bfloat16"
    family: Family | None = None
    vocab_size: int | None = None
    seq_len: int | None = None
    num_puzzle_identifiers: int | None = None


@dataclass(frozen=True)
class _AllConfig:
    FOREIGN: ClassVar[bool] = True
    arch: _Arch


@dataclass(frozen=True)
class _Dataset:
    FOREIGN: ClassVar[bool] = True
    vocab_size: int | None = None
    seq_len: int | None = None
    num_puzzle_identifiers: int | None = None


def import_checkpoint(
    folder: Path, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT_S
) -> tuple[HRMConfig, Weights, ImportInfo]:
    """Read an original checkpoint folder: its configuration and its weights, float32, under the names of our `HRM`.

    The pickle is opened in a child process (`_unpickle`) that gets `timeout` seconds and files up to `max_bytes`.
    Raises InputError, one line, for missing files, keys or tensors, for wrong types, shapes or dtypes, for files that
    disagree with each other, for NaN or Inf, and for a step file that is not a plain state dict.
    """
    step, path = _newest_step(folder)
    arch = load_yaml(folder / CONFIG, _AllConfig).arch
    # JSON is YAML, and this way its complaints have lines too.
    dataset = load_yaml(folder / DATASET, _Dataset) if (folder / DATASET).exists() else None
    with tempfile.TemporaryDirectory(prefix="sage-edge-import-") as temporary:
        converted = Path(temporary) / CHECKPOINT
        conversion = unpickle(path, converted, max_bytes, timeout)
        arrays = load_file(converted)
    if not any(PREFIX.match(key) for key in arrays):
        found = f"the first is {next(iter(arrays))!r}" if arrays else "it is empty"
        raise InputError(f"{path}: not an HRM: no tensor's name begins with 'model.inner.' ({found})")
    tensors: dict[str, Array] = {}
    dtypes: set[str] = set()
    dropped: list[str] = []
    for key, array in arrays.items():
        name = PREFIX.sub("", key, count=1) if PREFIX.match(key) else key
        if name in LEFTOVERS:
            dropped.append(name)
            continue
        if name in tensors:
            raise InputError(f"{path}: holds {name!r} twice, under different prefixes")
        if conversion.dtypes[key] not in WEIGHT_DTYPES:
            raise InputError(f"{path}: {key!r} is {conversion.dtypes[key]}; expected {', '.join(WEIGHT_DTYPES)}")
        dtypes.add(conversion.dtypes[key])
        tensors[name] = array
    config = _config(folder, path, arch, dataset, tensors)
    weights = check_weights(tensors, config, str(path))
    info = ImportInfo(
        file=path.name, step=step, sha256=sha256(path), dtype="+".join(sorted(dtypes)),
        forward_dtype=arch.forward_dtype, dropped=tuple(sorted(dropped)), isolation=conversion.isolation,
    )  # fmt: skip
    return config, weights, info


def open_model(folder: Path, *, max_bytes: int = MAX_BYTES, timeout: float = TIMEOUT_S) -> tuple[Recipe, HRM]:
    """The model in a model folder or in an original checkpoint folder: on the CPU, in eval mode, without gradients.

    Nothing is written beside an original checkpoint: it is imported through a temporary model folder. Raises InputError
    or IntegrityError as `load_model_folder` and `import_checkpoint` do, and InputError for a path that is neither.
    """
    if (folder / RECIPE).is_file():
        recipe, weights = load_model_folder(folder)
    elif (folder / CONFIG).is_file():
        config, arrays, info = import_checkpoint(folder, max_bytes=max_bytes, timeout=timeout)
        with tempfile.TemporaryDirectory(prefix="sage-edge-import-") as temporary:
            save_model_folder(
                Path(temporary), arrays, name=model_name(folder), config=config, source=info.source,
                weights_dtype=info.dtype,
            )  # fmt: skip
            recipe, weights = load_model_folder(Path(temporary))
    else:
        raise InputError(
            f"{folder}: no model here; looked for a model folder ({RECIPE} and {CHECKPOINT}) "
            f"and for an original checkpoint ({CONFIG} and step_N)"
        )
    model = build(recipe.config, str(folder))
    model.load_state_dict(weights)
    return recipe, model.eval().requires_grad_(False)


def _newest_step(folder: Path) -> tuple[int, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one with {CONFIG} and step_N")
    # The original also writes step_N_all_preds.R; only a bare number is a state dict.
    steps = [(int(p.name[5:]), p) for p in folder.iterdir() if re.fullmatch(r"step_[0-9]+", p.name) and p.is_file()]
    if not steps:
        raise InputError(f"{folder}: holds no checkpoint (expected a file called step_N, N a number)")
    return max(steps)


def _config(folder: Path, step: Path, arch: _Arch, dataset: _Dataset | None, tensors: Mapping[str, Array]) -> HRMConfig:
    """What all_config.yaml, dataset.json and the shapes say together; InputError where they disagree or say too little."""

    def size(name: str, axis: int) -> int | None:
        return tensors[name].shape[axis] if name in tensors and tensors[name].ndim == 2 else None

    def agreed(name: str, in_tensors: Mapping[str, int | None], ours: int | None) -> int | None:
        claims = {f"{CONFIG} (arch.{name})": ours}
        claims |= {DATASET: getattr(dataset, name, None)}
        claims |= {f"{step.name} ({where})": value for where, value in in_tensors.items()}
        found = {where: value for where, value in claims.items() if value is not None}
        if len(set(found.values())) > 1:
            text = ", ".join(f"{value} in {where}" for where, value in found.items())
            raise InputError(f"{folder}: the files disagree on {name}: {text}")
        return next(iter(found.values()), None)

    tokens, table, head = "embed_tokens.embedding_weight", "puzzle_emb.weights", "lm_head.weight"
    positions = "embed_pos.embedding_weight"
    agreed("hidden_size", {f"columns of {tokens}": size(tokens, 1)}, arch.hidden_size)
    agreed("puzzle_emb_ndim", {f"columns of {table}": size(table, 1)}, arch.puzzle_emb_ndim)
    for level, ours in (("H", arch.H_layers), ("L", arch.L_layers)):
        agreed(f"{level}_layers", {f"{level}_level.layers.*": count_layers(tensors, level)}, ours)
    vocabulary = {f"rows of {tokens}": size(tokens, 0), f"rows of {head}": size(head, 0)}
    vocab_size = agreed("vocab_size", vocabulary, arch.vocab_size)
    identifiers = agreed("num_puzzle_identifiers", {f"rows of {table}": size(table, 0)}, arch.num_puzzle_identifiers)
    prefix = -(arch.puzzle_emb_ndim // -max(arch.hidden_size, 1))
    rows = size(positions, 0)
    learned = {f"rows of {positions} less {prefix} for the puzzle": None if rows is None else rows - prefix}
    seq_len = agreed("seq_len", learned, arch.seq_len)
    for name, value in (("vocab_size", vocab_size), ("seq_len", seq_len)):
        if value is None:
            raise InputError(
                f"{folder / DATASET}: {name} is needed and nothing else gives it; copy the data set's file here"
                + (f" (positions are {arch.pos_encodings})" if name == "seq_len" else "")
            )
    assert vocab_size is not None
    assert seq_len is not None
    two_way = any(name.startswith(("h_to_l.", "l_to_h.")) for name in tensors)
    family: Family = "hrm-bidirectional" if two_way else "hrm-act-v1"
    if arch.family not in (None, family):
        raise InputError(
            f"{folder}: the files disagree on family: {arch.family} in {CONFIG} (arch.family), "
            f"{family} in {step.name} ({'it holds' if two_way else 'it lacks'} h_to_l and l_to_h)"
        )
    try:
        return HRMConfig(
            vocab_size=vocab_size, seq_len=seq_len, num_puzzle_identifiers=1 if identifiers is None else identifiers,
            hidden_size=arch.hidden_size, num_heads=arch.num_heads, H_layers=arch.H_layers, L_layers=arch.L_layers,
            H_cycles=arch.H_cycles, L_cycles=arch.L_cycles, halt_max_steps=arch.halt_max_steps,
            expansion=arch.expansion, puzzle_emb_ndim=arch.puzzle_emb_ndim, pos_encodings=arch.pos_encodings,
            rms_norm_eps=arch.rms_norm_eps, rope_theta=arch.rope_theta, family=family,
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"{folder / CONFIG}: 'arch': {error}") from error

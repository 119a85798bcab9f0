"""The recipe of a model folder: what the weights in `checkpoint.safetensors` are, readable without torch.

A model folder is the one form in which the rest of sage-edge meets a trained model: `recipe.yaml` (this `Recipe`) and
`checkpoint.safetensors` (float32). Whatever else lies there (training script, model card) belongs to people.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.specs import HRMConfig

RECIPE = "recipe.yaml"
CHECKPOINT = "checkpoint.safetensors"

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Recipe:
    """One trained model.

    `name` is short and fit for a file name; `checkpoint_sha256` is the digest of `checkpoint.safetensors`; `source`
    says in words where the weights come from; `weights_dtype` is the precision in which training stored them
    ("float32", "bfloat16", or several joined by "+"): the safetensors file itself is always float32.
    Raises ValueError, naming the field, for a name or a digest of another form.
    """

    name: str
    config: HRMConfig
    checkpoint_sha256: str
    source: str
    weights_dtype: str = "float32"

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(
                f"name: expected up to 64 of A-Z a-z 0-9 . _ -, a letter or digit first, found {self.name!r}"
            )
        if not DIGEST.fullmatch(self.checkpoint_sha256):
            raise ValueError(f"checkpoint_sha256: expected 64 hexadecimal digits, found {self.checkpoint_sha256!r}")


def read_recipe(folder: Path) -> Recipe:
    """The recipe of the model folder `folder`.

    Raises InputError when there is none, or naming file, line and key for what `sage_edge.config` refuses.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no {RECIPE} in it)")
    return load_yaml(path, Recipe)


def model_name(path: Path) -> str:
    """A valid `Recipe.name` made from the last part of `path`."""
    text = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).lstrip("._-")[:64]
    return text or "model"

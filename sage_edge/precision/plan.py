"""What a user asks for: one precision, one for each module, a file, or `auto`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.precision.gate import Limits
from sage_edge.specs import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "fp8")
# The plan for models that think slowly in H and fast in L: H decides and stays wider, L does most of the work.
MIXED: dict[str, Precision] = {"H": "fp16", "L": "fp8"}
HELP = "fp32, fp16, int8, fp8, mixed (H: fp16, L: fp8), auto, 'H: fp16, L: int8', or a YAML file"


@dataclass(frozen=True)
class PlanFile:
    """A plan as a YAML file. modules: precision by module; layers: by layer, stronger than `modules`; allow: for `auto`."""

    modules: dict[str, Precision] = field(default_factory=dict)
    layers: dict[str, Precision] = field(default_factory=dict)
    auto: bool = False
    allow: tuple[Literal["fp16", "int8", "fp8"], ...] = ("fp16", "int8", "fp8")
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.auto and (self.modules or self.layers):
            raise ValueError("auto: finds modules and layers by itself; leave `modules` and `layers` out")
        if not self.auto and not self.modules and not self.layers:
            raise ValueError("modules: expected a precision for at least one module, or `auto: true`")
        if self.auto and not self.allow:
            raise ValueError("allow: expected at least one of fp16, int8, fp8")


@dataclass(frozen=True)
class Request:
    """A plan with the words it was asked for in."""

    text: str
    plan: PlanFile

    def of(self, name: str, module: str) -> Precision:
        """The precision asked for a layer; a module that is not named stays fp32."""
        default = self.plan.modules.get(module, self.plan.modules.get("*", "fp32"))
        return self.plan.layers.get(name, default)


def parse_request(text: str) -> Request:
    """`--precision` as a user writes it. Raises InputError, naming what was expected."""
    word = text.strip()
    if word in PRECISIONS:
        return Request(word, PlanFile(modules={"*": word}))
    if word == "mixed":
        return Request(word, PlanFile(modules=dict(MIXED)))
    if word == "auto":
        return Request(word, PlanFile(auto=True))
    if word.endswith((".yaml", ".yml")):
        return Request(Path(word).name, load_yaml(Path(word), PlanFile))
    chosen: dict[str, Precision] = {}
    for part in re.split(r"[,;]", word):
        module, colon, wanted = (piece.strip() for piece in re.sub("=", ":", part, count=1).partition(":"))
        precision = next((p for p in PRECISIONS if p == wanted), None)
        if not colon or not module or precision is None or module in chosen:
            raise InputError(f"precision {text!r}: not understood at {part.strip()!r}; expected {HELP}")
        chosen[module] = precision
    return Request(word, PlanFile(modules=chosen))

"""Which names of TensorRT a source file uses, and which names a release's stub has."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

ALIAS = "trt"


@dataclass(frozen=True)
class Use:
    """A dotted name below the module, e.g. BuilderFlag.TF32. optional: looked up by its text, absent in some releases."""

    name: str
    optional: bool
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: tensorrt.{self.name}"


def names_of_stub(path: Path) -> set[str]:
    """Every class, function, variable and class member of a stub, inherited members included, as dotted names."""
    members: dict[str, set[str]] = {}
    bases: dict[str, list[str]] = {}

    def collect(body: list[ast.stmt], prefix: str) -> set[str]:
        found: set[str] = set()
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            if isinstance(node, ast.ClassDef):
                name = prefix + node.name
                members[name] = collect(node.body, f"{name}.")
                bases[name] = [base.id for base in node.bases if isinstance(base, ast.Name)]
        return found

    top = collect(ast.parse(path.read_text(encoding="utf-8")).body, "")

    def inherited(name: str) -> set[str]:
        return members.get(name, set()).union(*(inherited(base) for base in bases.get(name, [])))

    return top | {f"{name}.{member}" for name in members for member in inherited(name)}


def uses(path: Path) -> list[Use]:
    """Names below `trt` in a source file, and members that `optional_member(trt.X, "NAME")` looks up."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and (name := dotted(node)):
            found.append(Use(name, False, path.name, node.lineno))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "optional_member":
            owner, member = node.args
            if isinstance(owner, ast.Attribute) and isinstance(member, ast.Constant) and (name := dotted(owner)):
                found.append(Use(f"{name}.{member.value!s}", True, path.name, node.lineno))
    return found


def dotted(node: ast.expr) -> str:
    """ "A.B" for trt.A.B, else empty."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == ALIAS else ""


def missing(use: Use, releases: dict[str, set[str]]) -> list[str]:
    """The releases that lack a name; for an optional one its class must be everywhere and it itself somewhere."""
    if use.optional:
        owner = use.name.rsplit(".", 1)[0]
        lacking = [version for version, names in releases.items() if owner not in names]
        return lacking or ([] if any(use.name in names for names in releases.values()) else list(releases))
    return [version for version, names in releases.items() if use.name not in names]

"""Bisection for layers that must stay higher, and what a user may ask for."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_edge.errors import InputError
from sage_edge.precision.plan import parse_request
from sage_edge.precision.search import lowest

LAYERS = [f"layer{i}" for i in range(16)]


@given(st.sets(st.sampled_from(LAYERS)))
def test_every_culprit_is_found_and_nothing_else(culprits: set[str]) -> None:
    judged = 0

    def passes(lowered: frozenset[str]) -> bool:
        nonlocal judged
        judged += 1
        return not lowered & culprits

    lowered, kept = lowest(LAYERS, passes)
    assert set(kept) == culprits
    assert lowered == set(LAYERS) - culprits
    for layer, failed in kept.items():
        assert failed & culprits == {layer}
    assert judged <= (len(culprits) + 1) * (2 + math.log2(len(LAYERS)))


@given(st.lists(st.integers(1, 10), min_size=1, max_size=12), st.integers(0, 40))
def test_a_budget_is_never_exceeded_and_the_cheap_go_first(errors: list[int], budget: int) -> None:
    """Layers that break the gate only together: the sum of their errors must stay within a budget."""
    sizes = {f"l{i}": e for i, e in enumerate(errors)}
    order = sorted(sizes, key=lambda name: sizes[name])

    def passes(names: frozenset[str]) -> bool:
        return sum(sizes[name] for name in names) <= budget

    lowered, kept = lowest(order, passes)
    assert passes(lowered)
    assert lowered | set(kept) == set(order)
    for layer in kept:
        assert not passes(lowered | {layer})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fp16", {"H": "fp16", "L": "fp16"}),
        ("mixed", {"H": "fp16", "L": "fp8"}),
        ("H: fp16, L: int8", {"H": "fp16", "L": "int8"}),
        ("H=fp16;L=fp8", {"H": "fp16", "L": "fp8"}),
        ("L: int8", {"H": "fp32", "L": "int8"}),
    ],
)
def test_what_may_be_asked_for(text: str, expected: dict[str, str]) -> None:
    request = parse_request(text)
    assert {module: request.of("any", module) for module in "HL"} == expected


@pytest.mark.parametrize("text", ["fp4", "H", "H: fp16, H: fp8", "H fp16", "", "H: fp16,", "L: bf16"])
def test_what_is_not_understood_is_explained(text: str) -> None:
    with pytest.raises(InputError, match="expected fp32, fp16, int8, fp8, mixed"):
        parse_request(text)


def test_a_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        "modules: {H: fp16, L: int8}\nlayers: {L_level.layers.0.mlp.down_proj: fp16}\nlimits: {points: 0.5}\n"
    )
    request = parse_request(str(path))
    assert request.of("L_level.layers.0.mlp.down_proj", "L") == "fp16"
    assert request.of("L_level.layers.0.mlp.gate_up_proj", "L") == "int8"
    assert request.plan.limits.points == 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modules: {H: fp4}\n", "line 1: 'modules.H': expected one of"),
        ("auto: true\nmodules: {H: fp16}\n", "auto: finds modules and layers by itself"),
        ("limits: {points: 0.5}\n", "expected a precision for at least one module"),
        ("modules: {H: fp16}\nlimits: {point: 1}\n", "did you mean 'points'"),
        ("modules: {H: fp16}\nlimits: {headroom: 0.5}\n", "headroom at least 1"),
    ],
)
def test_a_bad_plan_file_names_line_and_key(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        parse_request(str(path))
    assert message in str(error.value)

"""GPU recipes: the shipped ones are valid and chosen by precision; bad ones are explained."""

from __future__ import annotations

import pytest

from sage_edge.config import parse_yaml
from sage_edge.engines.gpu_recipe import (
    GpuRecipe,
    Profile,
    choose_recipe,
    is_gpu_recipe,
    recipe_folder,
    refuse_capability,
    shipped_recipes,
)
from sage_edge.errors import InputError


def test_the_shipped_recipes_say_what_their_names_say() -> None:
    recipes = shipped_recipes()
    assert {"orin-nano-fp16", "orin-nano-int8", "thor-fp8", "desktop-fp8"} <= set(recipes)
    for name, recipe in recipes.items():
        assert name in (f"{recipe.target}-{recipe.precision}", recipe.target)
        assert all(recipe.profile_of(shape) >= 0 for shape in recipe.shapes)
        assert recipe.shapes[-1] == recipe.slots
    for name in ("orin-nano-fp16", "orin-nano-int8"):  # 8 GB are shared with the robot's own programs
        wanted = recipes[name].tensorrt
        assert (wanted.workspace_mib or 0) + (wanted.tactic_dram_mib or 0) in range(512, 2049)
        assert recipes[name].capabilities == ("8.7",)
    assert not [path for path in recipe_folder().glob("cpu*.yaml") if is_gpu_recipe(path)]


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("orin-nano", "fp8", "there is fp16, int8; FP8 needs compute capability 8.9 or newer"),
        ("orin-nano", "fp32", "export the model again with --precision fp16"),
        ("orin", "fp16", "target 'orin' is not known; there is cpu, desktop, orin-nano"),
    ],
)
def test_a_target_that_has_no_recipe_for_a_bundle_says_what_there_is(target: str, precision: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_recipe(target, precision)


def test_the_recipe_follows_target_and_precision() -> None:
    assert choose_recipe("orin-nano", "int8").precision == "int8"
    assert choose_recipe("torch", "fp16").precision == "fp16"  # one recipe for bundles of any precision
    assert choose_recipe("desktop", "fp16").tensorrt.optimization_level == 4


@pytest.mark.parametrize(
    ("precision", "capability", "message"),
    [
        ("fp8", (8, 7), "Orin has compute capability 8.7; fp8 needs 8.9 or newer .Ada, Hopper, Blackwell, Thor.; export the "
                        "model again with one of: bf16, int8, fp16"),
        ("int8", (7, 0), "one of: fp16"),
        ("fp16", (6, 1), "one of: fp32"),
        ("fp8", (8, 9), None),
        ("fp8", (11, 0), None),
        ("fp32", (5, 0), None),
    ],
)  # fmt: skip
def test_a_precision_that_the_gpu_lacks_names_the_alternatives(
    precision: str, capability: tuple[int, int], message: str | None
) -> None:
    if message is None:
        refuse_capability(precision, capability, "Orin")
        return
    with pytest.raises(InputError, match=message):
        refuse_capability(precision, capability, "Orin")


def test_profiles_are_cut_and_stretched_with_the_slots() -> None:
    recipe = GpuRecipe("x", "tensorrt", "fp16", (Profile(1, 1, 1), Profile(2, 8, 8)))
    assert recipe.shapes == (1, 2, 4, 8)
    assert [recipe.profile_of(slots) for slots in (1, 2, 8)] == [0, 1, 1]
    assert recipe.with_slots(4).profiles == (Profile(1, 1, 1), Profile(2, 4, 4))
    assert recipe.with_slots(1).profiles == (Profile(1, 1, 1),)
    assert recipe.with_slots(12).shapes == (1, 2, 4, 8, 12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("profiles: []", "profiles: expected at least one"),
        ("profiles: [{min: 2, opt: 2, max: 4}]", "1 slots are in none of them"),
        ("profiles: [{min: 1, opt: 1, max: 1}, {min: 3, opt: 3, max: 3}]", "2 slots are in none of them"),
        ("profiles: [{min: 1, opt: 4, max: 2}]", "expected 1 <= min <= opt <= max"),
        (
            "profiles: [{min: 1, opt: 1, max: 1}]\ntensorrt: {optimization_level: 6}",
            "optimization_level: expected 0..5",
        ),
        ("profiles: [{min: 1, opt: 1, max: 1}]\ntensorrt: {workspace_mib: 0}", "workspace_mib: expected at least 1"),
        ("profiles: [{min: 1, opt: 1, max: 1}]\ncapabilities: ['87']", "expected texts like '8.7'"),
        ("profiles: [{min: 1, opt: 1, max: 1}]\nspeculate: maybe", "expected one of 'auto', 'always', 'never'"),
    ],
)
def test_a_bad_recipe_is_explained(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(f"target: x\nengine: tensorrt\nprecision: fp16\n{text}\n", GpuRecipe, "recipe.yaml")

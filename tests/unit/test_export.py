"""From checkpoint to engine: parity with the original code's outputs, portable graphs, both families, the cache."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from sage_edge.bundle import GRAPH_NAMES, load_bundle
from sage_edge.check import check, load_reference
from sage_edge.device import machine
from sage_edge.engines.build import BuildRecipe, build, open_bundle, open_engine
from sage_edge.engines.runner import Runner
from sage_edge.errors import InputError, IntegrityError
from tests.conftest import SHARED, TINY, tiny_hrm

pytest.importorskip("torch")

FIXTURE = SHARED / "fixtures" / "hrm_sapient_rope"
needs_fixture = pytest.mark.skipif(not FIXTURE.is_dir(), reason="../shared/fixtures/hrm_sapient_rope is not here")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the checkpoint that the original code wrote."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.checkpoint import open_model

    recipe, model = open_model(FIXTURE)
    path = tmp_path_factory.mktemp("original") / "bundle"
    export_bundle(model, recipe, path)
    return path


@needs_fixture
@pytest.mark.parametrize("form", ["bundle", "engine"])
def test_the_original_codes_outputs_come_out(form: str, original: Path) -> None:
    """Every step from the original's own carry: all of z_H, z_L, logits, q_halt, q_continue within 1e-4."""
    with np.load(FIXTURE / "reference_outputs.npz") as data:
        wanted = dict(data)
    runner: Runner = open_bundle(original) if form == "bundle" else open_engine(build(original, BuildRecipe()).path)
    with runner:
        start = runner.encode({name: wanted[name] for name in ("inputs", "puzzle_identifiers")})
        arrays = runner.read(start)
        for k in range(1, 7):
            state = runner.write(arrays)
            signals = runner.refine(state)
            got = {**runner.read(state), **runner.decode(state, ("logits",))}
            got |= {name: signals[:, runner.model.signal(name)] for name in ("q_halt", "q_continue")}
            for name in ("z_H", "z_L", "logits", "q_halt", "q_continue"):
                np.testing.assert_allclose(got[name], wanted[f"{name}_{k}"], atol=1e-4, rtol=0, err_msg=f"{name}_{k}")
            arrays = {**arrays, "z_H": wanted[f"z_H_{k}"], "z_L": wanted[f"z_L_{k}"]}


@needs_fixture
def test_run_all_steps_gives_the_original_codes_answers_running_free(original: Path, tmp_path: Path) -> None:
    from sage_edge.cli.main import main

    with np.load(FIXTURE / "reference_outputs.npz") as data:
        wanted = dict(data)
    np.savez(tmp_path / "in.npz", **{name: wanted[name] for name in ("inputs", "puzzle_identifiers")})
    arguments = ["run", str(original), "--inputs", str(tmp_path / "in.npz"), "--outputs", str(tmp_path / "out.npz")]
    assert main([*arguments, "--all-steps"]) == 0
    with np.load(tmp_path / "out.npz") as got:
        for k in range(1, 7):
            for name in ("logits", "q_halt", "q_continue"):
                np.testing.assert_allclose(got[f"{name}_{k}"], wanted[f"{name}_{k}"], atol=1e-4, rtol=0)


def test_graphs_are_portable_and_share_their_weights(tiny_bundle: Path) -> None:
    """Opset 19, standard operators, embedded weights, only the slots dynamic, each weight stored once."""
    for name in GRAPH_NAMES:
        model = onnx.load(tiny_bundle / f"{name}.onnx", load_external_data=False)
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 19)]
        assert not any(i.data_location == onnx.TensorProto.EXTERNAL for i in model.graph.initializer)
        for value in (*model.graph.input, *model.graph.output):
            first, *rest = value.type.tensor_type.shape.dim
            assert first.dim_param == "slots"
            assert all(d.dim_value > 0 for d in rest)
    graph = onnx.load(tiny_bundle / "refine.onnx").graph
    projections = [i for i in graph.initializer if "qkv_proj" in i.name]
    assert len(projections) == TINY.H_layers + TINY.L_layers  # though 12 layers are unrolled
    softmaxes = [n for n in graph.node if n.op_type == "Softmax"]
    attention_layers = TINY.H_cycles * (TINY.H_layers + TINY.L_cycles * TINY.L_layers)
    assert len(softmaxes) == attention_layers + 1  # and one for the entropy


VARIANTS = {
    "learned positions": {"pos_encodings": "learned"},
    "no puzzle embedding": {"puzzle_emb_ndim": 0},
    "puzzle embedding of one token": {"puzzle_emb_ndim": 32},
    "bidirectional": {"family": "hrm-bidirectional"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_reaches_an_engine(variant: str, tmp_path: Path) -> None:
    """The export's own gate compares with torch; the build's gate compares the fused engine again."""
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.recipe import Recipe

    config = dataclasses.replace(TINY, **VARIANTS[variant])  # type: ignore[arg-type]
    export_bundle(tiny_hrm(config), Recipe("variant", config, "0" * 64, "test"), tmp_path / "bundle")
    built = build(tmp_path / "bundle", BuildRecipe(), tmp_path / "engine")
    with open_engine(built.path) as runner:
        assert check(runner, load_reference(built.path / "reference.npz")).passed
    layers = config.H_cycles * (config.H_layers + config.L_cycles * config.L_layers)
    assert built.manifest.fused["attention"] == layers
    assert built.manifest.fused["skip_rms_norm"] == 2 * layers
    assert built.manifest.fused["rope"] == (2 * layers if config.pos_encodings == "rope" else 0)


def test_the_bidirectional_family_has_the_stated_size() -> None:
    """Hidden 256, 8 heads, 4 H layers, 3 L layers: about 7 M parameters (sequences of ARC's 900 tokens)."""
    config = dataclasses.replace(
        TINY, family="hrm-bidirectional", hidden_size=256, num_heads=8, H_layers=4, L_layers=3, seq_len=900,
        puzzle_emb_ndim=0, pos_encodings="learned", vocab_size=12,
    )  # fmt: skip
    model = tiny_hrm(config)
    assert 6e6 < sum(p.numel() for p in model.parameters()) < 7.5e6
    assert model.q_head.in_features == 512  # both states


def test_samples_become_the_reference(tmp_path: Path) -> None:
    from sage_edge.export.bundle import export_bundle
    from sage_edge.export.recipe import Recipe

    recipe = Recipe("tiny", TINY, "0" * 64, "test")
    samples = {"inputs": np.arange(18).reshape(3, 6) % TINY.vocab_size}
    export_bundle(tiny_hrm(), recipe, tmp_path / "bundle", samples)
    reference = load_reference(tmp_path / "bundle" / "reference.npz")
    np.testing.assert_array_equal(reference.observation["inputs"], samples["inputs"])
    with pytest.raises(InputError, match="samples: 'inputs'"):
        export_bundle(tiny_hrm(), recipe, tmp_path / "other", {"inputs": samples["inputs"][:, :2]})
    assert not (tmp_path / "other").exists()


def test_the_cache_key_knows_content_recipe_and_device(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_edge.engines import build as module

    first = build(tiny_bundle, BuildRecipe(slots=3))
    again = build(tiny_bundle, BuildRecipe(slots=3))
    assert (first.cached, again.cached, first.path) == (False, True, again.path)
    assert build(tiny_bundle, BuildRecipe(slots=5)).path != first.path
    here = machine()
    monkeypatch.setattr(module, "machine", lambda: dataclasses.replace(here, cpu="abacus"))
    elsewhere = build(tiny_bundle, BuildRecipe(slots=3))
    assert elsewhere.path != first.path
    assert elsewhere.manifest.device != first.manifest.device


def test_a_damaged_engine_in_the_cache_is_made_anew(tiny_bundle: Path) -> None:
    built = build(tiny_bundle, BuildRecipe(slots=6))
    (built.path / "decode.onnx").write_bytes(b"")
    with pytest.raises(IntegrityError, match="decode.onnx: changed"):
        open_engine(built.path)
    again = build(tiny_bundle, BuildRecipe(slots=6))
    assert not again.cached
    with open_engine(again.path) as runner:
        assert check(runner, load_reference(again.path / "reference.npz")).passed


@pytest.mark.parametrize("name", ["encode.onnx", "refine.onnx", "decode.onnx", "reference.npz"])
def test_a_changed_or_missing_file_of_a_bundle_is_refused(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{name}: changed since bundle.yaml was written"):
        load_bundle(folder)
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name}: missing"):
        load_bundle(folder)


def test_files_outside_the_folder_cannot_be_listed(tiny_bundle: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    text = (folder / "bundle.yaml").read_text()
    (folder / "bundle.yaml").write_text(text.replace("files:\n", "files:\n  ../secret: '0'\n"))
    with pytest.raises(IntegrityError, match="must be a plain file name"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: signals", "name: signal", "graphs.refine: the outputs must be the new carry and, last, `signals`"),
        ("- q_continue\n", "", "`signals` must have 5 columns"),
        ("name: prediction", "name: guess", "no output is called `prediction`"),
        ("max_steps: 4", "max_steps: 0", "max_steps: expected at least 1"),
        ("max_steps: 4", "max_steps: four", "'max_steps': expected a whole number, found 'four'"),
        ("sage-edge-bundle/1", "sage-edge-bundle/9", "expected one of 'sage-edge-bundle/1'"),
    ],
)
def test_a_bundle_whose_parts_do_not_fit_is_refused(
    old: str, new: str, message: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    text = (tiny_bundle / "bundle.yaml").read_text()
    assert old in text
    (tmp_path / "bundle.yaml").write_text(text.replace(old, new))
    with pytest.raises(InputError) as error:
        load_bundle(tmp_path)
    assert message in str(error.value)
    assert "bundle.yaml, line" in str(error.value)


def test_exporting_without_torch_names_the_extra(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sage_edge.errors import MissingDependencyError
    from sage_edge.models import bundle_of

    for name in [n for n in sys.modules if n.startswith("sage_edge.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'sage-edge\[export\]'"):
        bundle_of(tiny_model_folder)

"""The language plugin's model and training in torch, on sentences written here."""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")

import torch

from plugins_irp.language import train as training
from plugins_irp.language.data import load_texts
from plugins_irp.language.facts import MODEL, WEIGHTS, LanguageConfig, ModelFile
from plugins_irp.language.graphs import SIGNALS, graph_model, load_model, save_model
from plugins_irp.language.lessons import Stream, write_lessons, write_words
from plugins_irp.language.model import LanguageModel, WordTable, letter_grams
from plugins_irp.language.tokens import TOKENIZER, Tokens, train_tokenizer
from sage_edge.config import dump_yaml
from sage_edge.engines.build import BuildRecipe, build, open_engine
from sage_edge.errors import InputError, IntegrityError
from sage_edge.export.bundle import reference_run, write_bundle
from sage_edge.export.training import Muon, orthogonal
from tests.unit.test_language_text import write_clinc

TINY = LanguageConfig(40, 5, seq_len=12, embedding=8, hidden_size=16, num_heads=2, max_steps=3)


def tiny_model() -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = LanguageModel(TINY).eval()
        torch.nn.init.normal_(model.q_head.weight, std=0.3)
    return model.requires_grad_(False)


def observation(count: int) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(0).integers(3, TINY.vocab_size, (count, TINY.seq_len)).astype(np.int32)
    for row in range(count):
        rows[row, 4 + row :] = 0
    return {"tokens": rows}


def model_file() -> ModelFile:
    return ModelFile("tiny", TINY, tuple("abcde"), "0" * 64, "test")


def test_padding_changes_nothing() -> None:
    """The same words in a shorter tensor, as in training, have the same meaning."""
    model, tokens = tiny_model(), torch.from_numpy(observation(1)["tokens"])

    def meaning(part: torch.Tensor) -> torch.Tensor:
        context, attend, state, words = model.encode(part)
        for _ in range(TINY.max_steps):
            state, words = model.step(context, attend, state, words)
        return state

    torch.testing.assert_close(meaning(tokens), meaning(tokens[:, :4]), rtol=0, atol=1e-5)


def test_shapes_are_those_of_the_specs() -> None:
    exported = graph_model(tiny_model(), model_file())
    reference = reference_run(exported, observation(3))
    spec = exported.spec
    assert spec.signals == SIGNALS
    assert [s.name for s in spec.context] == ["context", "attend"]
    for tensor in (*spec.context, *spec.carry):
        assert reference.start[tensor.name].shape == (3, *tensor.item_shape)
    for tensor in spec.prediction:
        found = reference.outputs[-1][tensor.name]
        assert (found.shape, found.dtype) == ((3, *tensor.item_shape), np.dtype(tensor.dtype))


def test_the_bundle_is_the_model_and_builds(tmp_path: Path) -> None:
    """write_bundle gates the graphs against torch; the build gates the fused ones again."""
    write_bundle(graph_model(tiny_model(), model_file()), tmp_path / "bundle", observation(4))
    built = build(tmp_path / "bundle", BuildRecipe(slots=2), tmp_path / "engine")
    with open_engine(built.path) as runner:
        state = runner.encode(observation(2))
        signals = runner.refine(state).copy()
        assert signals.shape == (2, len(SIGNALS))
        outputs = runner.decode(state, ("prediction", "filled"))
    assert outputs["prediction"].shape == (2, 1)
    assert outputs["filled"].shape == (2, TINY.seq_len)


def test_a_model_is_stored_as_it_is_used(tmp_path: Path) -> None:
    model = tiny_model()
    file = save_model(tmp_path, model, tuple("abcde"), "test")
    again, read = load_model(tmp_path)
    assert read == file
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, tensor.half().float())
    wider = dataclasses.replace(file, config=dataclasses.replace(TINY, hidden_size=32))
    (tmp_path / MODEL).write_text(dump_yaml(wider))
    with pytest.raises(InputError, match=f"does not fit {MODEL}: .*; size mismatch for "):
        load_model(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match=MODEL):
        load_model(tmp_path)


def test_sizes_that_are_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads"):
        dataclasses.replace(TINY, num_heads=3)
    with pytest.raises(ValueError, match="layers"):
        dataclasses.replace(TINY, layers=0)
    with pytest.raises(ValueError, match="4 names for 5 intents"):
        ModelFile("tiny", TINY, tuple("abcd"), "0" * 64, "test")


def test_words_written_alike_share_n_grams() -> None:
    assert letter_grams("<mask>") == letter_grams("<0x41>") == []
    table = WordTable(["<pad>", "▁translate", "▁translation", "▁zoo"], 4)
    with torch.no_grad():
        table.own.zero_()
        table.grams.fill_(1.0)
    folded = table.folded()
    assert folded[0].tolist() == folded[3].tolist() == [0.0] * 4  # no n-gram that another token has as well
    assert folded[1].tolist() == folded[2].tolist() == [1.0] * 4


def test_a_table_begins_with_what_is_known_of_words() -> None:
    known = torch.tensor([[0.0, 0, 0], [2, 0, 1], [2, 0, 1.1], [-4, 0, 1], [0, 5, 1]])
    table = WordTable(["<pad>", "▁car", "▁cars", "▁zoo", "▁yes"], 2)
    before = table.own.detach().clone()
    table.begin_with(known)
    own = table.own.detach()
    assert torch.equal(own[0], before[0])
    torch.testing.assert_close(own[1:].norm(dim=1), torch.ones(4))
    assert float(own[1] @ own[2]) > 0.99
    assert float(own[1] @ own[3]) < 0
    wide = WordTable(["<pad>", "▁car", "▁cars", "▁zoo", "▁yes"], 8)
    wide.begin_with(known)  # fewer components than the table is wide: the others stay random
    assert bool(torch.isfinite(wide.own).all())


def test_orthogonal_brings_singular_values_near_one() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for shape in ((12, 30), (30, 12)):
            values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
            assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_muon_descends() -> None:
    weight = torch.nn.Parameter(torch.eye(4) * 3)
    optimizer = Muon([weight], lr=0.4, weight_decay=0.0)
    before = float(weight.detach().square().sum())
    for _ in range(20):
        optimizer.zero_grad()
        torch.autograd.backward(weight.square().sum())
        optimizer.step()
    assert float(weight.detach().square().sum()) < 0.5 * before


def arguments(tmp_path: Path, run: str) -> list[str]:
    return [
        "--data", str(tmp_path), "--lessons", str(tmp_path / "lessons"), "--run", str(tmp_path / run), "--steps", "4",
        "--batch", "4", "--hidden", "16", "--heads", "2", "--embedding", "8", "--max-steps", "2", "--device", "cpu",
        "--eval-every", "2", "--log-every", "1",
    ]  # fmt: skip


def prepare(tmp_path: Path) -> None:
    """Texts, and lessons of them by a teacher that thinks nothing."""
    write_clinc(tmp_path)
    lessons = tmp_path / "lessons"
    lessons.mkdir()
    texts = load_texts(tmp_path)
    train_tokenizer((text for text, _ in texts.train), 380, lessons / TOKENIZER)
    stream = Stream(texts, Tokens(lessons / TOKENIZER), 4, np.random.default_rng(0))
    write_words(lessons, np.zeros((stream.tokens.size, 3), np.float32))
    even = np.full((4, len(texts.intents)), 1 / len(texts.intents), np.float32)
    write_lessons(lessons / "lessons-0.npz", stream, lambda tokens: even, LanguageConfig.seq_len)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    prepare(tmp_path)
    for run in ("whole", "halved"):
        (tmp_path / run).mkdir()
    whole = training.Trainer(training.parser().parse_args(arguments(tmp_path, "whole")))
    for _ in range(4):
        whole.train_step()
    options = training.parser().parse_args(arguments(tmp_path, "halved"))
    first = training.Trainer(options)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "state.pt")
    second = training.Trainer(options)
    second.load(tmp_path / "state.pt")
    for _ in range(2):
        second.train_step()
    for name, tensor in whole.averaged().state_dict().items():
        assert torch.equal(tensor, second.averaged().state_dict()[name]), name


def test_training_writes_model_log_and_curve(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prepare(tmp_path)
    training.main(arguments(tmp_path, "run"))
    run = tmp_path / "run"
    with (run / "log.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    assert [bool(row["val_20"]) for row in rows] == [False, True, False, True]
    assert (run / "learning-curve.png").read_bytes().startswith(b"\x89PNG")
    model, file = load_model(run / "model")
    assert file.config.intents == len(file.intents) == 12
    assert sum(p.numel() for p in model.parameters()) > 0
    (run / "log.csv").write_text((run / "log.csv").read_text() + "5,9,9,9,9,9,9,,\n")
    training.main(arguments(tmp_path, "run"))  # nothing is left to do; what was logged after the state goes
    assert "5,9,9" not in (run / "log.csv").read_text()


def test_training_without_data_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises((InputError, SystemExit), match="missing; make it of CLINC150"):
        training.main(arguments(tmp_path, "run"))


def test_two_processes_share_a_training(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    prepare(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--",
               "plugins_irp.language.train", *arguments(tmp_path, "run")]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "run/log.csv").open(newline="") as handle:
        assert [int(row["step"]) for row in csv.DictReader(handle)] == [1, 2, 3, 4]
    load_model(tmp_path / "run/model")

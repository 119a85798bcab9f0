"""The language plugin as it is shipped: text in, intent and filled words out, through the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from plugins_irp.language.data import data_folder, labelled, load_texts
from plugins_irp.language.facts import MODEL, SENTENCES, WEIGHTS, WRITTEN, ModelFile
from plugins_irp.language.measure import DAMAGES, accuracy, damaged, halting, run_texts, scope
from plugins_irp.language.plugin import FOLDER, Language
from plugins_irp.language.tokens import MASK, TOKENIZER
from sage_edge.bundle import load_bundle
from sage_edge.cli.main import main
from sage_edge.config import load_yaml
from sage_edge.errors import InputError
from sage_edge.files import sha256
from sage_edge.irp.conformance import check_plugin
from sage_edge.irp.registry import find_plugins
from sage_edge.irp.spec import load_spec

OWN = labelled(FOLDER / SENTENCES)
IN_SCOPE = [(text, intent) for text, intent in OWN if intent != "oos"]
needs_data = pytest.mark.skipif(
    not data_folder().is_dir(), reason=f"CLINC150 is not at {data_folder()} ($SAGE_EDGE_DATA/language)"
)


@pytest.fixture(scope="module")
def plugin() -> Iterator[Language]:
    spec = load_spec(FOLDER)
    with Language(spec, **spec.options) as opened:
        yield opened


def answer(plugin: Language, text: str, steps: int | None = None) -> dict[str, Any]:
    state = plugin.init_state({"text": text})
    for index in range(steps or plugin.max_steps):
        state = plugin.step(state, index)
    result = plugin.result(state)
    plugin.release(state)
    return result


def right(plugin: Language, pairs: Sequence[tuple[str, str]]) -> float:
    return float(np.mean([answer(plugin, text)["intent"] == intent for text, intent in pairs]))


def test_the_shipped_files_belong_together_and_are_small() -> None:
    file = load_yaml(FOLDER / MODEL, ModelFile)
    bundle = load_bundle(FOLDER / "bundle")
    assert file.weights_sha256 == sha256(FOLDER / WEIGHTS) == bundle.provenance.checkpoint_sha256
    assert bundle.model.max_steps == file.config.max_steps == load_spec(FOLDER).max_steps
    assert bundle.parameters <= 4_000_000
    loaded = [FOLDER / TOKENIZER, *(FOLDER / "bundle").glob("*.onnx")]
    assert sum(path.stat().st_size for path in loaded) <= 8_000_000
    assert (FOLDER / WEIGHTS).stat().st_size <= 8_000_000
    assert {intent for _, intent in IN_SCOPE} <= set(file.intents)


def test_the_bundle_passes_its_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(FOLDER / "bundle")]) == 0
    assert "FAILED" not in capsys.readouterr().out


def test_the_plugin_is_found_and_keeps_the_protocol(plugin: Language) -> None:
    assert "language" in [found.name for found in find_plugins() if not found.error]
    assert [(f.name, f.detail) for f in check_plugin(plugin) if not f.passed] == []


def test_sentences_of_our_own_are_understood(plugin: Language) -> None:
    """A floor below what it reaches: what is caught here is a broken model, not a weak one."""
    assert right(plugin, IN_SCOPE) >= 0.8


def test_the_first_step_is_already_an_answer_and_later_ones_move_less(plugin: Language) -> None:
    state = plugin.init_state({"text": "set a timer for nine minutes"})
    energies = []
    for index in range(plugin.max_steps):
        state = plugin.step(state, index)
        energies.append(plugin.energy(state))
        assert plugin.result(state)["intent"] == "timer"
    plugin.release(state)
    assert energies[-1] < energies[0]
    assert min(energies) >= 0


def test_a_missing_word_is_filled_and_the_others_stay(plugin: Language) -> None:
    said = "what is the <mask> forecast in paris today"
    found = answer(plugin, said)
    words = found["text"].split()
    assert found["intent"] == "weather"
    assert words[3] == "weather"
    assert [w for i, w in enumerate(words) if i != 3] == [w for w in said.split() if w != MASK]


@pytest.mark.parametrize(
    "text",
    ["supercalifragilistic antidisestablishmentarianism", "foo<mask>bar <mask>", "🙂 何 naïve", "<pad> <empty> x"],
)
def test_strange_words_keep_their_places(plugin: Language, text: str) -> None:
    """Without repairs what is put out has the words of what came in, masks aside: nothing shifts behind many pieces."""
    with Language(plugin.spec, repair=2.0) as strict:
        found = answer(strict, text)["text"].split()
    given = plugin.tokens.normalise(text).split()
    assert len(found) == len(given)
    assert all(a == b for a, b in zip(found, given, strict=True) if b != MASK)


def test_mistyped_words_are_repaired_and_only_when_asked(plugin: Language) -> None:
    said = "plese set an alrm for five"
    assert answer(plugin, said)["text"] == "please set an alarm for five"
    with Language(plugin.spec, repair=2.0) as strict:
        assert answer(strict, said)["text"] == said


def test_out_of_scope_is_less_probable(plugin: Language) -> None:
    inside = [answer(plugin, text)["probability"] for text, _ in IN_SCOPE]
    outside = [answer(plugin, text)["probability"] for text, intent in OWN if intent == "oos"]
    assert np.mean(outside) < np.mean(inside) - 0.2
    assert any(not answer(plugin, text)["in_scope"] for text, intent in OWN if intent == "oos")


@pytest.mark.parametrize("wrong", [{}, {"text": ""}, {"text": " ?! "}, {"text": 5}, {"text": "go " * 65}])
def test_bad_commands_are_refused(plugin: Language, wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="`text`"):
        plugin.init_state(wrong)


def test_examples_without_data_say_what_is_missing(
    plugin: Language, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAGE_EDGE_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"clinc150_train_val\.json\.gz: missing"):
        plugin.examples("calibration")


class Clean:
    """Is right wherever no word is masked."""

    def right(self, texts: Sequence[str], intents: Sequence[str]) -> np.ndarray:
        return np.array([MASK not in text for text in texts])


def test_what_damage_costs_is_counted_against_the_same_sentences(plugin: Language) -> None:
    pairs = [pair for pair in IN_SCOPE if MASK not in pair[0]]
    rows = {row["damage"]: row for row in accuracy(plugin, pairs, {"clean": Clean()}, "full", draws=2)}
    assert list(rows) == list(DAMAGES)
    assert [row["draws"] for row in rows.values()] == [1] + [2] * (len(rows) - 1)
    assert rows["none"]["clean"] == {"right": 100.0, "error": 0.0, "lost": 0.0, "lost_error": 0.0}
    whole = [damaged(pairs, DAMAGES["20 % masked"], draw)[0] for draw in range(2)]
    assert whole[0] != whole[1]
    masked = 100 * np.mean([MASK in text for texts in whole for text in texts])
    assert rows["20 % masked"]["clean"]["lost"] == pytest.approx(masked)
    assert rows["20 % mistyped"]["clean"]["lost"] == 0
    for row in rows.values():
        assert row["full"]["lost"] == pytest.approx(rows["none"]["full"]["right"] - row["full"]["right"])
        assert row["full"] == row["halted"]  # `full` never halts before the last step
        assert row["per_step"][-1] == pytest.approx(row["full"]["right"])


@needs_data
def test_no_written_sentence_is_held_out() -> None:
    texts, written = load_texts(data_folder()), labelled(FOLDER / WRITTEN)
    assert len(texts.also(FOLDER / WRITTEN).train) == len(texts.train) + len(written)


@needs_data
def test_accuracy_on_what_it_never_saw(plugin: Language) -> None:
    """Floors below the model card's numbers, on a part of the report half; standard error about 1.7 points."""
    pairs = load_texts(data_folder()).first(300).report
    for damage, floor in (("none", 0.87), ("20 % masked", 0.77)):
        texts, intents = damaged(pairs, DAMAGES[damage])
        assert run_texts(plugin, texts).right(plugin, intents)[:, -1].mean() >= floor


@needs_data
def test_halting_is_certified_and_saves_half_of_the_steps(plugin: Language) -> None:
    calibration, rows = halting(plugin, load_texts(data_folder()))
    assert calibration.chosen.bound <= 0.01
    assert rows[0]["saved"] >= 50
    assert rows[0]["lost"] <= 2  # the promise is 1 point, in expectation


@needs_data
def test_out_of_scope_commands_are_told_apart(plugin: Language) -> None:
    found = scope(plugin, load_texts(data_folder()).first(100), "full")
    assert found["auroc_report"] > 0.8

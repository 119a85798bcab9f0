"""The language plugin's text side: tokenizer, damage, data; no torch."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers")

from plugins_irp.language.corrupt import IGNORE, Rates, Vocabulary, damage, mask_a_share, mask_words, typo
from plugins_irp.language.data import CLINC, RATES, halves, labelled, load_texts
from plugins_irp.language.facts import MODEL, SENTENCES, WRITTEN, ModelFile
from plugins_irp.language.plugin import FOLDER
from plugins_irp.language.tokens import MASK, TOKENIZER, WORD, Tokens, train_tokenizer
from sage_edge.config import load_yaml
from sage_edge.errors import InputError

OWN = [text for text, _ in labelled(FOLDER / SENTENCES)]


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(FOLDER / TOKENIZER)


@pytest.fixture(scope="module")
def vocabulary(tokens: Tokens) -> Vocabulary:
    return Vocabulary(tokens.mask, tokens.empty, tokens.pieces)


def test_the_special_tokens_and_all_bytes_are_there(tokens: Tokens) -> None:
    assert tokens.names[:3] == ["<pad>", "<mask>", "<empty>"]
    assert {f"<0x{value:02X}>" for value in range(256)} <= set(tokens.names)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_every_text_comes_back_as_it_was_normalised(text: str, tokens: Tokens) -> None:
    plain = tokens.normalise(text)
    assume("<" not in plain and WORD not in plain)  # special tokens, and the sign of a word's begin, are not text
    assert tokens.decode(tokens.encode(text)) == plain


def test_what_training_never_saw_becomes_its_bytes(tokens: Tokens) -> None:
    ids = tokens.encode("🙂")
    assert [tokens.names[i] for i in ids][-4:] == [f"<0x{byte:02X}>" for byte in "🙂".encode()]
    assert tokens.decode(ids) == "🙂"


def test_case_punctuation_and_spaces_say_nothing(tokens: Tokens) -> None:
    assert tokens.encode("  Turn  OFF the “lights”, please! ") == tokens.encode("turn off the “lights” please")
    assert tokens.normalise("What's the weather, in 'Oslo'?") == "what's the weather in oslo"


def test_word_by_word_is_what_the_tokenizer_file_says(tokens: Tokens) -> None:
    """Another reader of tokenizer.json must get the same tokens."""
    for text in OWN:
        assert tokens.encode(text) == list(tokens.tokenizer.encode(text).ids)


def test_a_mask_is_one_token_only_where_it_is_a_word(tokens: Tokens) -> None:
    assert tokens.encode("set <mask> alarm").count(tokens.mask) == 1
    assert tokens.encode("set <mask>, alarm").count(tokens.mask) == 1
    assert tokens.mask not in tokens.encode("foo<mask>bar")


def test_batches_are_padded_and_cut(tokens: Tokens) -> None:
    out = tokens.batch([[5, 6], list(range(10, 20))], 4)
    assert out.dtype == np.int32
    assert out.tolist() == [[5, 6, 0, 0], [10, 11, 12, 13]]


def test_training_a_tokenizer_twice_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        train_tokenizer(OWN, 400, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    small = Tokens(tmp_path / "a.json")
    assert small.size <= 400
    assert small.decode(small.encode("zebra façade")) == "zebra façade"


def test_a_file_that_is_no_tokenizer_of_ours_is_refused(tmp_path: Path, tokens: Tokens) -> None:
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken\.json: not a tokenizer file"):
        Tokens(tmp_path / "broken.json")
    foreign = (FOLDER / TOKENIZER).read_text(encoding="utf-8").replace("<mask>", "[MASK]")
    (tmp_path / "foreign.json").write_text(foreign, encoding="utf-8")
    with pytest.raises(InputError, match="expected <pad>, <mask>, <empty> as ids 0, 1, 2"):
        Tokens(tmp_path / "foreign.json")


def test_damage_is_seeded(vocabulary: Vocabulary) -> None:
    rates = Rates(mask=0.3, drop=0.1, typo=0.2, cut=0.2)

    def run(seed: int) -> list[tuple[list[int], list[int]]]:
        rng = np.random.default_rng(seed)
        return [damage(text.split(), rates, vocabulary, rng) for text in OWN]

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_no_damage_leaves_every_token_its_own_target(vocabulary: Vocabulary, tokens: Tokens) -> None:
    for text in OWN:
        found, wanted = damage(text.split(), Rates(), vocabulary, np.random.default_rng(0))
        assert found == wanted == tokens.encode(text)


def test_masked_words_want_themselves_back(vocabulary: Vocabulary, tokens: Tokens) -> None:
    words = ["set", "a", "timer", "for", "ten", "minutes", "supercalifragilistic"]
    found, wanted = damage(words, Rates(mask=1.0), vocabulary, np.random.default_rng(0))
    kept = [i for i, token in enumerate(found) if token != tokens.mask]
    assert len(kept) >= 1  # something is always left to understand
    assert len({*range(len(found))} - {*kept}) == len(words) - 1
    for token, target in zip(found, wanted, strict=True):
        if token == tokens.mask:
            assert target == IGNORE or tokens.names[target].removeprefix(WORD) in words


def test_pieces_of_a_mistyped_word_want_the_word_and_nothing(vocabulary: Vocabulary, tokens: Tokens) -> None:
    rng = np.random.default_rng(1)
    (timer,) = tokens.pieces("timer", True)
    seen = set()
    for _ in range(20):
        found, wanted = damage(["timer", "timer"], Rates(typo=1.0), vocabulary, rng)
        assert wanted.count(timer) == 2
        assert set(wanted) <= {timer, tokens.empty}
        seen.add(tuple(found))
    assert len(seen) > 10


def test_dropped_words_leave_no_place(vocabulary: Vocabulary) -> None:
    found, wanted = damage(["wake", "me", "up", "at", "six"], Rates(drop=1.0), vocabulary, np.random.default_rng(2))
    assert found == wanted
    assert len(found) == 1


@given(word=st.text(alphabet="abcdefgh", min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_a_typo_changes_one_place_and_never_empties_a_word(word: str, seed: int) -> None:
    out = typo(word, np.random.default_rng(seed))
    assert out
    begin = shared(out, word)
    end = shared(out[begin:][::-1], word[begin:][::-1])
    assert max(len(out), len(word)) - begin - end <= 2  # two letters swapped, or one gone, come or changed


def shared(a: str, b: str) -> int:
    """How many letters two strings begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_masking_for_evaluation_is_seeded_and_keeps_places() -> None:
    text = " ".join(["word"] * 1000)
    one = mask_words(text, 0.2, MASK, np.random.default_rng(5))
    assert one == mask_words(text, 0.2, MASK, np.random.default_rng(5))
    assert len(one.split()) == 1000
    assert 150 < one.split().count(MASK) < 250
    assert mask_words(text, 0.0, MASK, np.random.default_rng(5)) == text


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_a_share_of_the_words_is_masked_whatever_the_length(words: int, rate: float, seed: int) -> None:
    text = " ".join(f"w{at}" for at in range(words))
    masked = mask_a_share(text, rate, MASK, np.random.default_rng(seed)).split()
    assert abs(masked.count(MASK) - rate * words) <= 1
    assert all(b in (a, MASK) for a, b in zip(text.split(), masked, strict=True))


def test_shares_are_right_in_the_mean() -> None:
    rng = np.random.default_rng(0)
    counts = [mask_a_share("turn on the lights please now ok", 0.2, MASK, rng).split().count(MASK) for _ in range(2000)]
    assert set(counts) == {1, 2}
    assert np.mean(counts) == pytest.approx(1.4, abs=0.05)


def test_halves_share_nothing_and_are_even() -> None:
    pairs = [(f"{intent} {i}", intent) for intent in ("a", "b") for i in range(6)]
    first, second = halves(pairs)
    assert sorted((*first, *second)) == sorted(pairs)
    assert [sum(i == name for _, i in first) for name in "ab"] == [3, 3]
    assert halves(pairs) == (first, second)


def write_clinc(folder: Path, **changes: object) -> Path:
    """A data file of sentences written here, in the form of CLINC150."""
    train = [[text, intent] for text, intent in labelled(FOLDER / SENTENCES)[:12]]
    val = [[text, intent] for said, intent in train for text in (said, f"please {said}")]
    raw = {"train": train, "val": val, "oos_train": [["a bolt", "oos"]], "oos_val": [["a nut", "oos"]], **changes}
    with gzip.open(folder / CLINC, "wt", encoding="utf-8") as handle:
        json.dump(raw, handle)
    return folder


def write_labelled(folder: Path, *rows: tuple[str, ...]) -> Path:
    path = folder / "more.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("text", "intent"), *rows])
    return path


def test_more_sentences_are_trained_on_unless_they_are_held_out(tmp_path: Path) -> None:
    texts = load_texts(write_clinc(tmp_path))
    intent, held_out = texts.intents[0], texts.report[0][0]
    own = ("a sentence of its own", intent)
    more = write_labelled(tmp_path, own, (f"  {held_out.upper()}! ", intent), ("A  nut", intent))
    found = load_texts(tmp_path, [more])
    assert found.train == (*texts.train, own)
    assert (found.calibration, found.report, found.intents) == (texts.calibration, texts.report, texts.intents)
    with pytest.raises(InputError, match="more.csv: 'nonsense': expected one of the"):
        texts.also(write_labelled(tmp_path, ("a sentence of its own", "nonsense")))
    for bad in (("a sentence",), ("", intent)):
        with pytest.raises(InputError, match="more.csv: row 2: expected a text and an intent"):
            texts.also(write_labelled(tmp_path, own, bad))
    (tmp_path / "more.csv").write_bytes(b"text,intent\n\xff,b\n")
    with pytest.raises(InputError, match="more.csv: expected a CSV file"):
        texts.also(tmp_path / "more.csv")


def test_the_written_sentences_are_clean() -> None:
    rows = labelled(FOLDER / WRITTEN)
    texts, intents = [text for text, _ in rows], [intent for _, intent in rows]
    assert set(intents) == set(load_yaml(FOLDER / MODEL, ModelFile).intents)
    assert min(intents.count(intent) for intent in set(intents)) > 200
    assert len(set(texts)) == len(texts)
    assert not set(texts) & set(OWN)
    assert all(text == " ".join(text.lower().split()) for text in texts)


def test_data_files_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing; make it of CLINC150"):
        load_texts(tmp_path)
    texts = load_texts(write_clinc(tmp_path))
    assert (len(texts.train), len(texts.calibration), len(texts.report)) == (12, 12, 12)
    examples = texts.examples("report", 3)
    assert len(examples) == 3
    assert set(examples.groups["masked"]) <= {100 * rate for rate in RATES}
    with pytest.raises(InputError, match="expected calibration or report"):
        texts.examples("test")
    with pytest.raises(InputError, match="at least two of an intent"):
        load_texts(write_clinc(tmp_path, val=[["hello there", "greeting"]]))
    for bad in ([], [["only text"]], [["", "intent"]], "no list"):
        with pytest.raises(InputError, match="'val': expected a list of"):
            load_texts(write_clinc(tmp_path, val=bad))
    (tmp_path / CLINC).write_bytes(b"no gzip")
    with pytest.raises(InputError, match="expected gzipped JSON"):
        load_texts(tmp_path)

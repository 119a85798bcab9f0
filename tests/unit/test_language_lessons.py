"""What the language plugin learns from: damaged sentences, lessons, and the pretrained teacher that writes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from plugins_irp.language.corrupt import IGNORE
from plugins_irp.language.data import Texts, load_texts
from plugins_irp.language.lessons import (
    Check,
    Ints,
    Lessons,
    Shares,
    Stream,
    checks,
    read_words,
    write_lessons,
    write_words,
)
from plugins_irp.language.plugin import FOLDER
from plugins_irp.language.tokens import TOKENIZER, Tokens
from sage_edge.arrays import read_npz, write_npz
from sage_edge.errors import InputError
from tests.unit.test_language_text import write_clinc

LIMIT = 24


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    write_clinc(tmp_path)
    return load_texts(tmp_path)


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    return Tokens(FOLDER / TOKENIZER)


def counted(tokens: Ints) -> Shares:
    """An opinion that can be told from the tokens: how many there are, as a share of LIMIT, and the rest."""
    share = (tokens != 0).sum(1) / LIMIT
    return np.stack((share, 1 - share), 1).astype(np.float32)


def lessons_of(folder: Path, texts: Texts, tokens: Tokens, passes: int = 2) -> None:
    for part in range(passes):
        stream = Stream(texts, tokens, 4, np.random.default_rng(part))
        write_lessons(folder / f"lessons-{part}.npz", stream, counted, LIMIT)


def test_a_damaged_sentence_keeps_its_intent_and_its_places(texts: Texts, tokens: Tokens) -> None:
    stream = Stream(texts, tokens, 6, np.random.default_rng(0))
    vocabularies = [{word for text, own in texts.train if own == intent for word in tokens.normalise(text).split()}
                    for intent in texts.intents]  # fmt: skip
    damaged = 0
    for _ in range(20):
        found, wanted, intents = stream.draw(LIMIT)
        assert found.shape == wanted.shape
        assert found.shape[1] <= LIMIT
        assert ((wanted == IGNORE) | (wanted >= 0)).all()
        assert (wanted[found == 0] == IGNORE).all()
        damaged += int((found == tokens.mask).sum())
        for row, intent in zip(wanted, intents, strict=True):
            words = tokens.decode([i for i in row.tolist() if i != IGNORE]).split()
            whole = [word for word in words if len(tokens.encode(word)) == 1]
            assert len(vocabularies[intent].intersection(whole)) >= 0.5 * len(set(whole))
    assert damaged > 20


def test_lessons_are_what_the_teacher_said_of_each_sentence(tmp_path: Path, texts: Texts, tokens: Tokens) -> None:
    lessons_of(tmp_path, texts, tokens)
    lessons = Lessons(tmp_path, 5, 2, np.random.default_rng(3))
    assert len(lessons.tokens) == 2 * (len(texts.train) // 4 * 4)
    seen = []
    for _ in range(len(lessons.tokens) // 5):
        found, wanted, intents, shares = lessons.draw()
        assert [str(a.dtype) for a in (found, wanted, intents, shares)] == ["int32", "int32", "int32", "float32"]
        np.testing.assert_allclose(shares, counted(found), atol=1e-3)  # float16 in the files
        assert (found[:, -1] != 0).any(), "no longer than the longest"
        seen += [(*row.tolist(), *target.tolist()) for row, target in zip(found, wanted, strict=True)]
    assert len(seen) == len(lessons.tokens) // 5 * 5
    assert not lessons.queue, "an epoch takes each lesson once"


@pytest.fixture
def more(texts: Texts) -> Texts:
    """With four sentences of each intent that are not the data's own."""
    added = tuple((f"written anew for {intent} number {i}", intent) for i in range(4) for intent in texts.intents)
    return replace(texts, train=texts.train + added, added=len(added))


def test_a_training_ends_on_the_data_s_own_sentences(more: Texts, tokens: Tokens) -> None:
    stream = Stream(more, tokens, 4, np.random.default_rng(0))
    own = range(len(more.train) - more.added)
    drawn = []
    for step in range(100):
        stream.before(step, 100, 0.3)
        drawn.append(stream.rows())
    assert any(row not in own for rows in drawn[:70] for row in rows)
    assert all(row in own for rows in drawn[70:] for row in rows)
    assert {row for rows in drawn[70:] for row in rows} == set(own), "all of them"
    resumed = Stream(more, tokens, 4, np.random.default_rng(0))
    for step, rows in enumerate(drawn):
        other = Stream(more, tokens, 4, np.random.default_rng(0))
        other.queue, other.rng = resumed.queue, resumed.rng  # what a state holds
        resumed = other
        resumed.before(step, 100, 0.3)
        assert resumed.rows() == rows, f"a training resumed at step {step} goes on otherwise"


def test_without_added_sentences_a_training_s_ending_is_like_the_rest(texts: Texts, tokens: Tokens) -> None:
    ended, plain = (Stream(texts, tokens, 4, np.random.default_rng(0)) for _ in range(2))
    for step in range(30):
        ended.before(step, 30, 0.5)
        assert ended.rows() == plain.rows()


def test_lessons_know_which_sentences_are_the_data_s_own(tmp_path: Path, more: Texts, tokens: Tokens) -> None:
    stream = Stream(more, tokens, 4, np.random.default_rng(0))
    write_lessons(tmp_path / "lessons-0.npz", stream, counted, LIMIT)
    stream.own_only = True
    write_lessons(tmp_path / "lessons-1.npz", stream, counted, LIMIT)
    first, second = (read_npz(tmp_path / f"lessons-{part}.npz") for part in range(2))
    assert (~first["own"]).sum() == more.added
    assert second["own"].all()
    lessons = Lessons(tmp_path, 4, 2, np.random.default_rng(3))
    lessons.before(9, 10, 0.1)
    rows = [row for _ in range(2 * lessons.own.sum() // 4) for row in lessons.rows()]
    assert lessons.own[rows].all()
    assert set(rows) == set(np.flatnonzero(lessons.own).tolist())


def test_the_same_seed_gives_the_same_lessons(tmp_path: Path, texts: Texts, tokens: Tokens) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lessons_of(tmp_path / name, texts, tokens)
    first, again, other = (read_npz(tmp_path / path) for path in
                           ("a/lessons-0.npz", "b/lessons-0.npz", "a/lessons-1.npz"))  # fmt: skip
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["tokens"], other["tokens"])


def test_lessons_that_are_none_are_refused(tmp_path: Path, texts: Texts, tokens: Tokens) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="language.teacher"):
        Lessons(tmp_path, 4, 2, rng)
    lessons_of(tmp_path, texts, tokens)
    with pytest.raises(InputError, match="batch: expected at most 24, .* found 25"):
        Lessons(tmp_path, 25, 2, rng).draw()
    with pytest.raises(InputError, match="lessons of 2 intents, the texts have 12"):
        Lessons(tmp_path, 4, 12, rng)
    write_words(tmp_path, np.ones((7, 3), np.float32))
    with pytest.raises(InputError, match=r"expected finite `vectors` \[8, n\]"):
        read_words(tmp_path, 8)
    write_npz(tmp_path / "lessons-1.npz", {"tokens": np.zeros((3, 5), np.int16)})
    with pytest.raises(InputError, match="do not belong together"):
        Lessons(tmp_path, 4, 2, rng)


def test_other_words_stand_where_near_ones_are_known_and_leave_the_intent_open(texts: Texts, tokens: Tokens) -> None:
    known = {word for text, _ in texts.train for word in tokens.normalise(text).split()}
    replaced = sorted(known)[::2]
    stream = Stream(texts, tokens, 6, np.random.default_rng(0), dict.fromkeys(replaced, ("zebra", "yacht")))
    changed, kept = 0, 0
    for _ in range(60):
        words = stream.sentence(int(stream.rng.integers(len(stream.words))))
        other = stream.reworded(words)
        assert len(other) == len(words)
        moved = [(a, b) for a, b in zip(words, other, strict=True) if a != b]
        assert all(a in replaced and b in ("zebra", "yacht") for a, b in moved)
        changed, kept = changed + bool(moved), kept + (not moved)
    assert changed > 10
    assert kept > 10
    assert stream.reworded(["hello"]) == ["hello"]
    own = 0
    for _ in range(10):
        _, wanted, intents = stream.draw(LIMIT)
        for row, intent in zip(wanted, intents, strict=True):
            text = tokens.decode([i for i in row.tolist() if i != IGNORE])
            if "zebra" in text or "yacht" in text:
                assert intent == IGNORE
            own += int(intent != IGNORE)
    assert 10 < own < 60


def test_the_teacher_says_what_a_sentence_of_other_words_means(tmp_path: Path, texts: Texts, tokens: Tokens) -> None:
    near = {word: ("zebra",) for text, _ in texts.train for word in tokens.normalise(text).split()}
    stream = Stream(texts, tokens, 4, np.random.default_rng(0), near)
    write_lessons(tmp_path / "lessons-0.npz", stream, counted, LIMIT)
    lessons = read_npz(tmp_path / "lessons-0.npz")
    zebra = tokens.encode("zebra")
    found = [any(row[i : i + len(zebra)].tolist() == zebra for i in range(LIMIT)) for row in lessons["targets"]]
    assert 3 < sum(found) < len(found)
    assert (lessons["intents"][found] == lessons["shares"][found].argmax(1)).all()
    assert lessons["intents"].min() >= 0


def test_a_check_counts_right_answers(texts: Texts, tokens: Tokens) -> None:
    assert list(checks(texts, tokens)) == ["val_0", "val_20"]
    check = Check(texts, tokens, 0.2)
    truth = iter([labels for _, labels in check.batches])
    assert check.accuracy(lambda rows: next(truth)) == 1.0
    assert check.accuracy(lambda rows: np.full(len(rows), 3, np.int32)) == pytest.approx(1 / 12)


def write_bert(folder: Path, words: set[str]) -> None:
    """A tiny BERT with random weights and a tokenizer of whole words."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    config = transformers.BertConfig(
        vocab_size=len(names), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).save_pretrained(str(folder))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(names[:5])
    made.save(str(folder / "tokenizer.json"))


def test_the_teacher_writes_lessons_that_the_model_learns_from(tmp_path: Path, texts: Texts) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    import torch

    from plugins_irp.language import teacher, train
    from plugins_irp.language.graphs import load_model

    write_bert(tmp_path / "bert", {word for text, _ in texts.train for word in text.lower().split()})
    run, own = tmp_path / "teacher", tmp_path / "model"
    options = ["--data", str(tmp_path), "--run", str(run), "--pretrained", str(tmp_path / "bert"), "--steps", "3",
               "--batch", "4", "--vocab", "380", "--passes", "2", "--device", "cpu", "--log-every", "1"]  # fmt: skip
    teacher.main(options)
    assert (run / "log.csv").read_text().count("\n") == 4
    groups = torch.load(run / "state.pt", weights_only=True)["optimizers"][0]["param_groups"]
    assert groups[1]["lr"] == pytest.approx(10 * groups[0]["lr"])
    first, second = (read_npz(run / f"lessons-{part}.npz") for part in range(2))
    assert not np.array_equal(first["tokens"], second["tokens"])
    np.testing.assert_allclose(first["shares"].astype(np.float32).sum(1), 1, atol=2e-3)
    assert read_words(run, 380).shape == (380, 16)
    assert np.abs(read_words(run, 380)).max() > 0
    kept = (run / "lessons-0.npz").stat().st_mtime_ns
    (run / "lessons-1.npz").unlink()
    teacher.main(options)  # trained already: only what is missing is written, and is what it was
    assert (run / "lessons-0.npz").stat().st_mtime_ns == kept
    assert all(np.array_equal(v, second[name]) for name, v in read_npz(run / "lessons-1.npz").items())
    taught = teacher.Taught(tmp_path, run, tmp_path / "bert")
    said, meant = [text for text, _ in texts.train], [intent for _, intent in texts.train]
    assert taught.right(said, meant).sum() == sum(
        taught.intents[taught.opinion(np.array([taught.tokens.encode(text)], np.int32)).argmax()] == intent
        for text, intent in texts.train
    )
    with pytest.raises(InputError, match=r"state\.pt; train a teacher"):
        teacher.Taught(tmp_path, tmp_path / "none")
    also = tmp_path / "also.csv"
    also.write_text("text,intent\n" + "".join(f"said anew {n},{intent}\n" for n, intent in enumerate(texts.intents)))
    with pytest.raises(InputError, match=r"on 12 sentences or lessons, here are 24; give the same ones"):
        teacher.Taught(tmp_path, run, tmp_path / "bert", [also])
    wider = [*options, "--run", str(tmp_path / "wider"), "--also", str(also), "--passes", "1", "--own-passes", "1"]
    teacher.main(wider)
    parts = [read_npz(tmp_path / f"wider/lessons-{part}.npz")["own"] for part in range(2)]
    assert [(len(own), int(own.sum())) for own in parts] == [(24, 12), (12, 12)]
    assert teacher.Taught(tmp_path, tmp_path / "wider", tmp_path / "bert", [also]).right(said, meant).shape == (12,)
    sizes = {"--steps": 2, "--batch": 4, "--hidden": 16, "--heads": 2, "--embedding": 8, "--max-steps": 2}
    paths = ["--data", str(tmp_path), "--lessons", str(run), "--run", str(own), "--device", "cpu"]
    train.main([*paths, *(str(part) for pair in sizes.items() for part in pair)])
    model, file = load_model(own / "model")
    assert model.config.vocab_size == Tokens(own / "model" / TOKENIZER).size
    assert file.config.intents == 12


def test_near_words_are_those_of_the_nearest_vectors(tmp_path: Path, tokens: Tokens) -> None:
    pytest.importorskip("torch")
    import torch

    from plugins_irp.language.teacher import NEAR, Teacher

    angles = {f"word{chr(97 + i)}": 0.1 * i for i in range(20)}
    write_bert(tmp_path, set(angles))
    teacher = Teacher(tmp_path, tokens, 2, 0.0)
    with torch.no_grad():
        table = teacher.bert.get_input_embeddings().weight
        table.zero_()
        for name, angle in angles.items():
            at = teacher.pretrained.get_vocab()[name]
            table[at, :2] = torch.tensor([np.cos(angle), np.sin(angle)])
        table -= table.mean(0)  # as `near` does, so that the angles are those that it sees
    found = teacher.near(["worda", "wordk", "unheard"])
    assert found["worda"][:3] == ["wordb", "wordc", "wordd"]
    assert set(found["wordk"][:2]) == {"wordj", "wordl"}
    assert all(len(near) == NEAR and word not in near for word, near in found.items())


def test_a_folder_without_a_pretrained_model_is_a_clear_error(tmp_path: Path, texts: Texts) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from plugins_irp.language import teacher

    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="expected a BERT with config, weights and tokenizer.json"):
        teacher.main(["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--pretrained",
                      str(tmp_path / "empty"), "--vocab", "380"])  # fmt: skip

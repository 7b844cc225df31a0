"""Mixtures: exact proportions, every window of a set once per epoch of that set, the same on any number of ranks."""

import hashlib
import json
import re
import shlex
import shutil
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from runs import assert_same_run, measured, run, train

from engine import evaluation, flags
from engine.errors import BadInput
from engine.tokens import mixture, weights
from engine.tokens.batches import Batches, windows_at
from engine.tokens.mixture import Mixture, turns
from engine.tokens.prepare import PrepareConfig, prepare
from engine.tokens.shards import TokenStream
from engine.tokens.weights import Source

quick = settings(deadline=None, max_examples=15)
T, OFFSET = 4, 20_000  # context; first token of the second set
all_parts = st.lists(st.integers(1, 50), min_size=1, max_size=5)


def mixed(counts: list[int], parts: list[int], vocab_size: int = 1 << 16) -> Mixture:
    """Sets of so many windows, whose tokens say where they stand: k * OFFSET + position in set k."""
    streams = []
    for index, count in enumerate(counts):
        tokens = (index * OFFSET + np.arange(count * T + 1)).astype(np.uint16)
        pieces = np.split(tokens, [len(tokens) // 2, len(tokens) * 2 // 3])
        streams.append(TokenStream([Path(f"{index}{one}") for one in "abc"], pieces, vocab_size))
    return Mixture([Source(f"set{index}", part) for index, part in enumerate(parts)], streams)


def batches(stream, sequences: int, micro_batch_size: int = 1, **changes) -> Batches:
    sizes = {"context": T, "tokens_per_step": T * sequences, "micro_batch_size": micro_batch_size}
    return Batches(stream, **sizes, **changes)


def seen(part: Batches, step: int) -> list[list[tuple[int, int]]]:
    """(set, window) of each sequence of each micro-batch; asserts that every token is the right one."""
    found = []
    for tokens, targets in part._load(step):
        assert (tokens[:, 1:] == tokens[:, :1] + np.arange(1, T)).all()
        assert (targets == tokens + 1).all()
        found.append([(first // OFFSET, first % OFFSET // T) for first in tokens[:, 0].tolist()])
    return found


# ---- Order --------------------------------------------------------------------------------------------------------


@quick
@given(parts=all_parts, block=st.integers(0, 10**9))
def test_each_block_holds_exactly_its_weight_of_each_set(parts, block):
    whole = sum(parts)
    which, numbers = turns(np.arange(block * whole, (block + 1) * whole), parts)
    for index, part in enumerate(parts):
        assert numbers[which == index].tolist() == list(range(block * part, (block + 1) * part))


@quick
@given(parts=all_parts)
def test_the_sets_take_turns_as_evenly_as_they_can(parts):
    which, _ = turns(np.arange(2 * sum(parts)), parts)
    for index, part in enumerate(parts):
        wanted = np.arange(1, len(which) + 1) * part / sum(parts)
        assert np.abs(np.cumsum(which == index) - wanted).max() < max(1, len(parts) - 1)
    assert turns(np.arange(10), [7, 3])[0].tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]


@quick
@given(parts=st.lists(st.integers(1, weights.MOST_PARTS // 4), min_size=2, max_size=4), start=st.integers(0, 2**61))
@example(parts=[2**29, 3], start=2**60)
def test_late_sequences_and_large_weights_do_not_overflow(parts, start):
    which, numbers = turns(np.array([start, start + 1]), parts)
    for position, found, number in zip((start, start + 1), which.tolist(), numbers.tolist(), strict=True):
        rest, whole = position, sum(parts)  # in integers of any size
        for index, part in enumerate(parts):
            before = rest * part // whole
            if (rest + 1) * part // whole > before:
                assert (found, number) == (index, before)
                break
            rest, whole = rest - before, whole - part


@quick
@given(
    counts=st.lists(st.integers(16, 60), min_size=2, max_size=3),
    weighed=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    seed=st.integers(0, 2**32),
)
def test_every_window_of_a_set_comes_once_in_each_of_its_epochs(counts, weighed, seed):
    parts = weighed[: len(counts)]
    part = batches(mixed(counts, parts), 12, 3, seed=seed)
    order: list[list[int]] = [[] for _ in counts]
    slowest = max(count * sum(parts) / one for count, one in zip(counts, parts, strict=True))  # sequences per epoch
    for step in range(int(2 * slowest / 12) + 2):
        for index, window in chain(*seen(part, step)):
            order[index].append(window)
    for own, count in zip(order, counts, strict=True):
        assert len(own) >= 2 * count
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == list(range(count))
    part.close()


@quick
@given(seed=st.integers(0, 2**32), step=st.integers(0, 40), weighed=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_any_number_of_ranks_sees_the_same_step_of_a_mixture(seed, step, weighed):
    stream, found = mixed([40, 70], [*weighed]), []
    for world_size, micro_batch_size in ((1, 16), (1, 4), (2, 2), (4, 1)):
        ranks = []
        for rank in range(world_size):
            part = batches(stream, 16, micro_batch_size, seed=seed, rank=rank, world_size=world_size)
            ranks.append(seen(part, step))
            part.close()
        found.append([window for micro in zip(*ranks, strict=True) for own in micro for window in own])
    assert all(each == found[0] for each in found)


def test_a_step_of_a_mixture_depends_on_seed_and_step_alone():
    stream = mixed([40, 70], [7, 3])
    walked = batches(stream, 8, 2)
    history = [seen(walked, step) for step in range(30)]
    for step in (29, 0, 13, 13, 14, 5):
        fresh = batches(stream, 8, 2)
        assert seen(fresh, step) == history[step]
        fresh.close()
    other = batches(stream, 8, 2, seed=2)
    assert seen(other, 0) != history[0]
    walked.close(), other.close()


def test_two_sets_of_one_size_are_not_read_in_one_order():
    (found,) = seen(batches(mixed([64, 64], [1, 1]), 64, 64), 0)
    first, second = ([window for index, window in found if index == own] for own in (0, 1))
    assert first != second
    assert first == windows_at(np.arange(32), 64, 1).tolist()  # as a run on it alone


def test_one_set_is_read_as_before_mixtures():
    """The figures are of the version before them: a run that was begun then goes on with the same batches."""
    shards = [(np.arange(500) * 7 % 251).astype(np.uint16), (np.arange(503) * 11 % 251).astype(np.uint16)]
    stream, content = TokenStream([Path("0"), Path("1")], shards, 257), hashlib.sha256()
    part = Batches(stream, context=8, tokens_per_step=96, micro_batch_size=3, seed=5, rank=1, world_size=2)
    for step in (0, 1, 5, 10, 11, 30, 1000):
        for pair in part._load(step):
            content.update(b"".join(one.numpy().tobytes() for one in pair))
    assert content.hexdigest()[:32] == "f6e4f4ea27ea930e18f6db4dfe8dd588"
    assert part._load(1000)[0][1][:, 0].tolist() == [160, 48, 25]
    part.close()


def test_a_set_smaller_than_its_share_of_a_step_is_named():
    sentence = r"one step needs 3 sequences of 4 tokens of set1, got a corpus of 2 \(9 tokens\); give more"
    with pytest.raises(BadInput, match=sentence):
        batches(mixed([40, 2], [7, 3]), 10)
    batches(mixed([40, 3], [7, 3]), 10).close()


def test_a_token_over_the_vocabulary_is_found_in_any_set():
    stream = mixed([40, 40], [1, 1])
    stream.streams[1].vocab_size = OFFSET + 100
    part = batches(stream, 80)  # a whole epoch
    with pytest.raises(BadInput, match=r"^1c: every token must be below the vocabulary size 20100, got 20160"):
        part._load(0)
    part.close()


def test_validation_has_each_set_s_share_of_the_windows():
    stream = mixed([100, 30], [7, 3])
    found = evaluation.windows(stream, T, 20 * T)
    assert [len(own) for own in evaluation.of_sets(stream, found, T)] == [14, 6]
    assert found[14:].tolist() == [100, 105, 110, 115, 120, 125]
    assert mixture.mean(stream, [1.0, 2.0]) == pytest.approx(1.3)
    with pytest.raises(BadInput, match="the validation split of set1 must hold at least 5 tokens, got 1"):
        evaluation.windows(mixed([9, 0], [1, 1]), T, 20)


# ---- Weights ------------------------------------------------------------------------------------------------------

decimals = st.decimals("0.001", "999", places=3)
directories = st.text("ab '\"\\:.~$7", min_size=1, max_size=6).map(lambda text: f"/nowhere/{text}x")


@settings(deadline=None, max_examples=60)
@given(named=st.dictionaries(directories, decimals, min_size=2, max_size=4))
def test_words_with_weights_give_directories_and_exact_proportions(named):
    words = [f"{directory}:{weight}" for directory, weight in named.items()]
    args = flags.joined(["tiny", "--out", "x", "--data", *words, "--seed", "2"])
    assert (args[:4], args[5:]) == (["tiny", "--out", "x", "--data"], ["--seed", "2"])
    assert flags.joined([f"--data={words[0]}", *words[1:]]) == ["--data", args[4]]
    found, whole = weights.parse(args[4]), sum(map(Fraction, named.values()))
    assert [source.directory for source in found] == [*named]
    parts = sum(source.parts for source in found)
    for source, weight in zip(found, named.values(), strict=True):
        assert Fraction(source.parts, parts) == Fraction(weight) / whole
    assert np.gcd.reduce([source.parts for source in found]) == 1


@quick
@given(text=st.text("a:.1 '\"\\\0é-", max_size=8))
@example(text="\0")
@example(text="\0:1")
def test_any_text_is_sources_or_a_sentence(text):
    for data in (text, f"a:1 {text}"):
        try:
            assert weights.parse(data)
        except BadInput as error:
            assert str(error).startswith("data: ")  # noqa: PT017


@quick
@given(words=st.lists(st.sampled_from(["--data", "--data=a", "a", "b:2", "--seed", "1", "-h"])))
def test_joined_words_leave_the_other_flags_alone(words):
    is_twice = sum(word.startswith("--data") for word in words) > 1
    try:
        found = flags.joined(words)
    except BadInput as error:
        assert ("must be given once" if is_twice else "must have a weight") in str(error)  # noqa: PT017
        return
    assert not is_twice
    assert [word for word in found if word.startswith("-") and not word.startswith("--data")] == [
        word for word in words if word.startswith("-") and not word.startswith("--data")
    ]
    assert flags.joined(found) == found


def test_a_path_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights.parse("c:0.5") == [Source("c")]
    assert weights.parse("two words") == [Source("two words")]
    assert weights.parse("it's") == [Source("it's")]
    for name in ("c:0.5", "a:1 b:2", "two", "words"):
        Path(name).mkdir()
    assert weights.parse("c:0.5") == [Source("c:0.5")]
    assert weights.parse("a:1 b:2") == [Source("a:1 b:2")]
    assert weights.parse("c:0.5:3 b:2") == [Source("c:0.5", 3), Source("b", 2)]
    assert weights.parse("two words") == [Source("two words")]
    with pytest.raises(BadInput, match=r"must have a weight, got none for two, words; write two:0.5 for half"):
        flags.joined(["--data", "two", "words"])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("a:0.7 b", "each of several sets must have a weight, got none for b; write b:0.5"),
        ("a:0.7 b:", "got none for b:; write b:0.5"),
        ("a:0.7 b:0", "must be above 0, got b:0; leave that set out"),
        ("a:0.7 b:-1", "must be above 0, got b:-1; leave that set out"),
        ("a:0.7 b:nan", "got none for b:nan"),
        ("a:0.7 ./a:0.3", r"must be named once, got ./a twice; add up its weights"),
        ("a:0.1234567891 b:1", "integer parts of at most 2,147,483,648 in all, got .*; round them to fewer digits"),
    ],
)
def test_wrong_weights_are_sentences(data, sentence):
    with pytest.raises(BadInput, match=f"^data: .*{sentence}"):
        weights.parse(data)


# ---- Runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_sets(shards, tmp_path_factory) -> str:
    """The words of a mixture of this project's sources and of a small text."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "text.txt").write_text("".join(f"{number} squared is {number * number}.\n" for number in range(900)))
    config = PrepareConfig(out=str(folder / "numbers"), tokenizer="bytes", workers=1, val_fraction=0.2)
    prepare([str(folder / "text.txt")], config)
    return shlex.join([f"{shards}:0.75", f"{folder / 'numbers'}:0.25"])


def test_a_run_on_a_mixture_goes_on_to_the_bit_and_refuses_other_weights(two_sets, tmp_path, capfd):
    out, again = tmp_path / "run", tmp_path / "again"
    every = ["--num-steps", "4", "--save-every", "2"]
    assert train(out, two_sets, *every) == 0
    printed = capfd.readouterr().out
    assert re.search(r"/numbers: 0\.0\d, 256 of [\d,]+ training bytes in 4 steps, 25% of the sequences\n", printed)
    last = measured(out)[-1]
    own, numbers = (float.fromhex(last[f"val_loss/{name}"]) for name in ("own", "numbers"))
    assert float.fromhex(last["val_loss"]) == pytest.approx(0.75 * own + 0.25 * numbers, rel=1e-12)
    shutil.copytree(out, again)
    assert train(again, two_sets, *every, "--resume", str(again / "checkpoints" / "step_00000002")) == 0
    assert_same_run(out, again)
    capfd.readouterr()
    assert run("eval", "--run", str(out), "--json") == 0
    assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(float.fromhex(last["val_loss"]), abs=1e-6)
    for changed in (two_sets.replace("0.75", "0.7"), " ".join(reversed(two_sets.split())), two_sets.split(":")[0]):
        assert train(out, changed, *every) == 2
        assert "data_digest" in capfd.readouterr().err


def test_sets_of_two_tokenizers_and_missing_sets_are_refused_together(two_sets, tmp_path):
    other = tmp_path / "gpt2"
    shutil.copytree(two_sets.split()[1].rpartition(":")[0], other)
    path = other / "manifest.json"
    path.write_text(path.read_text().replace('"bytes"', '"gpt2"', 1))
    own = two_sets.split()[0]
    with pytest.raises(BadInput, match=rf"the same tokenizer, got bytes in .*own, gpt2 in {other}; prepare"):
        mixture.tokenizer_name(f"{own} {other}:1")
    with pytest.raises(BadInput, match=r"(?s)/x, which does not exist.*\n  data: .*/y, which does not exist"):
        mixture.tokenizer_name(f"{own} {tmp_path / 'x'}:1 {tmp_path / 'y'}:1")


def test_other_directories_of_the_same_sets_are_the_same_data(two_sets, tmp_path):
    def digest(data: str) -> str:
        return mixture.digest(data, [mixture.open_stream(data, split, 257) for split in ("train", "val")])

    first, second = two_sets.split()
    shutil.copytree(second.rpartition(":")[0], tmp_path / "moved")
    assert digest(two_sets) == digest(f"{first} {tmp_path / 'moved'}:0.25")
    assert digest(two_sets) == digest(f"{first[:-4]}3 {second[:-4]}1")  # 0.75 and 0.25 are 3 and 1
    assert digest(two_sets) != digest(f"{first[:-4]}4 {second[:-4]}1")

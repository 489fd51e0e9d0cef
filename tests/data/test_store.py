"""Tokenised data are opened as they were kept, to the last byte, or not at all."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penchant.data import store as store_module
from penchant.data.chat import Split
from penchant.data.store import DamagedError, Identity, StoredData, TokenStore
from penchant.types import Example, Pair, Ranking, TokenizedExample, Unpaired

from ..faults.disks import dies_at
from .test_flat import CHANCES, NUMBERS, as_lists, tokenized_examples

# Types are checked at run time, of lists an entry drawn at random, which Hypothesis would rather draw itself.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

IDENTITY = Identity({"files": [["pairs.jsonl", "ab"]], "settings": {"max_length": 8}}, {"tokenizer": "cd"})

PLAIN = st.text(max_size=8)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": PLAIN}), max_size=3
)
TEXTS = PLAIN | MESSAGES
FLAGS = st.none() | st.lists(st.booleans(), min_size=1, max_size=3).map(tuple)
EXAMPLES: st.SearchStrategy[Example] = st.one_of(
    st.builds(
        Pair, TEXTS, TEXTS, TEXTS, PLAIN, NUMBERS, st.none() | NUMBERS, st.none() | st.tuples(CHANCES, CHANCES), FLAGS
    ),
    st.builds(Unpaired, TEXTS, TEXTS, st.none() | st.booleans(), PLAIN, NUMBERS, FLAGS),
    st.builds(
        Ranking,
        TEXTS,
        st.lists(TEXTS, min_size=2, max_size=4).map(tuple),
        PLAIN,
        NUMBERS,
        st.none() | st.lists(NUMBERS, min_size=2, max_size=4).map(tuple),
        FLAGS,
    ),
)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    examples = draw(tokenized_examples())
    return Split(examples, {example.index: draw(EXAMPLES) for example in examples})


def some_splits() -> dict[str, Split]:
    """A pair that was cut, and no held-out one."""
    pair = Pair("What?", "the cat \ud800 \u2028", "a dog", "pairs.jsonl:1", 0.5, 1.5, (0.25, 0.75), (True, False))
    examples = [TokenizedExample([5, 300], ([6], [7, 8]), 3, 0.5, 1.5, (0.25, 0.75))]
    return {"train": Split(examples, {3: pair}), "eval": Split([], {})}


def read(stored: StoredData | None) -> dict[str, Any]:
    assert stored is not None
    return {
        name: ([as_lists(example) for example in split.examples], dict(split.texts))
        for name, split in stored.splits.items()
    }


def written(splits: dict[str, Split]) -> dict[str, Any]:
    return {name: ([*split.examples], dict(split.texts)) for name, split in splits.items()}


@settings(max_examples=40, deadline=None)
@given(splits(), splits())
def test_what_is_opened_is_what_was_kept(train: Split, heldout: Split) -> None:
    with TemporaryDirectory() as folder:
        store, parts = TokenStore(Path(folder)), {"train": train, "eval": heldout}
        store.keep(IDENTITY, parts, {"findings": {"mean": 0.1, "none": None}})
        stored = store.open(IDENTITY)
        assert read(stored) == written(parts)
        assert stored is not None
        assert stored.facts == {"findings": {"mean": 0.1, "none": None}}


def test_a_text_is_found_by_its_index_alone(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    store.keep(IDENTITY, some_splits(), {})
    stored = store.open(IDENTITY)
    assert stored is not None
    texts = stored.splits["train"].texts
    assert list(texts) == [3]
    assert [index in texts for index in (2, 3, 4)] == [False, True, False]


def test_another_identity_finds_nothing(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    assert not store.may_hold(IDENTITY.rows)
    store.keep(IDENTITY, some_splits(), {})
    assert store.may_hold(IDENTITY.rows)
    other_rows = {**IDENTITY.rows, "settings": {"max_length": 9}}
    assert not store.may_hold(other_rows)
    assert store.open(Identity(other_rows, IDENTITY.tokenizer)) is None
    assert store.open(Identity(IDENTITY.rows, {"tokenizer": "ce"})) is None


@pytest.mark.parametrize("what", ["FORMAT", "version"])
def test_another_format_or_version_finds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    store = TokenStore(tmp_path)
    store.keep(IDENTITY, some_splits(), {})
    monkeypatch.setattr(store_module, what, 0 if what == "FORMAT" else lambda package: "0.0.0")
    assert not store.may_hold(IDENTITY.rows)
    assert store.open(IDENTITY) is None


def test_a_set_whose_name_is_the_same_by_chance_is_not_taken(tmp_path: Path) -> None:
    store, other = TokenStore(tmp_path), Identity(IDENTITY.rows, {"tokenizer": "ce"})
    store.keep(IDENTITY, some_splits(), {})
    store.place_of(IDENTITY).rename(store.place_of(other))
    assert store.open(other) is None


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    store.keep(IDENTITY, some_splits(), {})
    files = sorted(store.place_of(IDENTITY).iterdir())
    assert len(files) == 22  # ten for each split, the facts and the sums
    for file in files:
        whole = file.read_bytes()
        places = {0, len(whole) - 1, *range(3, len(whole), 29)} if whole else set()
        for place in places:
            changed = bytearray(whole)
            changed[place] ^= 1
            file.write_bytes(changed)
            with pytest.raises(DamagedError, match=r"is not as it was written|cannot be read"):
                store.open(IDENTITY)
        file.write_bytes(whole + b"\n")
        with pytest.raises(DamagedError):
            store.open(IDENTITY)
        file.write_bytes(whole)
    assert read(store.open(IDENTITY)) == written(some_splits())


def test_a_missing_file_is_noticed_and_the_set_can_be_kept_again(tmp_path: Path) -> None:
    store = TokenStore(tmp_path)
    for name in [*sorted(os.listdir(kept_in(store)))]:
        (store.place_of(IDENTITY) / name).unlink()
        with pytest.raises(DamagedError):
            store.open(IDENTITY)
        kept_in(store)
    assert read(store.open(IDENTITY)) == written(some_splits())


def kept_in(store: TokenStore) -> Path:
    store.keep(IDENTITY, some_splits(), {})
    return store.place_of(IDENTITY)


def test_a_writer_killed_at_any_point_leaves_nothing_half(tmp_path: Path) -> None:
    import transformers.modeling_utils  # noqa: F401  (what `dies_at` watches is loaded once, not in each process)

    store, seen, number, dies = TokenStore(tmp_path / "tokens"), set(), 0, True
    while dies:
        number += 4
        shutil.rmtree(store.folder, ignore_errors=True)
        dies = dies_at(number, tmp_path, lambda: store.keep(IDENTITY, some_splits(), {}))
        stored = store.open(IDENTITY)
        seen.add(stored is None)
        assert stored is None or read(stored) == written(some_splits())
    assert number > 20
    assert seen == {True, False}


def _keep(folder: Path, begin: Any, failures: Any) -> None:
    begin.wait()
    try:
        TokenStore(folder).keep(IDENTITY, some_splits(), {})
    except OSError:
        failures.put(1)


def test_processes_that_keep_the_same_at_once_leave_it_whole(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(5):
        folder, begin, failures = tmp_path / str(attempt), context.Barrier(3), context.SimpleQueue()
        writers = [context.Process(target=_keep, args=(folder, begin, failures)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert {writer.exitcode for writer in writers} == {0}
        assert read(TokenStore(folder).open(IDENTITY)) == written(some_splits())
        assert [path.name for path in folder.iterdir()] == [TokenStore(folder).place_of(IDENTITY).name]


def test_the_sets_used_the_longest_time_ago_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TokenStore(tmp_path)
    identities = [Identity(IDENTITY.rows, {"tokenizer": number}) for number in range(4)]
    for age, identity in zip((300, 200, 100), identities, strict=False):
        store.keep(identity, some_splits(), {})
        os.utime(store.place_of(identity), (time.time() - age,) * 2)
    size = sum(file.stat().st_size for file in store.place_of(identities[0]).iterdir())
    monkeypatch.setattr(store_module, "MOST_BYTES", 3.5 * size)
    assert store.open(identities[0]) is not None  # used just now
    store.keep(identities[3], some_splits(), {})
    assert [store.open(identity) is not None for identity in identities] == [True, False, True, True]
    monkeypatch.setattr(store_module, "MOST_BYTES", 0)
    store.keep(identities[3], some_splits(), {})
    assert [store.open(identity) is not None for identity in identities] == [False, False, False, True]


def test_only_what_the_store_has_made_is_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "MOST_BYTES", 0)
    store = TokenStore(tmp_path)
    name = store.place_of(IDENTITY).name
    dead, at_work, foreign = (tmp_path / f".{name}.tmp-1", tmp_path / f".{name}.tmp-2", tmp_path / "photos")
    for folder in (dead, at_work, foreign):
        folder.mkdir()
        (folder / "file").write_text("content")
    for folder in (dead, foreign):
        os.utime(folder, (time.time() - 100_000,) * 2)
    store.keep(IDENTITY, some_splits(), {})
    assert {path.name for path in tmp_path.iterdir()} == {name, at_work.name, "photos"}

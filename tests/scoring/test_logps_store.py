"""The durable store: what was added comes back to the bit, or not at all, whatever happens to the file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penchant import UserError
from penchant.layouts.padded import collate
from penchant.scoring.logps_store import LogpsStore, store_name
from penchant.scoring.policy import Policy
from penchant.scoring.reference import FrozenModel, LogpsCache
from penchant.types import TokenizedExample

from ..conftest import make_tiny_model
from ..faults.disks import SmallDisk, killed_at

PAIRS = [
    TokenizedExample([5, 9, 2, 31], ([7, 60, 8], [7, 12]), index=0),
    TokenizedExample([11], ([4, 4, 12, 30, 2, 1, 59], [3]), index=1),
    TokenizedExample([21, 3], ([14, 5, 6], [9, 9, 9, 2]), index=2),
]


def logps_of(number: int) -> Tensor:
    """Some log-probabilities that nobody else has."""
    return -torch.rand(number % 7 + 1, generator=torch.Generator().manual_seed(number))


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def some(numbers: range) -> dict[bytes, Tensor]:
    return {key_of(number): logps_of(number) for number in numbers}


def assert_exact(found: dict[bytes, Tensor]) -> None:
    """Nothing is there but what was once added."""
    for key, logps in found.items():
        assert torch.equal(logps, logps_of(int.from_bytes(key, "little")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "logps" / store_name("a", "b", "float32", "cpu")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.unmount()


# To the bit.


def test_what_is_looked_up_is_what_the_frozen_model_said_in_this_process_and_the_next(
    path: Path, tokenizer: Any
) -> None:
    policy, batch = Policy(make_tiny_model(), tokenizer), collate(PAIRS)
    (expected,) = FrozenModel.copy_of(policy).token_logps([batch])
    cache = LogpsCache(LogpsStore(path))
    cache.fill(policy, [batch], lambda _: None)
    for kept in (cache, LogpsCache(LogpsStore(path))):
        assert kept.missing(PAIRS) == []
        assert torch.equal(kept.lookup(batch), expected)
        assert kept.new_troubles() == []
    assert cache._logps == {}  # nothing is held twice


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -0.0, 1e-45])
def test_every_float32_comes_back(special: float, path: Path) -> None:
    values = torch.tensor([special, -1.5])
    assert LogpsStore(path).add({key_of(1): values})
    (found,) = LogpsStore(path).read([key_of(1)]).values()
    assert torch.equal(found.view(torch.int32), values.view(torch.int32))


def test_what_float32_cannot_hold_is_refused(path: Path) -> None:
    with pytest.raises(TypeError, match="float64"):
        LogpsStore(path).add({key_of(1): torch.zeros(2, dtype=torch.float64)})


def test_what_stands_there_first_stays(path: Path) -> None:
    one, other = LogpsStore(path), LogpsStore(path)
    assert one.add(some(range(3)))
    assert other.add({key_of(2): torch.zeros(1), **some(range(3, 5))})
    for store in (one, other):
        assert store.read(map(key_of, range(6))).keys() == some(range(5)).keys()
        assert_exact(store.read(map(key_of, range(6))))


def test_a_file_is_for_one_source() -> None:
    names = {
        store_name("a", "b", "float32", "cpu"),
        store_name("A", "b", "float32", "cpu"),
        store_name("a", "B", "float32", "cpu"),
        store_name("a", "b", "bf16", "cpu"),
        store_name("a", "b", "float32", "cuda"),
        store_name("a b", "", "float32", "cpu"),
    }
    assert len(names) == 6


def test_a_file_under_the_name_of_another_source_is_never_used(path: Path) -> None:
    LogpsStore(path).add(some(range(5)))
    other = path.rename(path.with_name(store_name("a", "other weights", "float32", "cpu")))
    store = LogpsStore(other)
    assert store.read(map(key_of, range(5))) == {}
    assert len(store.troubles) == 1


# Damage.


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Name and content of a file with 200 rows."""
    path = tmp_path_factory.mktemp("sound") / store_name("a", "b", "float32", "cpu")
    assert LogpsStore(path).add(some(range(200)))
    return path.name, path.read_bytes()


def assert_harmless(path: Path, content: bytes) -> bool:
    """A store that finds this content gives nothing wrong, and is of full use again; whether it noticed anything."""
    path.write_bytes(content)
    store = LogpsStore(path)
    assert_exact(store.read(map(key_of, range(250))))
    assert len(store.troubles) <= 1
    assert all("\n" not in trouble and str(path) in trouble for trouble in store.troubles)
    cache = LogpsCache(store)
    cache._logps = some(range(250))
    cache._write()
    assert cache._read(list(map(key_of, range(250)))).keys() == some(range(250)).keys()
    assert_exact(cache._read(list(map(key_of, range(250)))))
    later = LogpsStore(path)
    assert_exact(later.read(map(key_of, range(250))))
    return bool(store.troubles)


def test_a_flipped_byte_anywhere_is_never_a_wrong_number(sound: tuple[str, bytes], tmp_path: Path) -> None:
    name, content = sound
    dice = random.Random(0)
    noticed = 0
    places = [*range(0, 110, 11), *(dice.randrange(len(content)) for _ in range(50))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= dice.randrange(1, 256)
        noticed += assert_harmless(tmp_path / name, bytes(damaged))
    assert noticed > 15  # much of a file is room for more


def test_a_flipped_bit_of_any_value_is_noticed(sound: tuple[str, bytes], tmp_path: Path) -> None:
    name, content = sound
    for number in range(0, 200, 20):
        damaged = bytearray(content)
        damaged[content.index(logps_of(number).numpy().tobytes())] ^= 1
        assert assert_harmless(tmp_path / name, bytes(damaged))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
def test_a_truncated_file_is_never_a_wrong_number(share: float, sound: tuple[str, bytes], tmp_path: Path) -> None:
    name, content = sound
    noticed = assert_harmless(tmp_path / name, content[: int(share * len(content))])
    assert noticed == (share > 0)  # an empty file is a new one


def test_what_is_no_store_at_all_begins_anew(path: Path) -> None:
    path.parent.mkdir()
    assert assert_harmless(path, b"not a database" * 1000)
    assert LogpsStore(path).read([key_of(249)]).keys() == {key_of(249)}


def test_a_store_that_is_lost_on_the_way_stops_the_run_with_a_sentence(path: Path, tokenizer: Any) -> None:
    cache = LogpsCache(LogpsStore(path))
    cache.fill(Policy(make_tiny_model(), tokenizer), [collate(PAIRS)], lambda _: None)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match=r"was damaged.*`penchant resume` goes on"):
        cache.lookup(collate(PAIRS))
    assert LogpsStore(path).troubles == []  # and is thrown away


def test_a_file_that_is_deleted_while_a_run_reads_it_is_read_to_the_end(path: Path) -> None:
    store = LogpsStore(path)
    store.add(some(range(9)))
    path.unlink()
    assert_exact(store.read(map(key_of, range(9))))
    assert len(store.read(map(key_of, range(9)))) == 9
    assert LogpsStore(path).read(map(key_of, range(9))) == {}


# Kills, and two at once.

_ADD = """
import sys, torch
from pathlib import Path
from tests.scoring.test_logps_store import LogpsStore, some
store, first = LogpsStore(Path(sys.argv[1])), int(sys.argv[2])
for number in range(first, first + 60):
    assert store.add(some(range(number, number + 5))), store.troubles
    print(number, flush=True)
"""


def adding(path: Path, first: int) -> subprocess.Popen[str]:
    """A process that adds rows, five at a time, and says how far it is."""
    words = [sys.executable, "-c", _ADD, str(path), str(first)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_two_processes_fill_one_store_and_a_kill_takes_nothing_that_was_added(path: Path) -> None:
    with adding(path, 0) as one, adding(path, 30) as other:
        assert other.stdout is not None
        for line in other.stdout:
            last = int(line)
            if last == 60:
                break
        os.kill(other.pid, signal.SIGKILL)
        one.communicate()
    assert one.returncode == 0
    store = LogpsStore(path)
    assert store.troubles == []
    found = store.read(map(key_of, range(100)))
    assert found.keys() >= some(range(65)).keys()
    assert_exact(found)


@pytest.mark.parametrize("call", ["pwrite64", "fsync", "fdatasync", "unlink"])
@pytest.mark.parametrize("number", [1, 2, 5])
def test_a_kill_within_a_write_leaves_all_of_it_or_nothing(call: str, number: int, path: Path) -> None:
    assert LogpsStore(path).add(some(range(50)))
    killed_at(call, number, lambda: None if LogpsStore(path).add(some(range(50, 90))) else os.abort())
    store = LogpsStore(path)
    found = store.read(map(key_of, range(90)))
    assert store.troubles == []
    assert len(found) in (50, 90)
    assert_exact(found)


# Disks that do not do.


def test_a_full_disk_is_told_once_and_what_it_holds_is_still_read(small_disk: SmallDisk) -> None:
    small_disk.mount(200_000)
    store = LogpsStore(small_disk.folder / store_name("a", "b", "float32", "cpu"))
    assert store.add(some(range(20)))
    cache = LogpsCache(store)
    cache._logps = {key_of(number): torch.full((5000,), float(number)) for number in range(20, 40)}
    cache._write()
    (trouble,) = cache.new_troubles()
    assert "full" in trouble
    cache._write()
    assert cache.new_troubles() == []
    found = cache._read(list(map(key_of, range(40))))
    assert_exact({key: found[key] for key in map(key_of, range(20))})
    assert all(torch.equal(found[key_of(n)], torch.full((5000,), float(n))) for n in range(20, 40))


def test_a_read_only_disk_is_read(small_disk: SmallDisk) -> None:
    small_disk.mount(1_000_000)
    path = small_disk.folder / store_name("a", "b", "float32", "cpu")
    assert LogpsStore(path).add(some(range(20)))
    small_disk.change("ro")
    store = LogpsStore(path)
    assert len(store.read(map(key_of, range(30)))) == 20
    assert_exact(store.read(map(key_of, range(30))))
    assert store.troubles == []
    assert not store.add(some(range(20, 30)))
    assert len(store.troubles) == 1
    elsewhere = LogpsStore(small_disk.folder / "new" / "other.sqlite")
    assert not elsewhere.add(some(range(3)))
    assert len(elsewhere.troubles) == 1


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = LogpsStore(tmp_path / "file" / "a.sqlite")
    assert not store.add(some(range(3)))
    assert store.read([key_of(0)]) == {}
    (trouble,) = store.troubles
    assert f"'{tmp_path / 'file'}' cannot be used" in trouble

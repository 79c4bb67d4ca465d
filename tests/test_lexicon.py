"""Lexicon compared with plain Python on Unicode and bytes; files, invalid arguments, threads."""

import copy
import os
import pickle
import threading
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sukhops
from sukhops import Lexicon
from sukhops.lexicon import _HEAD

# few symbols, so that n-grams repeat; every internal width of str, a lone surrogate, line ends
UNICODE = st.text(st.sampled_from("ab\n\r\0é\uffffЖ\ud800😀"), max_size=40)
BYTES = st.binary(max_size=4).map(lambda some: bytes(b"ab\n\xff"[b % 4] for b in some * 10))
TEXTS = st.one_of(st.lists(UNICODE, min_size=1, max_size=5), st.lists(BYTES, min_size=1, max_size=5))


def grams(line, length):
    return [line[i : i + length] for i in range(len(line) - length + 1)]


def expected_units(texts, max_length, min_count):
    """The unknown character, then sorted characters, then sorted n-grams of each length."""
    newline = "\n" if isinstance(texts[0], str) else b"\n"
    units = [texts[0][:0], *sorted({c for text in texts for c in grams(text, 1)})]
    lines = [line for text in texts for line in text.split(newline)]
    for length in range(2, max_length + 1):
        counts = Counter(gram for line in lines for gram in grams(line, length))
        units += sorted(gram for gram, n in counts.items() if n >= min_count)
    return units


def expected_ids(units, texts, max_length):
    index = {unit: i for i, unit in enumerate(units)}
    longest = max(map(len, texts), default=0)
    ids = torch.full((len(texts), longest, max_length), -1)
    for b, text in enumerate(texts):
        for t in range(len(text)):
            for k in range(min(max_length, len(text) - t)):
                ids[b, t, k] = index.get(text[t : t + k + 1], 0 if k == 0 else -1)
    return ids, torch.tensor([len(text) for text in texts], dtype=torch.int64)


def assert_maps(lexicon, texts):
    ids, lengths = lexicon.unit_ids(texts)
    assert ids.dtype == lengths.dtype == torch.int64
    want, want_lengths = expected_ids(lexicon.units, texts, lexicon.max_length)
    assert torch.equal(ids, want) and torch.equal(lengths, want_lengths)


@settings(max_examples=400, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 6), st.integers(1, 4))
def test_counts_and_maps_like_plain_python(texts, others, max_length, min_count):
    lexicon = Lexicon.from_text(texts, max_length, min_count)
    assert lexicon.units == expected_units(texts, max_length, min_count)
    assert len(lexicon) == len(lexicon.units) == len(set(lexicon.units))
    assert_maps(lexicon, texts)
    if type(texts[0]) is type(others[0]):
        assert_maps(lexicon, others)  # may contain unknown characters


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_long_text_is_split_among_threads(encode, threads):
    """Threads count and map parts of the text; n-grams and units that cross the boundaries are found."""
    torch.set_num_threads(threads)
    try:
        g = torch.Generator().manual_seed(0)
        draws = torch.randint(0, 40, (150_000,), generator=g).square().div(40).long().tolist()
        text = "".join("\n" if d == 39 else chr(97 + d) for d in draws)
        text = text.encode() if encode else text
        texts = [text[:70_000], text[70_000:70_001], text[:0], text[70_001:]]
        lexicon = Lexicon.from_text(texts, max_length=3, min_count=50)
        assert lexicon.units == expected_units(texts, 3, 50)
        assert len(lexicon) > 500
        assert_maps(lexicon, texts)
    finally:
        torch.set_num_threads(os.cpu_count() or 1)


def test_real_text_covers_every_unit():
    """Source code gives many units; all substrings of units are units; each unit is mapped to its id."""
    text = "".join((sukhops.__file__, *(open(p).read() for p in (__file__, pytest.__file__)))) * 3
    lexicon = Lexicon.from_text([text], max_length=5, min_count=6)
    units = set(lexicon.units)
    assert len(units) > 1000 and all(u[1:] in units and u[:-1] in units for u in lexicon.units[1:])
    ids, _ = lexicon.unit_ids(lexicon.units[1:])
    ends = torch.tensor([len(u) - 1 for u in lexicon.units[1:]])
    assert torch.equal(ids[:, 0].gather(1, ends[:, None])[:, 0], torch.arange(1, len(lexicon)))


def test_hand_computed_example():
    lexicon = Lexicon.from_text(["abab\nab", "b"], max_length=3, min_count=2)
    assert lexicon.units == ["", "\n", "a", "b", "ab"]
    ids, lengths = lexicon.unit_ids(["ab\n", "z"])
    assert ids.tolist() == [
        [[2, 4, -1], [3, -1, -1], [1, -1, -1]],
        [[0, -1, -1], [-1, -1, -1], [-1, -1, -1]],
    ]
    assert lengths.tolist() == [3, 1]


def test_empty_texts_and_empty_lexicon():
    lexicon = Lexicon.from_text([""])
    assert len(lexicon) == 1 and lexicon.units == [""]
    assert lexicon.unit_ids(["xy"])[0].tolist() == [[[0, -1, -1, -1]] * 2]
    for texts, shape in (([], (0, 0, 4)), (["", ""], (2, 0, 4))):
        ids, lengths = lexicon.unit_ids(texts)
        assert ids.shape == shape and lengths.tolist() == [0] * shape[0]


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS, max_length=st.integers(1, 5))
def test_files_pickles_and_copies_have_the_same_units(tmp_path_factory, texts, max_length):
    lexicon = Lexicon.from_text(texts, max_length, 1)
    path = tmp_path_factory.mktemp("lexicon") / "units"
    lexicon.save(path)
    again = Lexicon.load(path)
    for other in (again, pickle.loads(pickle.dumps(lexicon)), copy.deepcopy(lexicon)):
        assert (other.units, other.max_length, repr(other)) == (lexicon.units, max_length, repr(lexicon))
        assert torch.equal(other.unit_ids(texts)[0], lexicon.unit_ids(texts)[0])
    assert [p.name for p in path.parent.iterdir()] == ["units"]
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "units.lexicon"
    Lexicon.from_text(["ab\nabc", "é"], 3, 1).save(path)
    return path


def test_truncated_file_raises(saved):
    content = saved.read_bytes()
    for size in range(len(content)):
        saved.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"units\.lexicon: (truncated|not a lexicon)"):
            Lexicon.load(saved)
    saved.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="truncated or damaged"):
        Lexicon.load(saved)


def test_changed_byte_raises(saved):
    content = saved.read_bytes()
    for i in range(len(content)):
        saved.write_bytes(content[:i] + bytes([content[i] ^ 64]) + content[i + 1 :])
        with pytest.raises(ValueError, match=r"units\.lexicon: (truncated or )?(damaged|not a lexicon)"):
            Lexicon.load(saved)


def test_contradicting_units_raise(saved):
    """The checksum matches, but a unit continues one that comes later."""
    content = bytearray(saved.read_bytes()[:-4])
    _, _, _, characters, ngrams = _HEAD.unpack_from(content)
    start = _HEAD.size + 4 * characters
    content[start : start + 4] = (1 + characters + ngrams).to_bytes(4, "little")
    saved.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"not a lexicon of sukhops: the units of the lexicon contradict"):
        Lexicon.load(saved)


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + bytes(200), b"some text\n" * 50])
def test_foreign_file_raises(tmp_path, content):
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="foreign: not a lexicon of sukhops"):
        Lexicon.load(path)
    with pytest.raises(FileNotFoundError):
        Lexicon.load(tmp_path / "missing")


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 0},
        {"max_length": 2},  # there is an n-gram of 3
        {"codes": [10, 97, 97]},
        {"codes": [97, 10, 98]},
        {"codes": [10, 97, 0x110000]},
        {"unicode": False, "codes": [10, 97, 256]},
        {"parents": [2]},
        {"parents": [2, 4]},
        {"parents": [2, 0, 3]},
        {"parents": [2, -1, 4]},
        {"parents": [2, 1, 4]},  # a newline
        {"parents": [3, 2, 4]},  # not sorted
        {"parents": [2, 3, 6]},  # itself
        {"symbols": [3, 1, 3]},  # a newline
        {"symbols": [3, 2, 0]},
        {"symbols": [3, 2, 4]},
    ],
)
def test_contradictory_units_raise(change):
    given = {
        "unicode": True,
        "max_length": 3,
        "codes": [10, 97, 98],
        "parents": [2, 3, 4],
        "symbols": [3, 2, 3],
    }
    trie = sukhops.lexicon.Trie
    assert len(trie.of(**given)) == 7
    with pytest.raises(ValueError, match="contradict"):
        trie.of(**(given | change))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_save_is_atomic(saved, monkeypatch, broken):
    """If saving fails, the old file is unchanged and no temporary file is left."""
    before = saved.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        Lexicon.from_text(["xyz"], 2, 1).save(saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_save_to_invalid_path_raises(tmp_path):
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no such folder" / "units"):
        with pytest.raises(OSError):
            Lexicon.from_text(["xyz"]).save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Lexicon.from_text("abc"), TypeError, "texts: expected a list.* single str"),
        (lambda: Lexicon.from_text(b"abc"), TypeError, "texts: expected a list.* single bytes"),
        (lambda: Lexicon.from_text(3), TypeError, "texts: .* got int"),
        (lambda: Lexicon.from_text([]), ValueError, "texts: .* got none"),
        (lambda: Lexicon.from_text(["a", 3]), TypeError, "texts: expected str or bytes each, got int"),
        (lambda: Lexicon.from_text(["a", b"a"]), TypeError, "texts: .* got both"),
        (lambda: Lexicon.from_text(["a"], max_length=0), ValueError, "max_length"),
        (lambda: Lexicon.from_text(["a"], max_length=2**40), ValueError, "max_length"),
        (lambda: Lexicon.from_text(["a"], max_length=2.0), TypeError, "max_length"),
        (lambda: Lexicon.from_text(["a"], min_count=0), ValueError, "min_count"),
        (lambda: Lexicon.from_text(["a"], min_count=True), TypeError, "min_count"),
        (lambda: Lexicon.from_text(["a"]).unit_ids("a"), TypeError, "texts"),
        (lambda: Lexicon.from_text(["a"]).unit_ids([b"a"]), TypeError, "texts: .* of str, got bytes"),
        (lambda: Lexicon.from_text([b"a"]).unit_ids(["a"]), TypeError, "texts: .* of bytes, got str"),
        (lambda: Lexicon.from_text(["a"]).unit_ids([None]), TypeError, "texts: .* got NoneType"),
    ],
)
def test_invalid_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_threads_share_a_lexicon():
    """Eight threads count and map concurrently (without the GIL) and get the same results as one."""
    text = "the quick brown fox\njumps over the lazy dog\n" * 3000
    lexicon = Lexicon.from_text([text], 4, 100)
    alone = lexicon.unit_ids([text])[0]
    found = [None] * 8

    def work(i):
        same = Lexicon.from_text([text], 4, 100).units == lexicon.units
        found[i] = same and all(torch.equal(lexicon.unit_ids([text])[0], alone) for _ in range(3))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 8


def test_generators_of_texts_are_accepted():
    assert Lexicon.from_text((c * 2 for c in "ab"), 2, 1).units == ["", "a", "b", "aa", "bb"]

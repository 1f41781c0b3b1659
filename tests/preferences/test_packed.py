"""Tests of preferences/packed.py, scoring/reference.py and files.py: round trips, bits by hand, all kinds of damage.

bash tests/run.sh tests/preferences/test_packed.py
"""

import hashlib
import itertools
import json
import os

import numpy as np
import pytest
from originals import refused

import files
from files import replacing, sealed
from preferences.packed import Packed, write_packed
from scoring.reference import Reference, pack_masks, unpack_masks

PAIRS = [([5, 6], [7, 8, 9], [4]), ([], [1], [2, 3]), ([4000000000], [11, 12], [13, 14, 15, 16])]
META = {"tokenizer": "abc", "end_token_id": 2, "source": "prefs.jsonl"}
WANTED = {"data": "d", "model": "m", "tokenizer": "abc", "diffusion_steps": 4, "trajectories": 5, "noise_seed": 0}
S = 10


@pytest.fixture
def folder(tmp_path):
    write_packed(tmp_path / "packed", iter(PAIRS), META)
    return tmp_path / "packed"


def digest(value):
    """files.fingerprint of one JSON value, as the folders on disk are named."""
    data = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(len(data).to_bytes(8, "little") + data).hexdigest()[:16]


# --- the data ---


def test_round_trip(folder):
    got = Packed(folder)
    assert len(got) == 3 and got.meta | META == got.meta
    for i, pair in enumerate(PAIRS):
        assert tuple(part.tolist() for part in got[i]) == pair
    assert got.content(0).tolist() == [5, 6, 7, 8, 9, 4] and got.content(2).tolist() == [4000000000, *range(11, 17)]
    tokens, bounds = np.load(folder / "tokens.npy"), np.load(folder / "bounds.npy")
    assert tokens.dtype == np.uint32 and tokens.tolist() == [id for pair in PAIRS for part in pair for id in part]
    assert bounds.dtype == np.int64 and bounds.tolist() == [[0, 2, 5, 6], [6, 6, 7, 9], [9, 10, 12, 16]]
    # response tokens are counted in file order: 3 + 1, 1 + 2, 2 + 4
    assert got.noise_bounds.tolist() == [[0, 3, 4], [4, 5, 7], [7, 9, 13]]
    assert sorted(path.name for path in folder.iterdir()) == ["bounds.npy", "meta.json", "tokens.npy"]
    assert (folder / "meta.json").stat().st_mode & 0o777 == 0o644


def test_data_fingerprint(tmp_path):
    """Of tokens, bounds, tokenizer and end token; not of what they were made of."""

    def made(pairs, **change):
        write_packed(tmp_path / "packed", pairs, META | change)
        return Packed(tmp_path / "packed").meta["fingerprint"]

    same = made(PAIRS)
    assert same == made(PAIRS) == made(PAIRS, source="other.jsonl")
    others = [
        made(PAIRS[::-1]),
        made(PAIRS[:2]),
        made([([5], [6, 7, 8, 9], [4]), *PAIRS[1:]]),
        made(PAIRS, tokenizer="x"),
        made(PAIRS, end_token_id=3),
    ]
    assert len({same, *others}) == 6


# Ways to harm a folder: functions of it


def cut(name, size):
    """Cut a file to `size` bytes, or by so many where it is negative."""

    def harm(folder):
        os.truncate(folder / name, size if size >= 0 else (folder / name).stat().st_size + size)

    return harm


def meta(**change):
    """Other entries in meta.json."""

    def harm(folder):
        value = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(sealed(value | change)))

    return harm


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def replace(name, old, new):
    """A text in a file is another."""
    return lambda folder: write(name, (folder / name).read_text().replace(old, new))(folder)


def save(name, array):
    return lambda folder: np.save(folder / name, array)


def flip(name, place):
    """A bit of one element is flipped."""

    def harm(folder):
        array = np.load(folder / name)
        array.flat[place] ^= 1
        np.save(folder / name, array)

    return harm


@pytest.mark.parametrize(
    "harm, words",
    [
        (remove("meta.json"), "meta.json"),
        (cut("meta.json", 20), "meta.json"),
        (write("meta.json", "[]"), "meta.json"),
        (replace("meta.json", "prefs", "prefS"), "as it was written"),
        (flip("tokens.npy", 7), "as it was written"),
        (meta(format=1), "format 1, expected 2"),
        (meta(pairs=2), "disagree"),
        (remove("tokens.npy"), "tokens.npy"),
        (remove("bounds.npy"), "bounds.npy"),
        (cut("tokens.npy", -1), "tokens.npy"),
        (cut("bounds.npy", -8), "bounds.npy"),
        (cut("tokens.npy", 0), "tokens.npy"),
        (cut("tokens.npy", 5), "tokens.npy"),
        (cut("tokens.npy", 40), "tokens.npy"),
        (save("tokens.npy", np.zeros(15, np.uint32)), "disagree"),
        (save("bounds.npy", np.zeros((3, 3), np.int64)), "disagree"),
        (save("tokens.npy", np.array([{}], object)), "tokens.npy"),
    ],
)
def test_broken_folder(folder, harm, words):
    harm(folder)
    refused(lambda: Packed(folder), str(folder), words, "python data_prep.py")


def test_no_folder_and_no_pairs(tmp_path):
    refused(lambda: Packed(tmp_path / "nowhere"), "nowhere", "python data_prep.py")
    write_packed(tmp_path / "packed", [], META)
    refused(lambda: Packed(tmp_path / "packed"), "holds no pair", "python data_prep.py")


def test_killed_half_way(folder):
    """Written over and killed: the old meta.json is gone, so that no one takes the mixture for finished."""

    def pairs():
        yield PAIRS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_packed(folder, pairs(), META)
    assert not (folder / "meta.json").exists()
    refused(lambda: Packed(folder), "meta.json")


def test_killed_between_files(folder, monkeypatch):
    """meta.json is the last to appear: killed before any of the renames, the folder is unfinished."""
    replace, names = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: names.append(b.name) or replace(a, b))
    write_packed(folder, PAIRS, META)
    assert sorted(names[:2]) == ["bounds.npy", "tokens.npy"] and names[2:] == ["meta.json"]

    def killed_at(number):
        calls = itertools.count()

        def rename(a, b):
            if next(calls) == number:
                raise KeyboardInterrupt
            replace(a, b)

        return rename

    for number in range(3):
        monkeypatch.setattr(os, "replace", killed_at(number))
        with pytest.raises(KeyboardInterrupt):
            write_packed(folder, PAIRS, META)
        refused(lambda: Packed(folder), "meta.json")


@pytest.mark.parametrize("where", ["block", "rename"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_replacing_fails(tmp_path, monkeypatch, where, error):
    (tmp_path / "a.json").write_text("old")

    def fail(*_):
        raise error

    if where == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(error), replacing(tmp_path / "a.json") as file:
        file.write("new")
        assert (tmp_path / "a.json").read_text() == "old"
        if where == "block":
            fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_write_json(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": "é"})
    assert (tmp_path / "a.json").read_bytes() == '{\n  "b": "é"\n}\n'.encode()


def test_fingerprint(tmp_path):
    assert files.fingerprint(WANTED) == digest(WANTED) == files.fingerprint(dict(reversed(WANTED.items())))
    parts = [("ab", "c"), ("a", "bc"), ("abc",), ("c", "ab"), (1,), ("1",), (np.int64([1]),), (np.int64([1, 0]),)]
    assert len({files.fingerprint(*part) for part in parts}) == len(parts)
    (tmp_path / "big").write_bytes(bytes(range(256)) * 5000)
    assert files.file_sha256(tmp_path / "big") == hashlib.sha256(bytes(range(256)) * 5000).hexdigest()


# --- the reference ---


def test_bits_by_hand():
    """One row per token, states from the highest bit down: token 0 is hidden in states 0, 1, 9; token 1 in 0 and 3."""
    masked = np.zeros((10, 2), bool)
    masked[[0, 1, 9], 0] = masked[[0, 3], 1] = True
    bits = pack_masks(masked)
    assert bits.dtype == np.uint8 and bits.tolist() == [[0b11000000, 0b01000000], [0b10010000, 0]]
    got = unpack_masks(np.uint8([[0b11000000, 0b01000000], [0b10010000, 0]]), 10)
    assert got.dtype == bool and (got == masked).all()


@pytest.fixture
def reference(folder):
    """A reference with two noise sets, made with numpy alone. Returns {(set, pair, side): masked (S, n)}."""
    place = folder / f"ref-{digest(WANTED)}"
    place.mkdir()
    rng, truth = np.random.default_rng(0), {}
    for k in range(2):
        rows = []
        for index, side in itertools.product(range(len(PAIRS)), (0, 1)):
            masked = truth[k, index, side] = rng.random((S, len(PAIRS[index][1 + side]))) < 0.5
            for hidden in masked.T.tolist():  # a token's states
                word = "".join(str(int(bit)) for bit in hidden).ljust(16, "0")
                rows.append([int(word[:8], 2), int(word[8:], 2)])
        np.save(place / f"noise-{k}.npy", np.array(rows, np.uint8))
        np.save(place / f"ref_scores-{k}.npy", rng.random((3, 2, S), np.float32))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.npy")}
    written = sealed({"depends_on": WANTED, "states": S, "noise_sets": 2, "files": hashes})
    (place / "meta.json").write_text(json.dumps(written))
    return place, truth


def test_reference_round_trip(folder, reference):
    got = Reference(Packed(folder), WANTED, 2, "python score.py")
    assert got.S == S
    for k in range(2):
        for index in range(3):
            sides = [got.masks(index, side, k) for side in (0, 1)]
            assert all(np.array_equal(sides[side], reference[1][k, index, side]) for side in (0, 1))
        assert np.array_equal(got.scores[k], np.load(reference[0] / f"ref_scores-{k}.npy"))


@pytest.mark.parametrize(
    "harm, words",
    [
        (remove("noise-1.npy"), ["noise-1.npy"]),
        (write("meta.json", "{"), ["meta.json"]),
        (flip("noise-1.npy", 0), ["noise-1.npy", "as it was written"]),
        (replace("meta.json", ": 10,", ": 11,"), ["as it was written"]),
        (cut("ref_scores-0.npy", -1), ["ref_scores-0.npy"]),
        (cut("noise-0.npy", 0), ["noise-0.npy"]),
        (meta(noise_sets=1), ["holds 1 noise sets", "--noise_sets 2"]),
        (meta(states=17), ["shapes"]),
        (meta(states=9), ["shapes"]),
        (save("noise-0.npy", np.zeros((12, 2), np.uint8)), ["shapes"]),
        (save("ref_scores-1.npy", np.zeros((2, 2, S), np.float32)), ["shapes"]),
    ],
)
def test_broken_reference(folder, reference, harm, words):
    harm(reference[0])
    refused(
        lambda: Reference(Packed(folder), WANTED, 2, "python score.py"), str(reference[0]), *words, "python score.py"
    )


@pytest.mark.parametrize(
    "field, value", [("diffusion_steps", 8), ("noise_seed", 1), ("model", "other"), ("data", "new")]
)
def test_missing_reference_names_the_field(folder, reference, field, value):
    wanted = WANTED | {field: value}
    refused(
        lambda: Reference(Packed(folder), wanted, 1, "python score.py"),
        reference[0].name,
        f"({field} is {WANTED[field]} there and {value} in this run)",
        "python score.py",
    )


def test_missing_reference_names_the_nearest(folder, reference):
    far = folder / "ref-0000"
    far.mkdir()
    (far / "meta.json").write_text(json.dumps({"depends_on": WANTED | {"model": "x", "data": "y"}}))
    refused(lambda: Reference(Packed(folder), WANTED | {"noise_seed": 1}, 1, "score"), reference[0].name, "noise_seed")


def test_unfinished_reference_is_none(folder, reference):
    (reference[0] / "meta.json").unlink()
    refused(
        lambda: Reference(Packed(folder), WANTED, 1, "python score.py"), "holds no reference scores", "python score.py"
    )

"""Tests of packed.py: round trips, bits by hand, every way in which a folder can be broken.

.venv/bin/python -m pytest -q tests/test_packed.py
"""

import hashlib
import json
import os

import numpy as np
import pytest

import files
from files import InputError, replacing, sealed
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


def refused(call, *words):
    with pytest.raises(InputError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def digest(value):
    """packed.fingerprint of one JSON value, as the folders on disk are named."""
    data = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(len(data).to_bytes(8, "little") + data).hexdigest()[:16]


# --- the data ---------------------------------------------------------------------------------------------


def test_round_trip(folder):
    got = Packed(folder)
    assert len(got) == 3 and got.meta | META == got.meta
    assert [tuple(part.tolist() for part in got[i]) for i in range(3)] == PAIRS
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


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size if size >= 0 else (folder / name).stat().st_size + size)


def meta(**change):
    def edit(folder):
        value = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(sealed(value | change)))

    return edit


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda folder: (folder / "meta.json").unlink(), "meta.json"),
        (cut("meta.json", 20), "meta.json"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json"),
        (
            lambda folder: (folder / "meta.json").write_text(
                (folder / "meta.json").read_text().replace("prefs", "prefS")
            ),
            "as it was written",
        ),
        (
            lambda folder: np.save(folder / "tokens.npy", np.load(folder / "tokens.npy") ^ (np.arange(16) == 7)),
            "as it was written",
        ),
        (meta(format=1), "format 1, expected 2"),
        (meta(pairs=2), "disagree"),
        (lambda folder: (folder / "tokens.npy").unlink(), "tokens.npy"),
        (lambda folder: (folder / "bounds.npy").unlink(), "bounds.npy"),
        (cut("tokens.npy", -1), "tokens.npy"),
        (cut("bounds.npy", -8), "bounds.npy"),
        (cut("tokens.npy", 0), "tokens.npy"),
        (cut("tokens.npy", 5), "tokens.npy"),
        (cut("tokens.npy", 40), "tokens.npy"),
        (lambda folder: np.save(folder / "tokens.npy", np.zeros(15, np.uint32)), "disagree"),
        (lambda folder: np.save(folder / "bounds.npy", np.zeros((3, 3), np.int64)), "disagree"),
        (lambda folder: np.save(folder / "tokens.npy", np.array([{}], object)), "tokens.npy"),
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
    for last in range(3):

        def killed(a, b, left=[last]):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(a, b)

        monkeypatch.setattr(os, "replace", killed)
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


# --- the reference ----------------------------------------------------------------------------------------


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
        for index, pair in enumerate(PAIRS):
            for side in (0, 1):
                truth[k, index, side] = rng.random((S, len(pair[1 + side]))) < 0.5
                for i in range(len(pair[1 + side])):
                    word = "".join("01"[int(hidden)] for hidden in truth[k, index, side][:, i]).ljust(16, "0")
                    rows.append([int(word[:8], 2), int(word[8:], 2)])
        np.save(place / f"noise-{k}.npy", np.array(rows, np.uint8))
        np.save(place / f"ref_scores-{k}.npy", rng.random((3, 2, S), np.float32))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in place.glob("*.npy")}
    (place / "meta.json").write_text(
        json.dumps(sealed({"depends_on": WANTED, "states": S, "noise_sets": 2, "files": files}))
    )
    return place, truth


def test_reference_round_trip(folder, reference):
    got = Reference(Packed(folder), WANTED, 2, "python score.py")
    assert got.S == S
    for k in range(2):
        for index in range(3):
            sides = got.masks(index, k)
            assert all(np.array_equal(sides[side], reference[1][k, index, side]) for side in (0, 1))
        assert np.array_equal(got.scores[k], np.load(reference[0] / f"ref_scores-{k}.npy"))


@pytest.mark.parametrize(
    "harm, words",
    [
        (lambda place: (place / "noise-1.npy").unlink(), ["noise-1.npy"]),
        (lambda place: (place / "meta.json").write_text("{"), ["meta.json"]),
        (
            lambda place: np.save(place / "noise-1.npy", np.load(place / "noise-1.npy") ^ np.uint8(1)),
            ["noise-1.npy", "as it was written"],
        ),
        (
            lambda place: (place / "meta.json").write_text((place / "meta.json").read_text().replace(": 10,", ": 11,")),
            ["as it was written"],
        ),
        (cut("ref_scores-0.npy", -1), ["ref_scores-0.npy"]),
        (cut("noise-0.npy", 0), ["noise-0.npy"]),
        (meta(noise_sets=1), ["holds 1 noise sets", "--noise_sets 2"]),
        (meta(states=17), ["shapes"]),
        (meta(states=9), ["shapes"]),
        (lambda place: np.save(place / "noise-0.npy", np.zeros((12, 2), np.uint8)), ["shapes"]),
        (lambda place: np.save(place / "ref_scores-1.npy", np.zeros((2, 2, S), np.float32)), ["shapes"]),
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

"""Tests of data_prep.py: ids against sentencepiece itself, its command line, when packed arrays are used again.

bash tests/run.sh tests/preferences/test_data_prep.py
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from prepared import GOOD, write_rows
from small import EOS, MASK, ROOT, execute, start

import data_prep
import files
from files import InputError
from preferences import packed, reuse
from reasoning import tasks

SHARED = ROOT.parent / "shared" / "data"
STACK_EXCHANGE = "prompt=question,chosen=response_j,rejected=response_k"


def cli(*words):
    return execute([ROOT / "data_prep.py", *words], timeout=120)


# --- the command line ---


def test_cli_packs_what_sentencepiece_says(tiny_dir, tmp_path):
    out = tmp_path / "packed"
    home = {**os.environ, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}
    words = ["--in", str(tiny_dir.parent / "prefs.jsonl"), "--out", str(out), "--model_name_or_path", str(tiny_dir)]
    command = [sys.executable, ROOT / "data_prep.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=home, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tiny_dir.parent / "prefs.jsonl").read_text().splitlines()]
    golden = sentencepiece.SentencePieceProcessor(model_file=str(tiny_dir / "tokenizer.model"))
    got = packed.Packed(out)
    assert len(got) == len(rows) == 300
    for index, row in enumerate(rows):
        ends = ([], [EOS], [EOS])
        for ids, name, end in zip(got[index], ("prompt", "chosen", "rejected"), ends):
            assert ids.tolist() == golden.encode(row[name]) + end
            assert golden.decode(ids[: len(ids) - len(end)].tolist()) == row[name]
    assert np.load(out / "lines.npy").tolist() == list(range(1, 301)) and np.load(out / "lines.npy").dtype == np.int64
    meta = got.meta
    assert meta["end_token_id"] == meta["pad_token_id"] == EOS
    assert meta["mask_token_id"] == MASK and meta["template"] == "none"
    assert meta["source_sha256"] == files.file_sha256(tiny_dir.parent / "prefs.jsonl") and meta["dropped"] == {}
    form, not_read, found, attention, *lines = done.stdout.splitlines()
    assert attention == "attention: bidirectional (model_type llada)"
    assert found == "template: none; mask: <mask> (3); end of a response: </s> (2)"
    assert (
        form == "form: prompt, chosen, rejected"
        and "300 rows, 300 kept, 0 dropped" in lines[0]
        and lines[1].split() == ["tokens", "min", "50%", "90%", "99%", "max"]
    )
    assert [line.split()[0] for line in lines[2:5]] == ["prompt", "chosen", "rejected"]
    assert "|Question|:|" in lines[6] and lines[7].endswith("|</s>|") and "\\n|####|" in lines[7]
    assert lines[-1] == f"next: bash launch.sh ds_configs/zero3_offload_4080.json {' '.join(words)}"
    assert not (tmp_path / "home").exists() or not any(path.is_file() for path in (tmp_path / "home").rglob("*"))


def test_cli_malformed_stops_and_leaves_the_old_packed(tiny_dir, tmp_path):
    out, source = tmp_path / "packed", write_rows(tmp_path / "prefs.jsonl", [GOOD])
    words = "--in", source, "--out", out, "--model_name_or_path", tiny_dir
    data_prep.main([str(word) for word in words])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write_rows(source, [GOOD, "", GOOD | {"chosen": " 12"}, '{"prompt": "x", '])
    done = cli(*words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {source}:4: expected a JSON object, found invalid JSON")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    done = cli(*words, "--on_bad_row", "skip")
    assert done.returncode == 0 and "3 rows, 2 kept, 1 dropped" in done.stdout and "1  malformed" in done.stdout
    reject = json.loads((out / "rejects.jsonl").read_text())
    assert (reject["line"], reject["reason"], reject["text"].strip()) == (4, "malformed", '{"prompt": "x",')
    assert np.load(out / "lines.npy").tolist() == [1, 3]


def test_cli_two_processes_make_the_same(tiny_dir, tmp_path):
    rows = [*tasks.preference_rows(20, "train", 1), GOOD | {"chosen": "  "}, GOOD, GOOD, GOOD | {"prompt": "<mask>?"}]
    source = write_rows(tmp_path / "prefs.jsonl", rows)
    for count in "12":
        done = cli("--in", source, "--out", tmp_path / count, "--model_name_or_path", tiny_dir, "--num_proc", count)
        assert done.returncode == 0 and "arallelism" not in done.stderr, done.stderr
    assert sorted(os.listdir(tmp_path / "1")) == sorted(os.listdir(tmp_path / "2"))
    for name in set(os.listdir(tmp_path / "1")) - {".lock"}:  # which says whose it was
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_workers_end_with_a_killed_job(tiny_dir, tmp_path):
    """Nothing of it stays behind, which would hold its memory and its output open."""
    source = write_rows(tmp_path / "prefs.jsonl", list(tasks.preference_rows(6000, "train", 1)))
    words = ["--in", source, "--out", tmp_path / "out", "--num_proc", 2, "--model_name_or_path", tiny_dir]
    process = start([ROOT / "data_prep.py", *words])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(1)
    process.kill()
    process.communicate(timeout=20)  # its output is closed: no one holds it

    def lives(pid):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"  # dead, but not yet reaped

    deadline = time.time() + 20  # the system's signal may take a moment on a busy machine
    while any(map(lives, found)) and time.time() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in found if lives(pid)]


# --- reuse ---


def test_reuse(prep, tiny_dir, llada_chat_dir, tmp_path, capsys):
    source, folder = tmp_path / "prefs.jsonl", tmp_path / "packed"

    def again(*flags, model=tiny_dir):
        """Whether the folder was found up to date."""
        capsys.readouterr()
        data_prep.main(["--reuse", "--out", str(folder), "--model_name_or_path", str(model), *flags])
        said = capsys.readouterr().out
        assert said == f"{folder}: 1 pairs, up to date\n" or "1 rows, 1 kept" in said
        return "up to date" in said

    missing = "holds no packed preferences, and --in was not given; run: python data_prep.py --in"
    with pytest.raises(InputError, match=missing):
        again()
    prep([GOOD])
    given = "--in", str(source)
    assert again() and again(*given)
    with pytest.raises(InputError, match="made with another tokenizer"):
        again(model=llada_chat_dir)
    for change in (("--max_length", "512"), ("--columns", "prompt=prompt")):
        assert not again(*given, *change) and again(*given, *change)
    assert not again(*given) and again(*given)
    assert not again(*given, model=llada_chat_dir) and again(*given, model=llada_chat_dir)
    assert not again(*given, "--template", "none", model=llada_chat_dir)
    write_rows(source, [GOOD | {"chosen": " 12"}])
    assert not again(*given) and again(*given)
    (folder / "lines.npy").unlink()
    with pytest.raises(InputError, match="lines.npy"):
        again()
    assert not again(*given) and again()
    with pytest.raises(InputError, match="no such file"):
        again("--in", str(tmp_path / "gone.jsonl"))


def test_the_model_when_none_is_given(prep, tiny_dir, llada_chat_dir, tmp_path, capsys, monkeypatch):
    prep([GOOD], model=llada_chat_dir)
    words = "--out", str(tmp_path / "packed")
    data_prep.main(["--reuse", *words])  # the one that packed the folder
    assert capsys.readouterr().out.endswith("1 pairs, up to date\n")
    monkeypatch.setattr(reuse, "EXAMPLE", tiny_dir)
    data_prep.main(["--in", str(tmp_path / "prefs.jsonl"), *words])
    assert Path(packed.Packed(tmp_path / "packed").meta["model_name_or_path"]).resolve() == tiny_dir.resolve()
    monkeypatch.setattr(reuse, "EXAMPLE", tmp_path / "none")
    with pytest.raises(InputError, match="no model given"):
        data_prep.main(["--in", str(tmp_path / "prefs.jsonl"), *words])


# --- real tokenizers and files ---


@pytest.mark.skipif(not (SHARED / "tokenizers").exists(), reason="needs ../shared/data")
def test_a_response_has_no_dummy_prefix_and_a_prompt_one_bos(prep, tiny_dir, tmp_path):
    model, llama = tmp_path / "llama", SHARED / "tokenizers" / "llama_32k_tokenizer.model"
    model.mkdir()
    shutil.copy(llama, model / "tokenizer.model")
    settings = json.loads((tiny_dir / "config.json").read_text())
    settings |= {"vocab_size": 32001, "embedding_size": 32001, "mask_token_id": 32000}
    (model / "config.json").write_text(json.dumps(settings))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False} | tokens
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    got, _ = prep([{"prompt": "How many?", "chosen": "Twelve pens", "rejected": " 11"}], model=model)
    golden = sentencepiece.SentencePieceProcessor(model_file=str(llama))
    prompt, chosen, rejected = got[0]
    assert prompt.tolist() == [golden.bos_id(), *golden.encode("How many?")]
    pieces = [golden.id_to_piece(int(i)) for i in chosen[:-1]]
    assert "".join(pieces) == "Twelve\u2581pens" and chosen[-1] == golden.eos_id()
    assert [golden.id_to_piece(int(i)) for i in rejected[:-1]] == ["\u2581", "1", "1"]
    assert got.meta["mask_token_id"] == 32000


@pytest.mark.skipif(not (SHARED / "prefs").exists(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    "name, model, columns, rows, kept",
    [
        ("hh_rlhf_harmless_test_500.jsonl", "tiny_dir", "", 500, 499),
        ("llamafactory_dpo_en_demo_150.json", "llada_chat_dir", "", 150, 150),
        ("torchtune_stack_exchange_paired_tiny.json", "tiny_dir", STACK_EXCHANGE, 25, 25),
    ],
)
def test_real_files(name, model, columns, rows, kept, request, tmp_path):
    words = "--in", SHARED / "prefs" / name, "--out", tmp_path, "--model_name_or_path", request.getfixturevalue(model)
    flags = ("--columns", columns) if columns else ()
    data_prep.main([*map(str, words), "--max_length", "100000", *flags])
    meta = packed.Packed(tmp_path).meta
    assert meta["rows"] == rows == meta["kept"] + sum(1 for _ in open(tmp_path / "rejects.jsonl"))
    assert meta["kept"] == kept and "malformed" not in meta["dropped"]

"""Tests of report.py, its charts and its page: a real run, written ones, the page as a browser reads it.

bash tests/run.sh tests/reporting/test_report.py
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
from small import ROOT, flags, make_model, make_pairs, pack, refusal, run
from written import HOSTILE, R, Reader, T, page_of, write_run

import files
import report
from models import tokenization
from preferences import packed
from reporting import colours, diagnosis, history, page, pair_charts, scored_pairs, texts
from reporting.page import differ
from training import runs

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def shown(hostile, tiny_dir, tmp_path_factory):
    """The page of a run whose name, texts and skipped pairs are hostile."""
    folder = write_run(
        tmp_path_factory.mktemp("shown") / f"<script>alert(1)</script>$x${'long' * 20}", data=hostile, model=tiny_dir
    )
    skipped = [
        {"step": 1, "pair": HOSTILE, "line": [HOSTILE], "source": HOSTILE, "loss": None},
        {"step": 2, "source": "x" * 300},
    ]
    runs.Run(folder).add(folder / "skipped.jsonl", skipped)
    return page_of(folder)


@pytest.fixture(scope="module")
def trained(tiny_dir, tmp_path_factory):
    """A real run of four steps, evaluated after the second and the last."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs([(5, 4 + i % 7, 3 + i % 5) for i in range(30)]), model)
    argv = [
        "--data",
        data,
        "--deepspeed",
        ROOT / "ds_configs" / "zero0.json",
        *flags(
            use_mixed_precision="no",
            diffusion_steps=T,
            trajectories=R,
            learning_rate=0.01,
            eval_fraction=0.4,
            eval_steps=2,
            max_steps=4,
            gradient_accumulation_steps=2,
            beta=0.5,
        ),
    ]
    run([ROOT / "score.py", *argv])
    run([ROOT / "train_dpo.py", *argv, "--output_dir", folder / "runs" / "a"])
    return SimpleNamespace(folder=folder, run=folder / "runs" / "a", data=data)


# --- a real run -------------------------------------------------------------------------------------------


def test_real_run(trained, capsys):
    """The scores that training wrote make the margins that it logged."""
    page = page_of(trained.run)
    last = json.loads((trained.run / "log.jsonl").read_text().splitlines()[-1])
    found = history.read(trained.run)
    assert found.scored.is_held_out and found.scored.step == 4
    assert found.scored.margin.mean() == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert (found.scored.margin > 0).mean() == pytest.approx(last["eval_rewards/accuracies"])
    assert f"{last['eval_rewards/accuracies']:.3f}" in page
    assert pair_charts.step_rewards(found).sum(-1) == pytest.approx(found.scored.rewards.sum(-1))
    tokenizer = tokenization.load_tokenizer(str(trained.folder / "model"))
    worst = int(found.scored.pair[found.scored.margin.argmin()])
    assert Reader(page).pres[:3] == [
        re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", tokenizer.decode(ids)) for ids in found.packed[worst]
    ]
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and said.splitlines()[-1].startswith(
        f"{trained.run / 'report' / 'report.html'}: "
    )
    charts = {"loss", "accuracy", "margin", "rewards", "logps", "by_step", "by_length"}
    charts |= {"learning_rate", "grad_norm", "speed", "memory"}
    pictures = list((trained.run / "report").glob("*.png"))
    assert {path.stem for path in pictures} == charts | {"summary"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_moved_and_bare(trained, tmp_path):
    """A run's folder that was moved alone has no texts, and says so; with its neighbours it has them."""
    shutil.copytree(trained.folder / "runs", tmp_path / "alone" / "runs")
    record = files.read_json(tmp_path / "alone/runs/a/run.json", "")
    record["arguments"]["data"] = str(tmp_path / "nowhere")
    files.write_json(tmp_path / "alone/runs/a/run.json", files.sealed(record))
    page = page_of(tmp_path / "alone/runs/a")
    assert (
        "are gone or hold other data now" in page
        and not Reader(page).pres
        and "<h3>Margin by response length" not in page
    )
    shutil.copytree(trained.folder, tmp_path / "all")
    assert Reader(page_of(tmp_path / "all/runs/a")).pres


def test_tokenizer_of_the_hub(tiny_dir, hostile, tmp_path, monkeypatch):
    """A model of the hub that is in its cache gives the texts; one that is not is not asked for."""
    asked = []
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *_, **__: asked.append("a file"))
    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", lambda *_, **__: asked.append("a model"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    data = shutil.copytree(hostile, tmp_path / "packed")
    files.write_json(
        data / "meta.json", files.sealed(files.read_json(data / "meta.json", "") | {"model_name_or_path": "org/tiny"})
    )
    folder = write_run(tmp_path / "a", data=data, model="org/tiny", finished=False)
    found = history.read(folder)
    texts.load_tokenizer(found)
    assert found.tokenizer is None and "tokenizer of org/tiny is not on this machine" in found.missing[-1]
    shutil.copytree(tiny_dir, tmp_path / "models--org--tiny" / "snapshots" / "abc")
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    texts.load_tokenizer(found)
    assert texts.of_pair(found, 3)[0] == f"{HOSTILE} 3" and not asked


def test_stopped_going_on_torn(trained, tmp_path):
    folder = shutil.copytree(trained.run, tmp_path / "a")
    shutil.rmtree(folder / "final")
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with open(folder / "scores.jsonl", "a") as file:
        file.write('{"step": 5, "split": "train", "pol')
    page = page_of(folder)
    assert "it ended after step 4 of 4" in page and "1 line(s) of log.jsonl" in page
    with open(folder / ".lock", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert diagnosis.findings(history.read(folder))[0].startswith(
            "The run is not finished: it is running, step 4 of 4"
        )


def test_without_a_step(tmp_path):
    folder = write_run(tmp_path / "a", steps=0, finished=False)
    page = page_of(folder)
    assert "it ended after step 0" in page and "<svg" not in page
    (folder / "log.jsonl").write_text("")
    assert page_of(folder) == page
    (folder / "log.jsonl").write_bytes(b"\x00\xff[]\n{}\n")
    assert "2 line(s)" in page_of(folder)


# --- the page ---------------------------------------------------------------------------------------------


def test_hostile_texts(shown):
    """No text becomes an element; all of it is shown as it is."""
    reader = Reader(shown)
    assert not {"script", "img", "iframe", "object"} & set(reader.tags)
    assert reader.pres[0].startswith(HOSTILE) and reader.pres[1].startswith("a\n  b ")
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]


def test_loads_nothing(shown):
    page, reader = shown, Reader(shown)
    linked = (
        reader.values("href") + reader.values("src") + reader.values("xlink:href") + re.findall(r"url\(([^)]*)\)", page)
    )
    assert linked and all(each.startswith(("#", "data:")) for each in linked)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in reader.attributes
    assert not re.search(r"@import|@font-face", page)


def test_charts_follow_the_theme(shown):
    """Colours are the page's variables, ids are unique, every chart is named, letters are large enough on a phone."""
    page, reader, svgs = shown, Reader(shown), re.findall(r"<svg.*?</svg>", shown, re.DOTALL)
    assert len(svgs) == 11 and not re.search(r"#[0-9a-fA-F]{6}\b", "".join(svgs))
    used = set(re.findall(r"var\(--(\w+)\)", "".join(svgs)))
    style = page[: page.index("</style>")]
    assert {"ink", "soft", "grid", "blue", "orange"} <= used and all(style.count(f"--{name}: #") == 2 for name in used)
    assert len(reader.values("id")) == len(set(reader.values("id")))
    assert all(re.search(r'aria-label="[^"]{20,}"', each[:1500]) for each in svgs)
    widths = {float(re.search(r'viewBox="0 0 ([\d.]+)', each)[1]) for each in svgs}
    sizes = [float(size) for each in svgs for size in re.findall(r"font(?:-size)?: ([\d.]+)px", each)]
    assert widths == {360.0} and sizes and min(sizes) >= 11


def luminance(colour):
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(one, two):
    dark, light = sorted((luminance(one), luminance(two)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_contrast(theme):
    """WCAG's ratio for text, light and dark."""
    paper = getattr(colours.PAPER, theme)
    for colour in set(colours.ALL) - {colours.BACKGROUND, colours.PAPER, colours.GRID}:
        assert contrast(getattr(colour, theme), paper) >= 4.5, (colour, theme)


def test_the_same_twice(hostile, tiny_dir, tmp_path):
    folder = write_run(tmp_path / "a", data=hostile, model=tiny_dir)
    first, second = (page_of(folder, "--out", tmp_path / name) for name in "xy")
    assert first == second
    assert all(
        (tmp_path / "x" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "y").glob("*.png")
    )


def test_several_runs(hostile, tiny_dir, tmp_path):
    """One legend entry each, what differs between them, nothing of the runs' folders but the first's changed."""
    one, two = (
        write_run(tmp_path / "one", data=hostile, model=tiny_dir),
        write_run(tmp_path / "_two", beta=0.25, finished=False),
    )
    page = page_of(one, two)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    loss = re.sub("<[^>]*>", " ", svgs[0])
    assert loss.count("one") == 1 and loss.count("_two") == 1 and "var(--orange)" in svgs[0]
    differs = page[page.index("What differs between the runs") : page.index("The same in all")]
    assert re.findall(r"<tr><td>(\w+)</td>", differs) == ["data", "model_name_or_path", "output_dir", "beta"]
    assert "<td>0.5</td><td>0.25</td>" in differs.replace(" class=number", "")
    assert not (two / "report").exists() and "_two: The run is not finished" in re.sub(r"[^ ]*/_two", "_two", page)


@pytest.mark.skipif(not BROWSER, reason="no chromium here: the page's width is not tried in a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(shown, tmp_path, width):
    """In a browser, the page is as wide as its window, and no letter of a chart leaves it."""
    inner = json.dumps(shown).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(
        f"""<iframe id="page" style="width: {width}px; height: 800px; border: 0"></iframe><p id="said"></p><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const root = frame.contentDocument.documentElement, out = [];
  for (const svg of root.querySelectorAll("svg")) {{
    const box = svg.getBoundingClientRect();
    for (const text of svg.querySelectorAll("text")) {{
      const at = text.getBoundingClientRect();
      if (at.left < box.left - 2 || at.right > box.right + 2) out.push(text.textContent);
    }}
  }}
  const found = {{wide: root.scrollWidth, svgs: root.querySelectorAll("svg").length, out: out}};
  document.getElementById("said").textContent = JSON.stringify(found);
}};
frame.srcdoc = {inner};
</script>""",
        encoding="utf-8",
    )
    dom = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1400,1000",
            "--virtual-time-budget=20000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = json.loads(re.search(r'<p id="said">(.*?)</p>', dom.stdout)[1])
    assert said == {"wide": width, "svgs": 11, "out": []}


@pytest.mark.parametrize(
    "name, values, orders, expected",
    [
        ("estimator", ["radau", "auto"], ["random", "random"], False),
        ("estimator", ["stepwise", "auto"], ["blocks", "blocks"], False),
        ("estimator", ["stepwise", "auto"], ["random", "random"], True),
        ("tokens_per_forward", [700, "auto"], ["random", "random"], False),
        ("tokens_per_forward", [700, 400], ["random", "random"], True),
        ("template", ["none", "auto"], ["random", "random"], True),
    ],
)
def test_an_auto_equals_what_it_is_filled_in_with(name, values, orders, expected):
    assert differ(name, values, orders) == expected


def test_estimator_is_no_difference(tmp_path):
    """A run whose auto was filled in differs neither from the default nor from an SFT run, which leaves it auto."""
    one = write_run(tmp_path / "one", estimator="radau")
    two = write_run(tmp_path / "two", loss_type="sft", estimator="auto", diffusion_steps="auto")
    alone, both = page_of(one), page_of(one, two)
    assert "<td>estimator</td><td>radau</td><td>auto</td>" in alone[alone.index("As by default") :]
    assert "<td>estimator</td><td>radau</td><td>auto</td>" in both[both.index("The same in all") :]


@pytest.fixture
def mount(tmp_path):
    """Mount a file system of our own, with options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("only root can mount a file system")
        return folder

    yield mounted
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


@pytest.mark.parametrize("options, why", [("size=1m", "No space left"), ("ro", "Read-only file system")])
@pytest.mark.parametrize("below", ["", "report"])
def test_folder_that_cannot_be_written(mount, tmp_path, capsys, monkeypatch, options, why, below):
    """A full disk, or no permission: one sentence before anything is drawn, and nothing is left behind."""
    run, disk = write_run(tmp_path / "a", steps=2), mount(options)
    monkeypatch.setattr(report, "write_report", None)
    said = refusal(report.main, capsys, run, "--out", disk / below)
    assert "a report cannot be written there" in said and why in said
    assert not [path for path in disk.rglob("*") if path.is_file()]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path, capsys):
    run = write_run(tmp_path / "a", steps=2)
    run.chmod(0o500)
    assert "name another folder" in refusal(report.main, capsys, run)


def test_tables_of_a_file(tmp_path):
    """--tables: shown above all else, every text escaped, numbers on the right."""
    head, rows = ["stage", "hours"], [[HOSTILE, 1.5], ["<b>", None]]
    found = {"tables": [{"title": "T < U", "note": "", "head": head, "rows": rows}]}
    (tmp_path / "tables.json").write_text(json.dumps(found))
    shown = page_of(write_run(tmp_path / "a", steps=2), "--tables", tmp_path / "tables.json", "--out", tmp_path / "out")
    assert "<h2>T &lt; U</h2>" in shown and "&lt;b&gt;" in shown and "<td class=number>1.5</td>" in shown
    assert "<script" not in shown and shown.index("T &lt; U") < shown.index('aria-label="Overview"')


def test_refusals(tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    (tmp_path / "wrong.json").write_text('{"tables": [{"title": "no rows"}, 3]}')
    assert "expected tables of title" in refusal(report.main, capsys, folder, "--tables", tmp_path / "wrong.json")
    assert "holds no run.json" in refusal(report.main, capsys, tmp_path)
    assert "named twice" in refusal(report.main, capsys, folder, tmp_path / "." / "a")
    assert "at most 6" in refusal(report.main, capsys, *(tmp_path / str(i) for i in range(7)))
    assert "cannot be read" in refusal(report.main, capsys, folder, "--evaluation", tmp_path)
    (tmp_path / "file").write_text("")
    assert "--out" in refusal(report.main, capsys, folder, "--out", tmp_path / "file" / "x")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"beta": 0.5', '"beta": 0.6'))
    assert "not as it was written" in refusal(report.main, capsys, folder)


def test_a_pair_of_several_files_is_shown_with_its_file():
    """One file is named above the pairs, several beside each."""
    rewards = np.zeros((2, 2, 1))
    scored = scored_pairs.Scored(True, 1, np.array([0, 3]), np.array([7, 7]), rewards, None, 0)
    for named, shown in (({"a.jsonl": 5}, "line 7</summary>"), ({"a.jsonl": 2, "b.jsonl": 3}, "line 7 of b.jsonl")):
        reader = packed.Packed.__new__(packed.Packed)
        reader.meta, reader.bounds = {"files": named}, np.zeros((5, 4))
        run = SimpleNamespace(scored=scored, packed=reader, tokenizer=None)
        assert shown in page.pair_of(run, 1, False)

"""Tests of report.py, history.py, diagnosis.py, charts.py, poster.py and page.py: real runs and written ones, the page as a browser reads it.

    .venv/bin/python -m pytest -q tests/test_report.py
"""
import dataclasses
import fcntl
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from small import ROOT, call, flags, make_model, make_pairs, pack, refusal, run

import charts
import config
import data_prep
import diagnosis
import evaluate
import history
import packed
import report
import runs

T, R, S = 3, 2, 5
HOSTILE = "</pre></main><script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \u202e $x_1$ \U0001f600"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Reader(HTMLParser):
    """What a browser makes of a page: elements, attributes, texts of <pre>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.pres, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag == "pre":
            self.inside = True
            self.pres.append("")

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        if self.inside:
            self.pres[-1] += data if self.pres[-1] else data.removeprefix("\n")

    def values(self, name):
        return [value for _, each, value in self.attributes if each == name]


def write_run(folder, steps=40, held=20, data=None, model="gone", finished=True, **changes):
    """A run's folder as train_dpo.py leaves it; margins of pair i by state are (i - 3) / 10 * (1, 2, 3, 2, 3) / 11, before beta."""
    groups = [group() for group in config.GROUPS]
    arguments = {name: value for group in groups for name, value in dataclasses.asdict(group).items()} | {
        "output_dir": str(folder), "data": str(data), "model_name_or_path": str(model), "estimator": "spread", "diffusion_steps": T,
        "trajectories": R, "ranks": 1, "max_steps": steps, "beta": 0.5} | changes
    wanted = packed.read_json(data / "meta.json", "")["fingerprint"] if data else "none"
    run_of = runs.Run(folder)
    run_of.begin(arguments, {"data": wanted}, {"torch": "2"}, steps)
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": round(step * 8 / 96, 4), "loss": 0.7 - 0.001 * step, "learning_rate": 1e-4, "grad_norm": 1.5,
                "skipped": False, "num_tokens": step, "pairs_per_second": 4.0, "tokens_per_second": 1.0, "gpu_peak_gib": None,
                "host_peak_gib": 1.0, "seconds_left": 60.0}
        both = {"loss": line["loss"], "rewards/chosen": 0.01 * step, "rewards/rejected": -0.01 * step, "rewards/margins": 0.02 * step,
                "rewards/accuracies": 0.75, "logps/chosen": -20.0, "logps/rejected": -30.0}
        if arguments["loss_type"] == "sft":
            both = {"loss": line["loss"]}
        line |= both
        if held and step % 10 == 0:
            line |= {f"eval_{name}": value for name, value in both.items()}
            if "rewards/accuracies" in both:
                line["eval_rewards/accuracies_ci95"] = [0.6, 0.9]
        run_of.add(run_of.log_path, [line])
        if arguments["loss_type"] != "sft":
            rows = [(step, "train", (step * 8 + i) % 96) for i in range(8)]
            rows += [(step, "eval", pair) for pair in range(held) if "eval_loss" in line]
            run_of.add(run_of.scores_path, [score_row(*row) for row in rows])
    if finished:
        run_of.final.mkdir()
        (run_of.final / "config.json").write_text("{}")
    return folder


def score_row(step, split, pair, scale=1.0):
    parts = scale * (pair - 3) / 10 * np.array([1, 2, 3, 2, 3]) / 11
    return {"step": step, "split": split, "pair": pair, "line": pair + 1, "policy": [(parts - 1).tolist(), [-2.0] * S],
            "ref": [[-1.0] * S, [-2.0] * S]}


def change_log(folder, change):
    """Rewrite log.jsonl, each line changed by `change`."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page_of(*argv):
    assert call(report.main, *argv) == 0
    out = argv[argv.index("--out") + 1] if "--out" in argv else argv[0] / "report"
    return (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tiny_dir, tmp_path_factory):
    """Packed pairs whose texts are out to break a page."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"prompt": f"{HOSTILE} {i}", "chosen": f"a\n  {'b ' * (i + 1)}", "rejected": f"{HOSTILE} c"} for i in range(20)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call(data_prep.main, "--in", folder / "prefs.jsonl", "--model_name_or_path", tiny_dir, "--out", folder / "packed")
    return folder / "packed"


@pytest.fixture(scope="module")
def shown(hostile, tiny_dir, tmp_path_factory):
    """The page of a run whose name, texts and skipped pairs are hostile."""
    folder = write_run(tmp_path_factory.mktemp("shown") / f"<script>alert(1)</script>$x${'long' * 20}", data=hostile, model=tiny_dir)
    skipped = [{"step": 1, "pair": HOSTILE, "line": [HOSTILE], "source": HOSTILE, "loss": None}, {"step": 2, "source": "x" * 300}]
    runs.Run(folder).add(folder / "skipped.jsonl", skipped)
    return page_of(folder)


@pytest.fixture(scope="module")
def trained(tiny_dir, tmp_path_factory):
    """A real run of four steps, evaluated after the second and the last."""
    folder = tmp_path_factory.mktemp("trained")
    model = make_model(folder / "model", tiny_dir)
    data = pack(folder / "packed", make_pairs([(5, 4 + i % 7, 3 + i % 5) for i in range(30)]), model)
    argv = ["--data", data, "--deepspeed", ROOT / "ds_configs" / "zero0.json", *flags(
        use_mixed_precision="no", diffusion_steps=T, trajectories=R, learning_rate=0.01, eval_fraction=0.4, eval_steps=2, max_steps=4,
        gradient_accumulation_steps=2, beta=0.5)]
    run([ROOT / "score.py", *argv])
    run([ROOT / "train_dpo.py", *argv, "--output_dir", folder / "runs" / "a"])
    return SimpleNamespace(folder=folder, run=folder / "runs" / "a", data=data)


# --- a real run -------------------------------------------------------------------------------------------

def test_real_run(trained, capsys):
    """The scores that training wrote make the margins that it logged."""
    page = page_of(trained.run)
    last = json.loads((trained.run / "log.jsonl").read_text().splitlines()[-1])
    found = history.read(trained.run)
    assert found.scored.held and found.scored.step == 4
    assert found.scored.margin.mean() == pytest.approx(last["eval_rewards/margins"], abs=1e-4)
    assert (found.scored.margin > 0).mean() == pytest.approx(last["eval_rewards/accuracies"])
    assert f"{last['eval_rewards/accuracies']:.3f}" in page
    assert charts.step_rewards(found).sum(-1) == pytest.approx(found.scored.rewards.sum(-1))
    tokenizer = data_prep.checkpoint.load_tokenizer(str(trained.folder / "model"))
    worst = int(found.scored.pair[found.scored.margin.argmin()])
    assert Reader(page).pres[:3] == [re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", tokenizer.decode(ids)) for ids in found.packed[worst]]
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and said.splitlines()[-1].startswith(f"{trained.run / 'report' / 'report.html'}: ")
    pictures = sorted(path.name for path in (trained.run / "report").glob("*.png"))
    assert pictures == sorted(f"{name}.png" for name in (
        "summary", "loss", "accuracy", "margin", "rewards", "logps", "by_step", "by_length", "learning_rate", "grad_norm", "speed", "memory"))
    assert all((trained.run / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_moved_and_bare(trained, tmp_path):
    """A run's folder that was moved alone has no texts, and says so; with its neighbours it has them."""
    shutil.copytree(trained.folder / "runs", tmp_path / "alone" / "runs")
    record = packed.read_json(tmp_path / "alone/runs/a/run.json", "")
    record["arguments"]["data"] = str(tmp_path / "nowhere")
    packed.write_json(tmp_path / "alone/runs/a/run.json", packed.sealed(record))
    page = page_of(tmp_path / "alone/runs/a")
    assert "are gone or hold other data now" in page and not Reader(page).pres and "<h3>Margin by response length" not in page
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
    packed.write_json(data / "meta.json", packed.sealed(packed.read_json(data / "meta.json", "") | {"model_name_or_path": "org/tiny"}))
    folder = write_run(tmp_path / "a", data=data, model="org/tiny", finished=False)
    found = history.read(folder)
    history.load_tokenizer(found)
    assert found.tokenizer is None and "tokenizer of org/tiny is not here" in found.missing[-1]
    shutil.copytree(tiny_dir, tmp_path / "models--org--tiny" / "snapshots" / "abc")
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    history.load_tokenizer(found)
    assert history.texts(found, 3)[0] == f"{HOSTILE} 3" and not asked


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
        assert diagnosis.findings(history.read(folder))[0].startswith("The run is going on: step 4 of 4")


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
    linked = reader.values("href") + reader.values("src") + reader.values("xlink:href") + re.findall(r"url\(([^)]*)\)", page)
    assert linked and all(each.startswith(("#", "data:")) for each in linked)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in reader.attributes
    assert not re.search(r"@import|@font-face", page)


def test_charts_follow_the_theme(shown):
    """Colours are the page's variables, ids are unique, every chart is named, letters are large enough on a phone."""
    page, reader, svgs = shown, Reader(shown), re.findall(r"<svg.*?</svg>", shown, re.DOTALL)
    assert len(svgs) == 11 and not re.search(r"#[0-9a-fA-F]{6}\b", "".join(svgs))
    used = set(re.findall(r"var\(--(\w+)\)", "".join(svgs)))
    style = page[:page.index("</style>")]
    assert {"ink", "soft", "grid", "c0", "c1"} <= used and all(style.count(f"--{name}: #") == 2 for name in used)
    assert len(reader.values("id")) == len(set(reader.values("id")))
    assert all(re.search(r'aria-label="[^"]{20,}"', each[:1500]) for each in svgs)
    widths = {float(re.search(r'viewBox="0 0 ([\d.]+)', each)[1]) for each in svgs}
    sizes = [float(size) for each in svgs for size in re.findall(r"font(?:-size)?: ([\d.]+)px", each)]
    assert widths == {360.0} and sizes and min(sizes) >= 11


def contrast(one, two):
    channels = lambda colour: [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]  # noqa: E731
    linear = lambda value: value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4  # noqa: E731
    light = sorted(np.dot([0.2126, 0.7152, 0.0722], [linear(value) for value in channels(each)]) for each in (one, two))
    return (light[1] + 0.05) / (light[0] + 0.05)


def test_contrast():
    """WCAG's ratio for text, light and dark."""
    for theme in (0, 1):
        paper = charts.COLOURS["paper"][theme]
        for name in charts.COLOURS.keys() - {"paper", "grid"}:
            assert contrast(charts.COLOURS[name][theme], paper) >= 4.5, (name, theme)


def test_the_same_twice(hostile, tiny_dir, tmp_path):
    folder = write_run(tmp_path / "a", data=hostile, model=tiny_dir)
    first, second = (page_of(folder, "--out", tmp_path / name) for name in "xy")
    assert first == second
    assert all((tmp_path / "x" / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "y").glob("*.png"))


def test_several_runs(hostile, tiny_dir, tmp_path):
    """One legend entry each, what differs between them, nothing of the runs' folders but the first's changed."""
    one, two = write_run(tmp_path / "one", data=hostile, model=tiny_dir), write_run(tmp_path / "_two", beta=0.25, finished=False)
    page = page_of(one, two)
    svgs = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    loss = re.sub("<[^>]*>", " ", svgs[0])
    assert loss.count("one") == 1 and loss.count("_two") == 1 and "var(--c1)" in svgs[0]
    differs = page[page.index("What differs between the runs"):page.index("The same in all")]
    assert re.findall(r"<tr><td>(\w+)</td>", differs) == ["data", "model_name_or_path", "output_dir", "beta"]
    assert "<td>0.5</td><td>0.25</td>" in differs.replace(" class=number", "")
    assert not (two / "report").exists() and "_two: The run is unfinished" in re.sub(r"[^ ]*/_two", "_two", page)


@pytest.mark.skipif(not BROWSER, reason="no chromium here: the page's width is not tried in a browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_sideways_scroll(shown, tmp_path, width):
    """In a browser, the page is as wide as its window, and no letter of a chart leaves it."""
    inner = json.dumps(shown).replace("</", "<\\/")
    (tmp_path / "frame.html").write_text(f"""<iframe id="page" style="width: {width}px; height: 800px; border: 0"></iframe><p id="said"></p><script>
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
  document.getElementById("said").textContent = JSON.stringify({{wide: root.scrollWidth, svgs: root.querySelectorAll("svg").length, out: out}});
}};
frame.srcdoc = {inner};
</script>""", encoding="utf-8")
    dom = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                          "--disable-sync", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
                          "--virtual-time-budget=20000", "--dump-dom", (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    said = json.loads(re.search(r'<p id="said">(.*?)</p>', dom.stdout)[1])
    assert said == {"wide": width, "svgs": 11, "out": []}


# --- what is read, what is said ---------------------------------------------------------------------------

def test_last_scores_count(tmp_path):
    """Held-out pairs of the last evaluation; of one that was made twice, the later; none of a step that the log does not have."""
    folder = write_run(tmp_path / "a", held=20)
    with open(folder / "scores.jsonl", "a") as file:
        file.write(json.dumps(score_row(40, "eval", 5, scale=10)) + "\n" + json.dumps(score_row(50, "eval", 6, scale=10)) + "\n{\n")
        bad = score_row(40, "eval", 7)
        bad["policy"][0][0] = None
        file.write(json.dumps(bad) + "\n")
    scored = history.read(folder).scored
    found = dict(zip(scored.pair.tolist(), scored.margin))
    assert len(found) == 19 and scored.unusable == 1 and 7 not in found and scored.line.tolist() == [pair + 1 for pair in scored.pair]
    assert found[5] == pytest.approx(0.5 * 10 * 0.2) and found[6] == pytest.approx(0.5 * 0.3) and found[19] == pytest.approx(0.5 * 1.6)


def test_training_pairs_where_none_is_held_out(tmp_path):
    scored = history.read(write_run(tmp_path / "a", held=0)).scored
    assert not scored.held and sorted(scored.pair.tolist()) == list(range(96))
    assert "training pairs" in page_of(tmp_path / "a")


def test_margin_by_step(tmp_path):
    """States 1, 3 are before step 1 and 2, 4 before step 2 of two trajectories: (1, 2 + 2, 3 + 3) / 11 of the margin."""
    found = history.read(write_run(tmp_path / "a"))
    rewards = charts.step_rewards(found)  # (n, 2, T)
    margin = (rewards[:, 0] - rewards[:, 1]).mean(0)
    assert margin / found.scored.margin.mean() == pytest.approx(np.array([1, 4, 6]) / 11)
    assert charts.step_rewards(history.read(write_run(tmp_path / "b", estimator="elbo"))) is None
    page = page_of(tmp_path / "b")
    assert "<h3>Margin by denoising step" not in page and "levels of elbo are drawn at random" in page


@pytest.mark.parametrize("change, said", [
    (lambda line: line.update({"eval_rewards/accuracies_ci95": [0.4, 0.62]}) if "eval_loss" in line else None, "cannot be told from chance"),
    (lambda line: line.update({"eval_rewards/accuracies_ci95": [0.2, 0.42]}) if "eval_loss" in line else None, "below chance"),
    (lambda line: line.update({"eval_rewards/chosen": -1.0, "eval_rewards/rejected": -2.0}) if "eval_loss" in line else None, "both fall"),
    (lambda line: line.update({"eval_rewards/chosen": -2.0, "eval_rewards/rejected": -1.0}) if "eval_loss" in line else None, "did not fall as far"),
    (lambda line: line.update({"eval_loss": 0.9}) if line["step"] == 40 else None, "Held-out loss was lowest after step 30 (0.6700)"),
    (lambda line: line.update({"skipped": True, "grad_norm": None, "loss": None}) if line["step"] > 37 else None,
     "3 of 40 steps had no finite gradient and changed nothing, the last 3 in a row"),
])
def test_findings(tmp_path, change, said):
    """What is wrong is said; of a sound run, nothing is."""
    folder = write_run(tmp_path / "a")
    missing = history.read(folder).missing
    assert diagnosis.findings(history.read(folder)) == missing
    change_log(folder, change)
    [words] = diagnosis.findings(history.read(folder))[:-len(missing)]
    assert said in words


def test_length_is_found_out(hostile, tiny_dir, tmp_path):
    """Pair i's chosen has more tokens the larger i is, and so has its margin."""
    folder = write_run(tmp_path / "a", data=hostile, model=tiny_dir)
    found = history.read(folder)
    r = np.corrcoef(np.diff(found.packed.bounds[:, 1:3])[:, 0] - np.diff(found.packed.bounds[:, 2:])[:, 0], np.arange(20))[0, 1]
    assert history.correlation(found.scored.longer, found.scored.margin)[0] == pytest.approx(r, abs=1e-6)
    assert any(words.startswith(f"Length explains {r * r:.0%} ") for words in diagnosis.findings(found))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4000))
    drawn = [(a, 0.5 * a + 0.75 ** 0.5 * b) for a, b in zip(np.split(x, 100), np.split(y, 100))]  # of correlation 0.5
    assert 88 <= sum(low < 0.5 < high for _, low, high in (history.correlation(*pairs) for pairs in drawn)) < 100


@pytest.mark.parametrize("chosen, rejected, said", [
    (-0.5, -0.7, "Rejected ones fell further, to -0.700"), (-0.5, -0.2, "rejected ones, at -0.200, did not fall as far"),
    (-0.5, 0.7, "while rejected ones rose, to +0.700"), (-1e-8, -2e-8, None), (0.2, -3, None)])
def test_both_fall(tmp_path, chosen, rejected, said):
    folder = write_run(tmp_path / "a")
    change_log(folder, lambda line: line.update({"eval_rewards/chosen": chosen, "eval_rewards/rejected": rejected}) if "eval_loss" in line else None)
    found = list(diagnosis.both_fall(history.read(folder)))
    assert (found == []) if said is None else said in found[0]


def test_an_evaluation_without_a_finite_loss(tmp_path):
    folder = write_run(tmp_path / "a")
    change_log(folder, lambda line: line.update({"eval_loss": None, "eval_rewards/margins": None}) if line["step"] == 40 else None)
    assert any("evaluation after step 40 has no finite loss" in words for words in diagnosis.findings(history.read(folder)))
    page_of(folder)


def test_ipo_without_its_tokens(tmp_path):
    """Rewards of ipo are per token: without the packed arrays there are none, instead of wrong ones."""
    found = history.read(write_run(tmp_path / "a", loss_type="ipo"))
    assert found.scored is None and any("per token" in words for words in found.missing)
    page_of(tmp_path / "a")


def test_an_adapter_asks_for_no_base(hostile, tiny_dir, tmp_path, monkeypatch):
    """The tokenizer in an adapter's folder would have its base's config read, which may be on the hub."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only=False, **_: (_ for _ in ()).throw(
        OSError("not in the cache") if local_files_only else AssertionError(f"downloads {name}")))
    folder = write_run(tmp_path / "a", data=hostile, model="org/base")
    (folder / "final" / "config.json").unlink()
    (folder / "final" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    found = history.read(folder)
    history.load_tokenizer(found)
    assert found.packed is not None


def test_no_home_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(tmp_path) not in page_of(write_run(tmp_path / "runs" / "a"))


def test_a_run_that_went_on(tmp_path):
    folder = write_run(tmp_path / "a")
    record = packed.read_json(folder / "run.json", "")
    packed.write_json(folder / "run.json", packed.sealed(record | {"starts": record["starts"] + [{"after_step": n, "time": ""} for n in (20, 30)]}))
    assert "The run was stopped and gone on with after step 20, 30." in diagnosis.findings(history.read(folder))


def test_sft(tmp_path):
    page = page_of(write_run(tmp_path / "a", loss_type="sft"))
    assert "held-out loss" in page and len(re.findall("<svg", page)) == 5 and "get most wrong" not in page.replace("gets", "get")


def test_a_long_run(tmp_path):
    """60,000 steps are drawn as means, and said to be, on a page of less than a megabyte."""
    folder = write_run(tmp_path / "a", steps=1)
    line = json.loads((folder / "log.jsonl").read_text())
    rng = np.random.default_rng(0)
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, 60001):
            file.write(json.dumps(line | {"step": step, "epoch": step / 10, "loss": float(rng.random())}) + "\n")
    page = page_of(folder)
    assert "60000 steps, drawn as means of 200" in page and len(page) < 1_000_000
    steps, mean, low, high, size = charts.thin(np.arange(60000), np.arange(60000.0))
    assert len(steps) == 300 and size == 200 and mean[0] == 99.5 and low[1] == 200 and high[1] == 399


def test_evaluation(tmp_path, capsys):
    """evaluate.py's table of the run's final/, found beside the run; items that are judged differently stand first."""
    folder = write_run(tmp_path / "runs" / "a")
    other = tmp_path / "runs" / "compared"
    other.mkdir()
    rows = {model: [{"task": "lm_eval:t", "id": str(i), "model": model, "prompt": f"{HOSTILE} {i}", "response": f"{model} says {i}", "answer": "4",
                     "correct": i != 3 or model == "new"} for i in range(5)] for model in ("new", "old")}
    table = [evaluate.summary("lm_eval:t", model, rows[model], rows["new"] if model == "old" else None)
             | {"file": f"{model}-lm_eval-t.jsonl"} for model in rows]
    for model in rows:
        (other / f"{model}-lm_eval-t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[model]))
    results = {"models": {"new": {"path": os.path.relpath(folder / "final")}, "old": {"path": "examples/tiny"}}, "table": table,
               "files": ["new-lm_eval-t.jsonl", "old-lm_eval-t.jsonl"]}
    (other / "results.json").write_text(json.dumps(results))
    page = page_of(folder)
    assert "1 won, 0 lost, p = 1" in page and "1 of 5 items" in page and "script" not in Reader(page).tags
    assert re.findall(r"item (\d)", page) == ["3", "0", "1", "2", "4"]
    assert os.path.relpath(other / "results.json") in capsys.readouterr().out
    shutil.move(other, tmp_path / "elsewhere")
    assert "item 3" not in page_of(folder) and "item 3" in page_of(folder, "--evaluation", tmp_path / "elsewhere")


def test_refusals(tmp_path, capsys):
    folder = write_run(tmp_path / "a", steps=2)
    assert "holds no run.json" in refusal(report.main, capsys, tmp_path)
    assert "named twice" in refusal(report.main, capsys, folder, tmp_path / "." / "a")
    assert "at most 6" in refusal(report.main, capsys, *(tmp_path / str(i) for i in range(7)))
    assert "cannot be read" in refusal(report.main, capsys, folder, "--evaluation", tmp_path)
    (tmp_path / "file").write_text("")
    assert "--out" in refusal(report.main, capsys, folder, "--out", tmp_path / "file" / "x")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"beta": 0.5', '"beta": 0.6'))
    assert "not as it was written" in refusal(report.main, capsys, folder)

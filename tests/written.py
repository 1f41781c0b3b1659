"""Runs' folders as train_dpo.py leaves them, written in an instant; and what a browser makes of their pages."""

import dataclasses
import json
from html.parser import HTMLParser

import numpy as np
from small import call

import config
import files
import report
from training import runs

T, R, S = 3, 2, 5
HOSTILE = "</pre></main><script>document.title = 'taken'</script><img src=x onerror=alert(1)> & \u202e $x_1$ \U0001f600"


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
    """A run's folder as train_dpo.py leaves it.

    Margins of pair i by state are (i - 3) / 10 * (1, 2, 3, 2, 3) / 11, before beta.
    """
    groups = [group() for group in config.GROUPS]
    arguments = (
        {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
        | {
            "output_dir": str(folder),
            "data": str(data),
            "model_name_or_path": str(model),
            "estimator": "spread",
            "diffusion_steps": T,
            "trajectories": R,
            "ranks": 1,
            "max_steps": steps,
            "beta": 0.5,
        }
        | changes
    )
    wanted = files.read_json(data / "meta.json", "")["fingerprint"] if data else "none"
    run_of = runs.Run(folder)
    run_of.begin(arguments, {"data": wanted}, {"torch": "2"}, steps)
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "epoch": round(step * 8 / 96, 4),
            "loss": 0.7 - 0.001 * step,
            "learning_rate": 1e-4,
            "grad_norm": 1.5,
            "skipped": False,
            "num_tokens": step,
            "pairs_per_second": 4.0,
            "tokens_per_second": 1.0,
            "gpu_peak_gib": None,
            "host_peak_gib": 1.0,
            "seconds_left": 60.0,
        }
        both = {
            "loss": line["loss"],
            "rewards/chosen": 0.01 * step,
            "rewards/rejected": -0.01 * step,
            "rewards/margins": 0.02 * step,
            "rewards/accuracies": 0.75,
            "logps/chosen": -20.0,
            "logps/rejected": -30.0,
        }
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
    return {
        "step": step,
        "split": split,
        "pair": pair,
        "line": pair + 1,
        "policy": [(parts - 1).tolist(), [-2.0] * S],
        "ref": [[-1.0] * S, [-2.0] * S],
    }


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

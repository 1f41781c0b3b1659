"""A run as pictures: report.html, which loads nothing, and the charts as PNG. Several runs are laid over each other.

    runs/NAME/ (run.json, log.jsonl, scores.jsonl), packed/, evaluate.py's results -> runs/NAME/report/ (report.html, *.png)
    python report.py runs/tiny
    python report.py runs/tiny runs/other --out runs/compared/report

summary.png is the report as one picture. A run may be going on or have been killed. history.py reads it, diagnosis.py says what is
worth a sentence, charts.py and poster.py draw, page.py writes.
"""

import os
from pathlib import Path

from cli import exits
from cli.parser import Parser
from files import InputError

MOST = 6  # runs that can be told apart in one chart


def read_arguments(argv=None):
    """Namespace: runs, evaluation, out."""
    parser = Parser([], __doc__)
    read = parser.add_argument_group("what is read")
    read.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, the --output_dir of train_dpo.py; several are laid over each other",
    )
    read.add_argument(
        "--evaluation",
        metavar="FOLDER",
        help="the --output_dir of evaluate.py to show; default: those beside the run that name its final/",
    )
    written = parser.add_argument_group("what is written")
    written.add_argument(
        "--out", metavar="FOLDER", help="folder of report.html and the PNGs; default: RUN/report, of the first run"
    )
    args = parser.parse_args(argv)
    folders = [os.path.realpath(run) for run in args.runs]
    if len(set(folders)) < len(folders):
        raise InputError("a run is named twice; expected different folders")
    if len(folders) > MOST:
        raise InputError(
            f"{len(folders)} runs are named; expected at most {MOST}, which can be told apart in one chart"
        )
    return args


if __name__ == "__main__":
    exits.early(read_arguments)  # answers --help and mistakes before the imports below, which take seconds

from files import replacing
from reporting import charts, diagnosis, history, page, poster


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror}); name another folder") from None
    return folder


def main(argv=None):
    # 1. what is on disk
    args = read_arguments(argv)
    runs = [history.read(run) for run in args.runs]
    evaluations = list({each.path: each for run in runs for each in history.evaluations(run, args.evaluation)}.values())
    for run in runs:
        if run.scored and run.packed:
            history.load_tokenizer(run)
        print(
            f"{run.folder}: {run.state}, {len(run.log['step'])} steps in log.jsonl"
            + (f", {len(run.scored.pair)} {charts.pairs_of(run)}" if run.scored else ""),
            flush=True,
        )
    for each in evaluations:
        print(f"{os.path.relpath(each.path)}: {len(each.table)} lines", flush=True)

    # 2. charts and page
    folder = make_folder(Path(args.out) if args.out else runs[0].folder / "report")
    made = charts.make(runs)
    for name, picture in [("summary", poster.make(runs)), *((chart.name, chart.png) for chart in made)]:
        with replacing(folder / f"{name}.png", "wb") as file:
            file.write(picture)
    with replacing(folder / "report.html") as file:
        file.write(page.write(runs, made, evaluations))

    # 3. the same in words
    for run in runs:
        print(f"{run.name}: " + "; ".join(f"{what} {figure} ({of})" for what, figure, of in diagnosis.headlines(run)))
        for words in diagnosis.findings(run):
            print(f"  {words}")
    print(
        f"{folder / 'report.html'}: the report, beside it {len(made)} charts as PNG, and summary.png, one picture of it",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    exits.run(main)

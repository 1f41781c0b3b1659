"""A run in words and pictures: report.html, which loads nothing, and its charts as PNG. Several runs share the charts.

    runs/NAME/ (run.json, log.jsonl, scores.jsonl), packed/, results of evaluate.py
        -> runs/NAME/report/report.html, *.png; summary.png is the report as one picture
    python report.py runs/tiny
    python report.py runs/tiny runs/other --out runs/compared/report

The run may still be running, or may have been killed. In reporting/, history.py reads it, diagnosis.py finds the words,
charts.py lists the charts, poster.py makes summary.png and page.py the page.
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
        help="folder of a run, the --output_dir of train_dpo.py; several are drawn in the same charts",
    )
    read.add_argument(
        "--evaluation",
        metavar="FOLDER",
        help="the --output_dir of evaluate.py to show; default: those beside the run that name its final/",
    )
    read.add_argument(
        "--tables", metavar="FILE", help="a JSON file of further tables, such as the tables.json of examples/reason.sh"
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

import tempfile

from files import replacing
from reporting import charts, diagnosis, evaluations, history, page, poster, texts

ROOM = 4 << 20  # bytes that a report may take


def make_folder(folder):
    """Make `folder`, and write as much as a report takes into it, before the report is made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise InputError(
            f"--out {folder}: a report cannot be written there ({error.strerror}); free some disk space or name "
            "another folder"
        ) from None
    return folder


def write_report(folder, runs, found, tables=()):
    """Write the charts, summary.png and report.html; found: [Evaluation]; tables: of read_tables().

    Returns the number of charts.
    """
    made = charts.make(runs)
    pictures = {"summary": poster.make(runs, found)} | {chart.name: chart.png for chart in made}
    for name, picture in pictures.items():
        with replacing(folder / f"{name}.png", "wb") as file:
            file.write(picture)
    with replacing(folder / "report.html") as file:
        file.write(page.write(runs, made, found, tables))
    return len(made)


def print_findings(run, found):
    headlines = diagnosis.headlines(run)
    print(f"{run.name}: " + "; ".join(f"{each.what} {each.figure} ({each.note})" for each in headlines))
    for words in diagnosis.findings(run):
        print(f"  {words}")
    for words in diagnosis.not_measured(run, found):
        print(f"  {words} Run:\n  {diagnosis.evaluate_command(run)}")


def main(argv=None):
    # 1. Read what is on disk.
    args = read_arguments(argv)
    runs = [history.read(run) for run in args.runs]
    found = {each.path: each for run in runs for each in evaluations.find(run, args.evaluation)}
    found = list(found.values())
    tables = evaluations.read_tables(args.tables) if args.tables else []
    folder = make_folder(Path(args.out) if args.out else runs[0].folder / "report")
    for run in runs:
        if run.scored and run.packed:
            texts.load_tokenizer(run)
        pairs = f", {len(run.scored.pair)} {run.scored.description}" if run.scored else ""
        print(f"{run.folder}: {run.state}, {len(run.log['step'])} steps in log.jsonl{pairs}", flush=True)
    for each in found:
        print(f"{os.path.relpath(each.path)}: {len(each.table)} lines", flush=True)

    # 2. Write the pictures and the page.
    count = write_report(folder, runs, found, tables)

    # 3. Say the same in words.
    for run in runs:
        print_findings(run, found)
    print(
        f"{folder / 'report.html'}: the report; {count} charts as PNG and summary.png, all in one, are beside it",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    exits.run(main)

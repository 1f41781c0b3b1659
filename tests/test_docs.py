"""Tests of the pages: their commands run, their flags and links exist, and every message of the scripts has its entry.

bash tests/run.sh tests/test_docs.py
"""

import argparse
import ast
import functools
import importlib
import re

import pytest
from small import ROOT, copy_of_the_repository, shell
from test_structure import COMMANDS, ROOMS

import config
from cli import parser
from cli.other_names import OTHER_NAMES

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "bench" / "README.md", ROOT / "ds_configs" / "README.md"]
ELSEWHERE = "## Symptoms"  # what follows is about messages of others, or about none
HOLE = "\0"  # stands for what is filled in when a message is printed

# What is called with a user's sentence: {function or class: the arguments that are sentences}
SAYERS = dict.fromkeys(("InputError", "Malformed", "Tie", "ValueError", "LeftOut", "cannot_check", "downloading"), (0,))
SAYERS |= {"OutOfMemory": (0,), "leave_out": (0,), "refuse_or_leave_out": (3,), "Row": (3,)}
INTERNAL = ("scoring/noise.py", "reasoning/tasks.py")  # their ValueErrors are for programmers, not for users
# {a file that prints f"warning: {words}": (the file, the function that makes the words)}
WORDS_OF = {"training/tracking.py": ("training/guard.py", "falling"), "plan.py": ("training/advice.py", "stuck")}
SCRIPTS = sorted(path for folder in (".", "examples", *ROOMS) for path in (ROOT / folder).glob("*.py"))
SHELLS = sorted((*ROOT.glob("*.sh"), *(ROOT / "examples").glob("*.sh")))


# --- messages ---------------------------------------------------------------------------------------------


def texts(node):
    """Every text that an expression may be, HOLE for what is not literal."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [HOLE]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [left + right for left in texts(node.left) for right in texts(node.right)]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return [HOLE]


def words(text):
    return re.findall(r"[A-Za-z_-]{2,}", text)


def strings(tree):
    """The strings of a tree, an f-string as one and not its pieces too."""
    f_strings = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    pieces = {id(piece) for node in f_strings for piece in node.values}
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in pieces]
    return f_strings + plain


def sentences(function):
    """[(variable, text)] of the sentences that a function assigns; the variable is "" for what it returns."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found += [(node.targets[0].id, text) for text in texts(node.value)]
        elif isinstance(node, ast.Return) and node.value:
            found += [("", text) for text in texts(node.value)]
    return [(name, text) for name, text in found if len(words(text)) > 3 and not text.startswith("python ")]


def inside(expression, function, functions):
    """Sentences that a message takes from variables of its function, and from what functions of its file return."""
    names = {getattr(node, "id", None) for node in ast.walk(expression)}
    found = [text for name, text in sentences(function) if name in names]
    for other in functions:
        if other.name in names:
            found += [text for name, text in sentences(other) if not name]
    return found


def said_by(function, functions):
    """Yields (line, text) of the messages of one function; functions: all of its file."""
    for node in ast.walk(function):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            for sentence in [node.args[place] for place in SAYERS.get(name, ()) if place < len(node.args)]:
                for text in [*texts(sentence), *inside(sentence, function, functions)]:
                    yield node.lineno, text
    for node in strings(function):
        for warning in texts(node):
            if warning.startswith("warning: "):
                for text in [warning, *inside(node, function, functions)]:
                    yield node.lineno, text


def warnings_made_by(function):
    """Yields (line, text) of the sentences that a function of WORDS_OF returns, yields or appends."""
    for node in ast.walk(function):
        made = node.args if isinstance(node, ast.Call) else []
        if isinstance(node, (ast.Return, ast.Yield)):
            made = [node.value]
        for value in made:
            for text in texts(value):
                if len(words(text)) > 5:
                    yield node.lineno, text


def said_in(path):
    """Yields (line, text) of the messages of a Python file."""
    source = path.read_text(encoding="utf-8")
    tree, lines, name = ast.parse(source), source.splitlines(), str(path.relative_to(ROOT))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for line, text in said_by(function, functions):
            if not (name in INTERNAL and "ValueError" in lines[line - 1]):
                yield line, text
        if (name, function.name) in WORDS_OF.values():
            yield from warnings_made_by(function)


def said_in_shell(path):
    """Yields (line, text) of the messages of a shell script."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}|\$[\w*]+", HOLE, line)
        for text in re.findall(r'\bdie "([^"]*)"', line):
            yield number, text.replace("\\", "")


@functools.cache
def messages():
    """{"FILE:LINE": [text]} of every error and warning of the scripts."""
    found = {}
    for path in [*SCRIPTS, *SHELLS]:
        for line, text in said_in(path) if path.suffix == ".py" else said_in_shell(path):
            if len(words(text)) > 1 or text.isalpha():
                found.setdefault(f"{path.relative_to(ROOT)}:{line}", []).append(" ".join(text.split()))
    return found


def entries():
    """The patterns of docs/troubleshooting.md: texts in backticks in the first cells of its tables."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in text.partition(ELSEWHERE)[0].splitlines() if line.startswith("| ")]
    return [pattern for cell in cells for pattern in re.findall(r"`([^`]+)`", cell)]


def covers(pattern, message):
    """Whether a pattern is about a message. <...> stands for a value; a pattern of few letters must match all of it."""
    parts = re.split(r"(<[^>]*>)", pattern)
    value = f"[\"']?{HOLE}+[\"']?"
    expression = "".join(value if part.startswith("<") else re.escape(part) for part in parts)
    expression = expression.replace(rf"\-\-{value}", f"--({value}|[a-z_]+)")  # --<name>: any flag
    letters = sum(map(str.isalpha, "".join(parts[::2])))
    return bool(re.search(expression, message) if letters >= 10 else re.fullmatch(expression, message))


def lacking(found, patterns):
    """For each message without a pattern, the line that its author should add to docs/troubleshooting.md."""
    return [
        f"{place}: | `{text.replace(HOLE, '<...>')}` | when it is said | what to do |"
        for place, said in sorted(found.items())
        for text in dict.fromkeys(said)
        if not any(covers(pattern, text) for pattern in patterns)
    ]


def test_what_covers_what():
    """A pattern is about messages of its words alone, and lacking() tells an author of one that has none."""
    assert covers("holds <n> noise sets", f"{HOLE}: holds {HOLE} noise sets, --noise_sets {HOLE} were asked for")
    assert covers("expected a column <name>", f"expected a column '{HOLE}'")
    assert not covers("expected a column <name>", "expected a column of text")
    assert covers("--<name> is <value>, expected more than 0", f"--beta is {HOLE}, expected more than 0")
    assert covers("too long", "too long") and not covers("too long", "a pair is too long for this")
    assert lacking({"x.py:3": [f"the {HOLE} sank"]}, entries()) == [
        "x.py:3: | `the <...> sank` | when it is said | what to do |"
    ]


def test_every_message_has_an_entry():
    """The failure shows the rows that docs/troubleshooting.md lacks. A row may shorten a message to some words."""
    lines = lacking(messages(), entries())
    assert not lines, f"docs/troubleshooting.md lacks {len(lines)}:\n" + "\n".join(lines)


def test_no_entry_is_about_a_message_that_is_gone():
    said = [text for each in messages().values() for text in each]
    for pattern in entries():
        assert any(covers(pattern, text) for text in said), pattern


def test_a_warning_says_words_that_are_found():
    """print(f"warning: {words}") hides its words from this test: WORDS_OF must name the function that makes them."""
    bare = set()
    for path in SCRIPTS:
        for node in strings(ast.parse(path.read_text(encoding="utf-8"))):
            if any(re.fullmatch(f"warning: {HOLE}+", text) for text in texts(node)):
                bare.add(str(path.relative_to(ROOT)))
    assert bare == WORDS_OF.keys()


# --- links ------------------------------------------------------------------------------------------------

OUTSIDE = (
    r"https://arxiv\.org/abs/\d{4}\.\d{5}",
    r"https://github\.com/[\w.-]+/[\w.-]+(/(blob|tree|issues)/[\w./-]+)?",
    r"https://huggingface\.co/[\w./-]+",
)


def prose(page):
    """A page's text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.*)$", prose(page), re.M)
    return {re.sub(r"[^\w -]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    """Relative ones lead to a file, and to a heading in it; others are of a known form (nothing is fetched)."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        if "://" in target:
            assert any(re.fullmatch(form, target) for form in OUTSIDE), target
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


# --- commands and flags -----------------------------------------------------------------------------------

# Commands whose flags are not ours.
FOREIGN = "pip hf apt find trl ssh nvcc deepspeed tensorboard docker sbatch wsl".split()
LAUNCH = {"--num_gpus", "--on_oom", "--check", "--setup", "--help", "--reuse"}  # flags of launch.sh itself
PLANNED = [["plan", "--for", "evaluate"], ["plan", "--for", "make_prefs"]]  # plan.py's other parsers
SHELL = {"examples/improve.sh": {"--rounds"}, "tests/run.sh": {"--all"}}
LM_EVAL = {"--model", "--model_args", "--tasks", "--limit", "--apply_chat_template", "--use_cache", "--num_fewshot"}


class Read(Exception):
    """Raised instead of reading arguments, with the parser that would have read them."""


@pytest.fixture(scope="module")
def flags():
    """{script: the flags that its own parser takes}; lm_eval's flags are passed on by reasoning/harness.py."""
    found = {"reasoning/harness.py": LM_EVAL} | SHELL

    def caught(of_script, *_):
        raise Read(of_script)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parser.Parser, "read", caught)
        patch.setattr(parser.Parser, "parse_args", caught)
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        for name, *words in [*([name] for name in COMMANDS), *PLANNED]:
            with pytest.raises(Read) as read:
                importlib.import_module(name).main(words)
            found[f"{name}.py"] = found.get(f"{name}.py", set()) | options(read.value.args[0])
        patch.syspath_prepend(str(ROOT / "examples"))
        with pytest.raises(Read) as read:
            importlib.import_module("reason").main(["tiny"])
        found["examples/reason.sh"] = options(read.value.args[0])
    found["launch.sh"] = LAUNCH.union(*(found[name] for name in ("data_prep.py", "score.py", "train_dpo.py")))
    for path in (*ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")):
        named = re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8"))
        found[str(path.relative_to(ROOT))] = {"--help", *named}
    return found


def options(of_script):
    """All flags of a parser and of its subcommands."""
    found = set()
    for action in of_script._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(options, action.choices.values()))
    return found


def spoken(page):
    """The commands and code spans of a page: the lines of its blocks, and what stands in backticks on one line."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```(?:bash|)\n(.*?)^ *```", text, re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_flags(page, flags):
    """Every --flag that a page speaks of exists: of a command, in that script; by itself, in one of them."""
    every = set().union(*flags.values())
    for said in spoken(page):
        script = re.search(r"\b(?:python|bash)\d? ([\w/]+\.(?:py|sh))", said)
        if said.split(" ")[0] in FOREIGN or "deepspeed.checkpoint" in said:
            continue
        known = flags[script[1]] if script and script[1] in flags else every
        assert not (wrong := set(re.findall(r"(?<![\w-])--[a-z]\w*", said)) - known), f"{said}: {sorted(wrong)}"


def test_names_of_other_software(flags):
    """Each is on the page of migration, and what the message says to write exists."""
    page = set(re.findall(r"\w+", (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")))
    every = set().union(*(flags[f"{name}.py"] for name in COMMANDS))
    for name, instead in OTHER_NAMES.items():
        assert name in page and set(re.findall(r"--\w+", instead)) <= every and f"--{name}" not in every, name


def test_yaml_blocks(tmp_path):
    """Every YAML block of the pages is a file for --config_file."""
    for page in DOCS:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            (tmp_path / "run.yaml").write_text(block)
            config.parse(["--config_file", str(tmp_path / "run.yaml")], "", *config.GROUPS)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.long)], ids=["forked", "fresh"])
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_commands(page, fresh, tmp_path):
    """The commands of a page run, in order, in a copy of the repository."""
    copy_of_the_repository(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    for block in blocks:
        for command in filter(str.strip, block.replace("\\\n", " ").splitlines()):
            done = shell(command, tmp_path, fresh)
            assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"

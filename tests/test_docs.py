"""Tests of the pages: their commands run, their flags and links exist, and every message of the scripts has its entry.

bash tests/run.sh tests/test_docs.py
"""

import argparse
import ast
import functools
import importlib
import re
import subprocess
from pathlib import Path

import pytest
from small import shell

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "bench" / "README.md", ROOT / "ds_configs" / "README.md"]
ELSEWHERE = "## Symptoms"  # from here on the page is about what others print, or nobody
HOLE = "\0"  # in a message, what is filled in when it is said

# who is handed a user's sentence, and as which argument
SAYERS = {"InputError": 0, "Malformed": 0, "LeftOut": 0, "leave_out": 0, "ValueError": 0, "cannot_check": 0}
SAYERS |= {"downloading": 0, "refuse_or_leave_out": 3}
INTERNAL = ("diffusion.py", "tasks.py")  # their ValueErrors are ours to hear, not a user's
# functions that make the words of a print(f"warning: {words}"), by the file that prints them; None: a sayer of SAYERS makes them
WORDS_OF = {"tracking.py": ("guard.py", "falling"), "plan.py": ("plan.py", "stuck")}
SCRIPTS = sorted(path for path in (*ROOT.glob("*.py"), *(ROOT / "examples").glob("*.py")))
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


def whole(tree):
    """The strings of a tree, an f-string as one and not its pieces too."""
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    return [
        node for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in pieces
    ]


def sources_of(function):
    """[(variable, or "" for what is returned; text)]: the sentences that a function gives to its variables, and gives back."""
    found = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found += [(node.targets[0].id, text) for text in texts(node.value)]
        elif isinstance(node, ast.Return) and node.value:
            found += [("", text) for text in texts(node.value)]
    return [(name, text) for name, text in found if len(words(text)) > 3 and not text.startswith("python ")]


def inside(expression, local, functions):
    """Sentences that a message takes from variables, and from functions of its file."""
    names = {getattr(node, "id", None) for node in ast.walk(expression)}
    yield from (text for name, text in local if name in names)
    yield from (
        text for function in functions if function.name in names for name, text in sources_of(function) if not name
    )


def of_function(function, functions):
    """Yields (line, text) of what one function says in a sentence."""
    local = [(name, text) for name, text in sources_of(function) if name]
    for node in ast.walk(function):
        said = None
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            place = {**SAYERS, "Row": 3}.get(name)
            said = node.args[place] if place is not None and len(node.args) > place else None
        if said is not None:
            yield from ((node.lineno, text) for text in (*texts(said), *inside(said, local, functions)))
    for node in whole(function):
        for text in texts(node):
            if text.startswith("warning: "):
                yield from ((node.lineno, each) for each in (text, *inside(node, local, functions)))


@functools.cache
def messages():
    """{"FILE:LINE": [text]} of everything that the scripts say to their users in anger."""
    found = {}

    def add(path, line, text):
        if len(words(text)) > 1 or text.isalpha():
            found.setdefault(f"{path.relative_to(ROOT)}:{line}", []).append(" ".join(text.split()))

    makers = [each for each in WORDS_OF.values() if each]
    for path in SCRIPTS:
        source = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(source), source.splitlines()
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for line, text in of_function(function, functions):
                if not (path.name in INTERNAL and "ValueError" in lines[line - 1]):
                    add(path, line, text)
            if (path.name, function.name) in makers:
                for node in ast.walk(function):  # said.append(...), return ...
                    made = (
                        node.args
                        if isinstance(node, ast.Call)
                        else [node.value]
                        if isinstance(node, ast.Return)
                        else []
                    )
                    for text in [text for each in made for text in texts(each) if len(words(text)) > 5]:
                        add(path, node.lineno, text)
    for path in SHELLS:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)|\$\{[^}]*\}|\$[\w*]+", HOLE, line)
            for text in re.findall(r'\bdie "([^"]*)"', line):
                add(path, number, text.replace("\\", ""))
    return found


def entries():
    """The patterns of docs/troubleshooting.md's tables: the texts in backticks of first cells, <...> for what is filled in."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in text.partition(ELSEWHERE)[0].splitlines() if line.startswith("| ")]
    return [pattern for cell in cells for pattern in re.findall(r"`([^`]+)`", cell)]


def covers(pattern, message):
    """Whether a pattern is about a message: <...> stands for what is filled in. One of few letters must be all of the message."""
    parts = re.split(r"(<[^>]*>)", pattern)
    value = f"[\"']?{HOLE}+[\"']?"
    expression = "".join(value if part.startswith("<") else re.escape(part) for part in parts)
    expression = expression.replace(rf"\-\-{value}", f"--({value}|[a-z_]+)")  # --<name>: any flag
    letters = sum(map(str.isalpha, "".join(parts[::2])))
    return bool(re.search(expression, message) if letters >= 10 else re.fullmatch(expression, message))


def lacking(found, patterns):
    """Lines for an author: where a message is, and the pattern that would be about it."""
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
    """An author who adds a message finds here the row that docs/troubleshooting.md wants; its words may be shortened to those
    that a reader would search for, ten letters of them."""
    assert not (lines := lacking(messages(), entries())), f"docs/troubleshooting.md lacks {len(lines)}:\n" + "\n".join(
        lines
    )


def test_no_entry_is_about_a_message_that_is_gone():
    said = [text for each in messages().values() for text in each]
    assert not [pattern for pattern in entries() if not any(covers(pattern, text) for text in said)]


def test_a_warning_says_words_that_are_found():
    """print(f"warning: {words}") hides its words from this test: WORDS_OF must name the function that makes them."""
    bare = {
        path.name
        for path in SCRIPTS
        for node in whole(ast.parse(path.read_text(encoding="utf-8")))
        for text in texts(node)
        if re.fullmatch(f"warning: {HOLE}+", text)
    }
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

FOREIGN = (
    "pip",
    "hf",
    "apt",
    "find",
    "trl",
    "ssh",
    "nvcc",
    "deepspeed",
    "tensorboard",
)  # commands whose flags are not ours
# what no parser of ours holds: of launch.sh and examples/improve.sh; lm_eval's own, which evaluate.py passes on
SHELL_FLAGS = {"--num_gpus", "--setup", "--help", "--rounds", "--reuse"}
LM_EVAL = {"--model", "--model_args", "--tasks", "--limit", "--apply_chat_template", "--use_cache", "--num_fewshot"}


class Read(Exception):
    """The parser of a script, caught in the act."""


@pytest.fixture(scope="module")
def flags():
    """{script: the flags that its own parser takes}."""
    import config

    found = {"launch.sh": set(), "examples/improve.sh": SHELL_FLAGS, "harness.py": LM_EVAL, "tests/run.sh": set()}

    def caught(parser, *_, **__):
        raise Read(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "read", caught)
        patch.setattr(argparse.ArgumentParser, "parse_args", caught)
        for path in ROOT.glob("*.py"):
            source = path.read_text(encoding="utf-8")
            if path.name != "harness.py" and 'if __name__ == "__main__"' in source and "def main(argv=None)" in source:
                try:
                    importlib.import_module(path.stem).main([*(["--in", "x"] if path.name == "data_prep.py" else [])])
                except Read as read:
                    found[path.name] = options(read.args[0])
    found["launch.sh"] = SHELL_FLAGS | set().union(
        *(found[name] for name in ("data_prep.py", "score.py", "train_dpo.py"))
    )
    found["data_prep.py"] |= {"--reuse"}
    for path in (*ROOT.glob("bench/*.py"), *ROOT.glob("examples/*.py")):
        found[str(path.relative_to(ROOT))] = set(re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8"))) | {
            "--help"
        }
    return found


def options(parser):
    """All flags of a parser, those of its subcommands too."""
    groups = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    below = [each for choices in groups for each in choices.values()]
    return {name for action in parser._actions for name in action.option_strings}.union(*map(options, below))


def spoken(page):
    """The commands and code spans of a page: the lines of its blocks, and what stands in backticks, on one line each."""
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


def test_yaml_blocks(tmp_path):
    """Every YAML block of the pages is a file for --config_file."""
    import config

    for page in DOCS:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            (tmp_path / "run.yaml").write_text(block)
            config.parse(["--config_file", str(tmp_path / "run.yaml")], "", *config.GROUPS)


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_commands(page, tmp_path):
    """The commands of a page run, in order, in a copy of the repository as a newcomer has it."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, names.stdout.split("\n")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    for command in [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]:
        done = shell(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"

"""A YAML file of arguments, turned into flags, so that argparse checks their types as on the command line."""

import os
from collections import Counter
from pathlib import Path

import yaml

from cli.parser import instead_of
from files import InputError

piped = {}  # {path: text} of read_text()


class Loader(yaml.BaseLoader):
    """Reads every value as a string, since YAML reads no as false, and refuses a name that occurs twice."""

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.most_common(1):
            if times > 1:
                problem = f"{shown(name)} occurs twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def shown(name):
    """A name read from a file, safe to print on one line."""
    return name[:80] if name.isprintable() else repr(name[:80])


def read_text(path):
    """The text of a file. A pipe can be read once alone, and arguments are read twice: its text is kept."""
    if path not in piped:
        text = Path(path).read_text(encoding="utf-8")
        if os.path.isfile(path):
            return text
        piped[path] = text
    return piped[path]


def yaml_as_flags(path, known, of_training=()):
    """The entries of the YAML file at `path` as flags: ["--beta=0.2", ...].

    known: the names that it may have. of_training: names of the training commands, to tell a preset from a misspelling.
    """
    try:
        entries = yaml.load(read_text(path), Loader)
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if entries in (None, ""):
        return []
    if not isinstance(entries, dict):
        raise InputError(f"{path}: expected lines of 'name: value'")
    flags = []
    for name, value in entries.items():
        if name not in known and name in of_training:
            raise InputError(
                f"{path}: {name} is an argument of the training commands, which this file is for; leave --config_file "
                "out and give this command's own flags (--help lists them)"
            )
        if name not in known:
            raise InputError(f"{path}: unknown argument {shown(name)}{instead_of(name, sorted(known))}")
        if not isinstance(value, str):  # not shown: a few aliases of aliases would fill the screen, and memory
            kind = "list" if isinstance(value, list) else "mapping"
            raise InputError(f"{path}: {name} holds a {kind}, expected one value")
        if any(letter < " " or "\ud800" <= letter < "\ue000" for letter in value):
            raise InputError(f"{path}: {name} is {shown(value)}, expected one line of text")
        if value not in ("", "null", "~"):
            flags.append(f"--{name}={value}")
    return flags

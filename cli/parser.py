"""argparse over dataclasses: a field is a flag, with its type, default, help and heading.

    @dataclass
    class Arguments:
        beta: float = arg(0.1, "temperature of the loss", heading="Loss")

    [arguments] = Parser([Arguments], "docstring of the command").read(["--beta", "0.2"])

Command lines that HfArgumentParser takes are taken: --a_b and --a-b, a truth value with or without a word, --no_NAME.
It is not used because it imports transformers, which takes seconds.
"""

import difflib
import re
import shutil
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from dataclasses import field, fields
from typing import Literal, Union, get_args, get_origin

from cli.other_names import OTHER_NAMES
from files import InputError

LISTED = "--help lists them, docs/migrating.md has TRL's names"
TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


def arg(default, help, *aliases, metavar=None, heading=None):
    """A dataclass field that is a flag.

    help: what --help says of it. aliases: other names of the flag, such as --in. metavar: what --help calls its value.
    heading: under which it stands in --help, and the fields after it.
    """
    settings = {"help": help, "aliases": list(aliases), "metavar": metavar, "heading": heading}
    return field(default=default, metadata=settings)


def names(*groups):
    """The names of all fields of dataclasses."""
    return {item.name for group in groups for item in fields(group)}


def number_or_auto(text):
    """The type of an argument that is a number or the word auto."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text} is neither a number nor auto") from None


def truth(text):
    """The type of an argument that is true or false."""
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise ArgumentTypeError(f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0")


METAVARS = {int: "N", float: "X", truth: "true|false", number_or_auto: "N|auto"}  # what --help calls a value


class WithCommas(Action):
    """An argument of several values, with commas as we write them or with spaces as HfArgumentParser reads lists."""

    def __init__(self, *flags, convert, **settings):
        super().__init__(*flags, **settings)
        self.convert = convert  # the type of the whole value

    def __call__(self, parser, found, words, flag=None):
        try:
            setattr(found, self.dest, self.convert(",".join(words)))
        except ArgumentTypeError as error:
            raise ArgumentError(self, str(error)) from None


class Parser(ArgumentParser):
    """One flag a field of each dataclass in `groups`. A mistake is an InputError, and --help has headings.

    doc: the command's docstring. Its first line stands above the arguments, its commands below them.
    """

    def __init__(self, groups, doc):
        self.groups, self.place = groups, None  # place: the heading that arguments are added under
        self.suggested = []  # flags that a message about an unknown one may name, whether or not --help shows them
        super().__init__(allow_abbrev=False, usage=SUPPRESS, **described(doc))
        for group in groups:
            for item in fields(group):
                self.add_field(item)

    def add_field(self, item):
        """Add the flag of one dataclass field."""
        settings = dict(item.metadata)
        flags = [f"--{item.name}", *settings.pop("aliases")]
        dashed = [flag.replace("_", "-") for flag in flags if "_" in flag]
        kind, many = flag_type(item.type)
        settings.update(default=item.default, dest=item.name)
        if get_origin(kind) is Literal:
            settings.update(choices=get_args(kind), type=str)
        elif kind is bool:
            settings.update(type=truth, nargs="?", const=True)
        elif str(settings["metavar"]).endswith(",..."):
            settings.update(action=WithCommas, convert=kind, nargs="+")
        else:
            settings.update(type=kind, nargs="+" if many else None)
        self.add_argument(*flags, *dashed, **settings)
        if kind is bool and item.default is True:
            spellings = [f"--no_{item.name}", f"--no-{item.name.replace('_', '-')}"]
            self.add_argument(*spellings, dest=item.name, action="store_false", help=SUPPRESS, default=SUPPRESS)

    def add_argument(self, *flags, heading=None, **settings):
        """argparse's add_argument, under a heading. Only the first spelling of a flag is shown."""
        if heading:
            titles = {group.title: group for group in self._action_groups}
            self.place = titles.get(heading) or self.add_argument_group(heading)
        action = (self.place or super()).add_argument(*flags, **settings)
        if action.option_strings:
            action.option_strings = [flag for flag in flags if "-" not in flag[2:]]
        if action.help != SUPPRESS:
            self.suggested += action.option_strings
        if action.help != SUPPRESS and action.default not in (None, SUPPRESS):
            value = action.default
            action.help += f" (default: {str(value).lower() if isinstance(value, bool) else value})"
        if not action.choices and not action.metavar:
            action.metavar = METAVARS.get(action.type)
        return action

    def hide(self, names):
        """Leave these arguments out of --help."""
        for action in self._actions:
            if action.dest in names:
                action.help = SUPPRESS

    def parse_args(self, flags=None, found=None):
        """argparse's, for flags that are known and are given once each. found: a Namespace that they are added to."""
        flags = sys.argv[1:] if flags is None else flags
        self.refuse_twice(flags)
        found, unknown = self.parse_known_args(flags, found)
        if unknown:
            name = unknown[0].split("=")[0]
            raise InputError(f"unknown argument {unknown[0]}{instead_of(name, self.suggested)}")
        return found

    def refuse_twice(self, flags):
        """Refuse an argument that is given twice, by whatever spelling: argparse would take the last silently."""
        given = {}
        for flag in (word.split("=")[0] for word in flags if word.startswith("-")):
            if action := self._option_string_actions.get(flag):
                if first := given.get(action.dest):
                    both = "" if first == flag else f" ({first} and {flag})"
                    raise InputError(f"--{action.dest} is given twice{both}; leave one out")
                given[action.dest] = flag

    def read(self, flags, found=None):
        """One instance of each dataclass. Raises InputError for a flag that is unknown or has no meaning.

        found: a Namespace of parse_args(), over which the flags win.
        """
        found = self.parse_args(flags, found)
        made = []
        for group in self.groups:
            made.append(group(**{name: getattr(found, name) for name in names(group)}))
        return made

    def _print_message(self, message, file=None):
        """argparse's, which would ignore that standard output is full."""
        print(message, end="", file=file)

    def error(self, message):
        raise InputError(f"{message}; --help lists the arguments")


def flag_type(hint):
    """(type of one value, whether the flag takes several) of a field's type hint."""
    if get_origin(hint) is Union:  # Optional[...]
        hint = next(each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    return hint, False


def described(doc):
    """ArgumentParser's arguments for a docstring: its first line as the description, its commands at the end."""
    width = shutil.get_terminal_size().columns - 2
    title = "try it in this folder (python is .venv/bin/python; bash launch.sh --setup makes it):"
    commands = [line.strip() for line in doc.splitlines() if line.startswith(("    python ", "    pip "))]
    return {
        "description": textwrap.fill(doc.partition("\n")[0], width),
        "formatter_class": RawDescriptionHelpFormatter,
        "epilog": "\n  ".join([textwrap.fill(title, width), *(folded(command, width - 6) for command in commands)]),
    }


def folded(command, width):
    """A command on several lines, broken before flags only."""
    glued = command.replace(" ", "\0").replace("\0--", " --")
    lines = textwrap.wrap(glued, width, break_long_words=False, break_on_hyphens=False)
    return " \\\n      ".join(lines).replace("\0", " ")


def instead_of(name, known):
    """The end of a sentence about an unknown argument, a flag or an entry of a YAML file: what to write instead.

    known: the names that may be said. What other software calls a name is said only if what it stands for is known.
    """
    instead = OTHER_NAMES.get(name.removeprefix("--").replace("-", "_"))
    if instead is None:
        return nearest(name, known, LISTED)
    if not name.startswith("-"):
        instead = instead.replace("--", "")
        flags = []
    else:
        flags = re.findall(r"--\w+", instead)
    return f"; {LISTED if set(flags) - set(known) else instead}"


def nearest(word, known, otherwise, cutoff=0.72):
    """The end of a sentence about an unknown name: the known one that it alone abbreviates, or the nearest."""
    longer = [each for each in known if each.startswith(word)]
    found = longer if len(longer) == 1 else difflib.get_close_matches(word, known, 1, cutoff)
    return f"; did you mean {found[0]}?" if found else f"; {otherwise}"

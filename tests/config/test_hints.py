"""Hints run as they are written: overrides in comments of option files, and those that messages name."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import sedtrain
from sedtrain.config.overrides import check_overrides
from sedtrain.config.schema import conf_dir
from sedtrain.errors import UserError

OVERRIDE = re.compile(r"[+~]*[a-z_][\w./]*=\S+")
COMMENTS = [
    (file, line.partition("# ")[2])
    for file in sorted(conf_dir().rglob("*.yaml"))
    for line in file.read_text(encoding="utf-8").splitlines()
    if re.search(r"# .*\w=\S", line)
]
NAMED = {"FOLDER": "/tmp", "FILE": "/tmp", "RUN": "/tmp"}  # placeholders


def words_of_shell(text):
    """The words of a line of prose and commands as a shell would hand them over."""
    lexer = shlex.shlex(re.sub(r"(?<=\w)'(?=s\b)", "", text).replace("`", " "), posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    words = [word.rstrip(".,;:") for word in lexer]
    return [word.removesuffix(")") if word.count(")") > word.count("(") else word for word in words]


def overrides_of(text):
    found = [word for word in words_of_shell(text) if OVERRIDE.fullmatch(word)]
    return [re.sub(r"\b(FOLDER|FILE|RUN)\b", lambda name: NAMED[name[0]], each) for each in found]


def test_comments_have_hints():
    assert len([1 for _, text in COMMENTS if overrides_of(text)]) >= 20


@pytest.mark.parametrize(("file", "text"), [each for each in COMMENTS if overrides_of(each[1])], ids=str)
def test_a_hint_of_an_option_file_runs_as_it_is_written(file, text):
    group, overrides = str(file.parent.relative_to(conf_dir())), overrides_of(text)
    is_option = group in ("augment", "callbacks", "data", "decoder", "encoder")
    chosen = (
        [f"{group}={file.stem}"] if is_option and not any(each.startswith(f"{group}=") for each in overrides) else []
    )
    try:
        check_overrides([*chosen, *overrides], [], multirun="-m" in text)
    except UserError as error:
        refused = [
            each for each in error.errors if "pip install" not in each.write and each.wrong != "no value is given"
        ]
        assert refused == []


@pytest.mark.parametrize("value", ["train[:90%]", "train[90%:]", "train[:100]", "9_hours"])
def test_a_slice_of_a_split_needs_no_quotes_of_hydra(value):
    [checked] = check_overrides([f"data.train_split={value}"], [])
    assert checked in (f"data.train_split={value}", f'data.train_split="{value}"')


def literal_hints():
    """Overrides with a value in the texts of the package's errors."""
    for file in sorted(Path(sedtrain.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("write "):
                quoted = re.findall(r"'([a-z_.]+=[^']+)'", node.value)
                plain = re.findall(r"(?<![\w.'+])([a-z_]+(?:\.[a-z_]+)*=\[?[a-z0-9_][\w.\-,\[\]%:]*)", node.value)
                yield from (each.rstrip(".,;:") for each in [*quoted, *plain])


def test_what_messages_say_to_write_can_be_read_on_the_command_line():
    hints = sorted({each for each in literal_hints() if "{" not in each})
    assert len(hints) > 20
    with pytest.raises(UserError) as caught:
        check_overrides([*hints, "=nameless"], [])
    unread = [each.option for each in caught.value.errors if "characters with a meaning" in each.wrong]
    assert unread == []
    assert [each.option for each in caught.value.errors if each.wrong == "no option is named"] == ["=nameless"]

"""What the README says is so."""

import re
import shlex

from readme_table import ROOT, with_table

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_groups_is_what_conf_holds():
    assert with_table(README) == README


def test_every_file_of_the_package_has_its_phrase_in_the_tree():
    files = {path.name for path in (ROOT / "sedtrain").rglob("*.py") if path.name != "__init__.py"}
    listed = set(re.findall(r"([\w]+\.py)\b", README))
    assert files - listed == set()


def test_every_command_line_composes():
    from sedtrain.config.overrides import check_command_line

    commands = re.findall(r"^(?:\$ )?python -m sedtrain (.+)$", README, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        arguments = shlex.split(command.split("#")[0])
        if "--config-dir" not in arguments and "encodr=hubert" not in arguments:
            check_command_line(arguments)

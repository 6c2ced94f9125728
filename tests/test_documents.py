"""What README and docs say is so: commands compose, links lead somewhere, the table of options is complete."""

import re
import shlex

import pytest
import soundfile
from options_table import ROOT, with_table

from sedtrain.config.overrides import check_command_line
from sedtrain.errors import UserError

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/zh/index.md",
    ROOT / "notebooks/README.md",
    ROOT / "benchmarks/README.md",
]
COMMANDS = [
    (page.name, command)
    for page in PAGES
    for command in re.findall(
        r"^(?:\$ )?(?:python|torchrun .+?) -m sedtrain (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    if "--config-dir" not in command
]


OPTIONS_OF_OTHERS = [
    options
    for row in (ROOT / "docs/migration.md").read_text(encoding="utf-8").splitlines()
    if row.startswith("| ")
    for options in re.findall(r"`((?:'?[a-z_.]+=[^\s`]+'? ?)+)`", row.split("|")[2])
]


def test_the_table_of_options_is_what_conf_holds():
    page = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    assert with_table(page) == page


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_file_that_the_architecture_names_exists():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?\w+\.py)`", page)
    assert len(named) > 12
    assert [name for name in named if not any((place / name).is_file() for place in (ROOT, ROOT / "sedtrain"))] == []


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_composes(page, command):
    arguments = shlex.split(command.split(" #")[0])
    if "encodr=hubert" in arguments:
        with pytest.raises(UserError) as raised:
            check_command_line(arguments)
        assert str(raised.value) in (ROOT / "README.md").read_text(encoding="utf-8")
    else:
        assert check_command_line(arguments)


@pytest.mark.parametrize("options", OPTIONS_OF_OTHERS)
def test_options_for_those_of_another_toolkit_compose(options):
    assert check_command_line(shlex.split(options))


def test_most_options_of_other_toolkits_are_tried():
    assert len(OPTIONS_OF_OTHERS) > 30


SHORT = '"trainer.max_steps=1", "logger=none", "data.train_split=train[:40]", "data.test_split=test[:5]"'


@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/zh/index.md"])
def test_the_python_of_a_page_runs(name, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("speech.wav", [0.0] * 16_000, 16_000)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        code = block.replace('"RUN"', repr(str(trained)))
        exec(compile(code.replace('"trainer.max_steps=200"', SHORT), name, "exec"), {})

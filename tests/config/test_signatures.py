"""Signatures read from source; `inspect` on the imported object is the reference."""

import importlib
import inspect
import re
import subprocess
import sys
import time
import types

import pytest

from sedtrain.annotations import fits, suggest
from sedtrain.config import signatures as definition
from sedtrain.config.schema import conf_dir
from sedtrain.config.signatures import read_signature
from sedtrain.errors import UserError


@pytest.fixture
def user_module(tmp_path, monkeypatch, request):
    """Writes a user's module in the folder that Python starts in and returns its name."""

    def write(source, name=None):
        name = name or f"user_{abs(hash(request.node.name))}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return write


def names(target):
    return list(read_signature(target).parameters)


def read(target):
    """Names of parameters and whether they have defaults, and whether any other option is taken."""
    return summary(read_signature(target))


def summary(signature):
    parameters = signature.parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return (
        [(each.name, each.default is not each.empty) for each in named],
        any(each.kind is each.VAR_KEYWORD for each in parameters),
    )


def inspected(target):
    module, _, name = target.rpartition(".")
    return summary(inspect.signature(getattr(importlib.import_module(module), name)))


@pytest.mark.parametrize(
    "target",
    [
        "json.dumps",
        "argparse.ArgumentParser",
        "logging.handlers.RotatingFileHandler",
        "concurrent.futures.ThreadPoolExecutor",
        "tempfile.TemporaryDirectory",
        "fractions.Fraction",
        "textwrap.TextWrapper",
        "email.message.EmailMessage",
        "omegaconf.OmegaConf",
        "hydra.compose",
        "sedtrain.errors.UserError",
        "sedtrain.config.schema.Config",
        "sedtrain.config.check.find_problems",
        "sedtrain.config.signatures.split_module",
    ],
)
def test_source_and_inspect_agree(target):
    assert read(target) == inspected(target)


HEAVY = ["torch.optim.AdamW", "torch.optim.SGD", "lightning.Trainer"]
TARGETS = {each for path in conf_dir().rglob("*.yaml") for each in re.findall(r"_target_: *([\w.]+)", path.read_text())}


def test_heavy_targets_and_all_of_conf_are_read_without_importing_them():
    program = (
        "import sys; from sedtrain.config.signatures import read_signature\n"
        f"for target in {[*HEAVY, *sorted(TARGETS)]}:\n"
        "    print(target, *read_signature(target).parameters)\n"
        "assert not {'torch', 'lightning', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert "torch.optim.AdamW params lr betas eps weight_decay" in output
    assert len(TARGETS) > 30
    assert "max_steps" in output


@pytest.mark.parametrize("target", HEAVY)
def test_reading_a_heavy_target_takes_milliseconds(target):
    def seconds():
        definition.parsed_file.cache_clear()
        start = time.process_time()
        read_signature(target)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.02


def test_a_function_in_the_working_folder_is_read_with_its_annotations(user_module):
    module = user_module("def build(size: str, width: int = 3, *, rate: float = None, **more): ...")
    assert read(f"{module}.build") == ([("size", False), ("width", True), ("rate", True)], True)
    found = read_signature(f"{module}.build").parameters.values()
    assert [each.annotation for each in found][:3] == ["str", "int", "float | None"]


def test_ranges_are_written_out_by_whatever_name_a_module_gives_them(user_module):
    module = user_module(
        "from __future__ import annotations\nfrom typing import Annotated\n"
        "from sedtrain.ranges import Fraction as Share, Range\nHalf = Annotated[float, Range('half', high=0.5)]\n"
        "def build(a: Share | None, b: dict[str, Half], c: Half, d: Annotated[int, Range('one', 1, 1)]): ...\n"
    )
    found = [each.annotation for each in read_signature(f"{module}.build").parameters.values()]
    assert [fits(value, annotation) for annotation, value in zip(found, [0.7, {"x": 0.5}, 0.5, 1], strict=True)] == [
        True, True, True, True,
    ]  # fmt: skip
    assert [fits(value, annotation) for annotation, value in zip(found, [1.5, {"x": 0.7}, 0.7, 2], strict=True)] == [
        False, False, False, False,
    ]  # fmt: skip


def test_ranges_of_an_imported_object_count_too(user_module):
    module = user_module(
        "import functools\nfrom sedtrain.ranges import Count\n"
        "def base(number: Count | None = None): ...\nmade = functools.partial(base)\n"
    )
    annotation = read_signature(f"{module}.made").parameters["number"].annotation
    assert [fits(value, annotation) for value in (1, None, 0, 1.5)] == [True, True, False, False]


def test_a_name_that_is_none_of_ours_is_no_range(user_module):
    module = user_module("from fractions import Fraction\ndef build(share: Fraction): ...\n")
    assert fits(7, read_signature(f"{module}.build").parameters["share"].annotation)


def test_an_edited_module_is_read_again(user_module):
    module = user_module("def build(size): ...")
    assert names(f"{module}.build") == ["size"]
    user_module("def build(size, width): ...", module)
    assert names(f"{module}.build") == ["size", "width"]


def test_a_constructor_is_inherited(user_module):
    module = user_module("class A:\n  def __init__(self, a, b=1): ...\nclass B(A): ...\nclass C: ...")
    assert names(f"{module}.B") == ["a", "b"]
    assert read(f"{module}.C") == ([], False)


def test_a_dataclass_takes_the_fields_that_its_constructor_takes(user_module):
    module = user_module(
        "import dataclasses\nfrom dataclasses import dataclass, field\nfrom typing import ClassVar\n"
        "@dataclass\nclass A:\n  a: int\n  hidden: int = field(init=False, default=1)\n"
        "  kind: ClassVar[str] = 'x'\n"
        "@dataclasses.dataclass(order=True)\nclass B(A):\n  b: list[int] = field(default_factory=list)\n"
        "  c: str = field(kw_only=True)\n"
    )
    assert read(f"{module}.B") == ([("a", False), ("b", True), ("c", False)], False) == inspected(f"{module}.B")


def test_aliases_re_exports_stars_and_overloads_are_followed(user_module):
    parts = user_module("def original(a, b): ...\ndef starred(c): ...", "user_parts")
    module = user_module(
        f"from typing import overload\nfrom {parts} import original as renamed\nfrom {parts} import *\n"
        "alias = renamed\n@overload\ndef many(x: int): ...\n@overload\ndef many(x: str): ...\n"
        "def many(x, y=1): ...\nif True:\n  def guarded(g): ...\nelse:\n  guarded = None\n"
    )
    assert names(f"{module}.renamed") == names(f"{module}.alias") == ["a", "b"]
    assert names(f"{module}.starred") == ["c"]
    assert names(f"{module}.many") == ["x", "y"]
    assert names(f"{module}.guarded") == ["g"]


def test_a_class_method_is_read_without_its_class(user_module):
    module = user_module("class A:\n  @classmethod\n  def load(cls, folder): ...\n")
    assert names(f"{module}.A.load") == ["folder"]


def test_what_the_source_hides_is_imported(user_module):
    module = user_module("import functools\ndef base(a, b): ...\nmade = functools.partial(base, b=1)\n")
    assert names(f"{module}.made") == ["a", "b"]
    lazy = user_module("def __getattr__(name):\n  return lambda width: width\n", "user_lazy")
    assert names(f"{lazy}.anything") == ["width"]


def test_a_builtin_that_tells_nothing_takes_everything():
    assert read("builtins.dict") == ([], True)


@pytest.mark.parametrize(
    ("target", "wrong", "write"),
    [
        ("torch.optim.AdamWW", "torch.optim has no 'AdamWW'", "did you mean 'AdamW'?"),
        ("troch.optim.AdamW", "no module 'troch' can be imported", "did you mean 'torch'?"),
        ("sedtrain.confg.Parameter", "sedtrain has no 'confg'", "did you mean 'config'?"),
        ("sedtrain.models.encoderr.x", "sedtrain.models has no 'encoderr'", "did you mean 'encoder'?"),
        ("zqxj.Thing", "no module 'zqxj' can be imported", "install it, or run in the folder that holds it"),
        ("sedtrain.config.schema", "sedtrain.config.schema is a module", "write the name of a class or function"),
        ("AdamW", "'AdamW' is no dotted name", "write package.module.Name"),
        ("json.decoder.NaN", "json.decoder.NaN is a float", "write the name of a class or function"),
    ],
)
def test_a_target_that_does_not_exist_is_named(target, wrong, write):
    with pytest.raises(UserError) as caught:
        read_signature(target)
    assert caught.value.wrong == wrong
    assert caught.value.write.startswith(write)


def test_a_module_that_does_not_parse_is_named_with_its_line(user_module):
    module = user_module("x = 1\ndef broken(:\n")
    with pytest.raises(UserError) as caught:
        read_signature(f"{module}.broken")
    assert caught.value.wrong == f"importing {module} fails with SyntaxError: invalid syntax ({module}.py, line 2)"


def test_a_module_that_fails_to_import_is_named_with_its_error(user_module):
    module = user_module("raise OSError('no disk')\ndef __getattr__(name): ...")
    with pytest.raises(UserError, match=f"importing {module} fails with OSError: no disk"):
        read_signature(f"{module}.thing")


def test_the_names_to_choose_from_are_listed_unless_they_would_hide_the_close_one():
    many = [f"name{index}" for index in range(20)]
    assert suggest("huber", ["hubert", "wavlm"]) == "did you mean 'hubert'? available: hubert, wavlm"
    assert suggest("zzz", ["hubert", "_hidden", "*"]) == "available: hubert"
    assert suggest("name_3", many) == "did you mean 'name3'?"
    assert suggest("zzz", many) == f"available: {', '.join(many)}"


def test_a_class_of_a_module_without_a_spec_is_inspected(monkeypatch):
    class Mine:
        def __init__(self, width: int = 3) -> None: ...

    module = types.ModuleType("module_without_spec")
    module.Mine = Mine
    monkeypatch.setitem(sys.modules, "module_without_spec", module)
    assert names("module_without_spec.Mine") == ["width"]
    with pytest.raises(UserError, match="has no 'Other'"):
        read_signature("module_without_spec.Other")


@pytest.mark.parametrize(("source", "told"), [("import sys; sys.exit(3)", "SystemExit"), ("a = 1\0", "null bytes")])
def test_a_module_that_cannot_be_imported_is_named(user_module, source, told):
    name = user_module(source)
    with pytest.raises(UserError, match=f"importing {name} fails with .*{told}"):
        read_signature(f"{name}.anything")

"""Whatever stands on the command line, it passes or is refused with its place and a remedy: never with another exception.

`SEDTRAIN_EXAMPLES=2000 python -m pytest tests/config/test_fuzz.py` tries more of them.
"""

import os

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError

EXAMPLES = int(os.environ.get("SEDTRAIN_EXAMPLES", 0))
GROUPS = {
    path.name: sorted(each.stem for each in path.glob("*.yaml")) for path in conf_dir().iterdir() if path.is_dir()
}
SCALARS = [
    "0", "-1", "1", "2.5", "1e400", "-inf", "nan", ".inf", "null", "true", "???", "''", '"a b"', "ü", "a=b", "a b",
    "007", "0x1F", "/dev/null", "..", "train[:90%]", "'train[:9]'", "1e20", "1.5", "100000000000000000000", "\\",
    "a\\,b", "#", "%d", "{}", "@", "None",
]  # fmt: skip
NESTED = [
    "[]", "[1,x]", "{}", "{1: x}", "{a: {b: null}}", "[[1],[2]]", "{_target_: os.system}", "{_target_: builtins.print}",
    "[", "{a", "(1", "1,2", "range(1,3)", "interval(0,1)", "choice(1,2)", "glob(*)", "sort(b,a)", "int(x)", "tag(a,1)",
    "shuffle(1,2)",
]  # fmt: skip
REFERENCES = [
    "${seed}", "${encoder}", "${nope}", "${oc.env:NOPE}", "${oc.decode:1}", "${oc.env:HOME}", "${hydra:runtime.cwd}",
    "${now:%Y}", "${now:%}", "${.}", "${..size}", "${size", "${}", "a${seed}b", "${oc.select:nope}",
    "${oc.create:{a: 1}}", "${trainer.max_steps}",
]  # fmt: skip
HYDRAS = [
    "_target_", "_partial_", "_args_", "_recursive_", "_convert_", "_method_", "_global_", "defaults", "@x", "x@y",
    "x@y:z",
]  # fmt: skip
OF_HYDRA = [
    "hydra.run.dir", "hydra.job", "hydra.job.chdir", "hydra.job.name", "hydra.sweep.dir", "hydra.searchpath",
    "hydra.mode", "hydra/launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweeper.params", "hydra.output_subdir",
    "hydra.verbose", "hydra.env", "hydra.callbacks", "hydra",
]  # fmt: skip
FLAGS = [
    "-m", "--cfg", "--config-dir", "--config-name", "--package", "--resolve", "--run", "--info", "--nope", "-x", "--",
    "", "train",
]  # fmt: skip


def leaves(node, path=""):
    """Every key of a configuration, groups included, by dotted name."""
    for key, value in node.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")


@pytest.fixture(scope="module")
def keys():
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return sorted(leaves(OmegaConf.to_container(compose("train"))))


values = st.one_of(
    st.sampled_from(SCALARS), st.sampled_from(NESTED), st.sampled_from(REFERENCES), st.text(max_size=6), st.integers().map(str),
    st.floats().map(str),
)  # fmt: skip


@st.composite
def overrides(draw, keys):
    kind = draw(st.sampled_from(["group", "key", "key", "key", "hydra", "of_hydra", "new", "flag", "text"]))
    if kind == "flag":
        return draw(st.sampled_from(FLAGS))
    if kind == "text":
        return draw(st.text(max_size=12))
    if kind == "group":
        group = draw(st.sampled_from(sorted(GROUPS)))
        name, value = group, draw(st.one_of(st.sampled_from([*GROUPS[group], "nope"]), values))
    else:
        name = draw(st.sampled_from(OF_HYDRA if kind == "of_hydra" else keys))
        name += {
            "hydra": "." + draw(st.sampled_from(HYDRAS)),
            "new": draw(st.sampled_from([".new", "x", ".0", "/a", "@a"])),
        }.get(kind, "")
        value = draw(values)
    prefix = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    return f"{prefix}{name}" + (f"={value}" if prefix != "~" or draw(st.booleans()) else "")


def assert_is_told(error):
    """Each mistake has its place, and words on what is wrong and what to write."""
    for each in error.errors:
        assert each.option and each.wrong.strip() and each.write.strip(), vars(each)
        assert "Traceback" not in str(each)


@settings(max_examples=EXAMPLES or 30, phases=[Phase.generate])  # a smaller example takes longer to find than to read
@given(st.data())
def test_a_command_line_passes_or_is_refused_with_place_and_remedy(keys, data):
    arguments = data.draw(st.lists(overrides(keys), min_size=1, max_size=4))
    try:
        assert isinstance(check_command_line(arguments), list)
    except UserError as error:
        assert_is_told(error)
    except SystemExit as end:  # argparse has printed the usage
        assert end.code == 2

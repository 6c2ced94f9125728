"""The command line against a small folder of groups; Hydra itself is run on what passes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from told import Problem, told

from sedtrain.config.overrides import check_command_line, check_overrides
from sedtrain.errors import UserError

FILES = {
    "train": """
        defaults:
          - schema
          - _self_
          - encoder: hubert
          - trainer: short
          - adapter: none
          - decoding: greedy
          - experiment: null
        run_dir: ${hydra:runtime.output_dir}
    """,
    "encoder/hubert": "{_target_: user_overrides_module.load, size: '${size}', width: 144}",
    "encoder/wavlm": "{_target_: user_overrides_module.load, size: '${size}', width: 96}",
    "trainer/short": "{_target_: user_overrides_module.Trainer, max_steps: 20}",
    "adapter/none": "{}",
    "adapter/linear": "output_dim: 3",
    "decoding/greedy": "num_beams: 1",
    "experiment/quick": """
        # @package _global_
        defaults:
          - override /encoder: wavlm
        seed: 3
    """,
    "experiment/mistyped": "# @package _global_\nseed: abc",
    "experiment/unknown": "# @package _global_\nsede: 3",
    "experiment/lost": "# @package _global_\ndefaults:\n  - override /encoder: wavml",
}
MODULE = """
def load(size: str, width: int = 3, dropout: float = 0.0): ...
class Trainer:
    def __init__(self, max_steps: int = -1, precision: str = "32"): ...
"""


def write_files(folder, files):
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
        path.write_text("\n".join(line[indent:] for line in lines) + "\n")


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    write_files(folder / "conf", FILES)
    (folder / "user_overrides_module.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr("sedtrain.config.overrides.conf_dir", lambda: folder / "conf")
        yield folder / "conf"


def problems(conf, *overrides, folders=(), **options):
    with pytest.raises(UserError) as caught:
        check_overrides(list(overrides), list(folders), **options)
    return told(caught.value.errors)


def composed(conf, overrides):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", overrides)


def test_what_passes_goes_to_hydra_as_it_was(conf):
    overrides = ["encoder=wavlm", "trainer.max_steps=30", "+note=a", "++seed=2", "~encoder.width", "experiment=quick"]
    assert check_overrides(overrides, []) == overrides
    assert check_overrides([], []) == []


def test_an_option_that_only_the_signature_lists_reaches_hydra(conf):
    checked = check_overrides(["encoder.dropout=0.1", "encoder.width=3"], [])
    assert checked == ["++encoder.dropout=0.1", "encoder.width=3"]
    assert composed(conf, checked).encoder.dropout == 0.1
    checked = check_overrides(["encoder={width: 5, dropout: 0.2}"], [])
    assert dict(composed(conf, checked).encoder) | {"size": 0, "_target_": 0} == {
        "_target_": 0,
        "size": 0,
        "width": 5,
        "dropout": 0.2,
    }


def test_every_problem_is_reported_at_once(conf):
    found = problems(
        conf,
        "encoder=huber",
        "encoder.widht=3",
        "trainer.max_steps=many",
        "seed=abc",
        "encodr=hubert",
        "size=tinny",
        "decoding.num_beam=3",
        "audio=a(b",
    )
    assert [each.option for each in found] == [
        "audio",
        "encoder",
        "seed",
        "encodr",
        "decoding.num_beam",
        "size",
        "encoder.widht",
        "trainer.max_steps",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "encoder=huber",
            Problem(
                "encoder", "huber", "encoder has no option 'huber'", "did you mean 'hubert'? available: hubert, wavlm"
            ),
        ),
        ("encoder=zzz", Problem("encoder", "zzz", "encoder has no option 'zzz'", "available: hubert, wavlm")),
        (
            "encodr=hubert",
            Problem("encodr", "hubert", "there is no group or option 'encodr'", "did you mean 'encoder'?"),
        ),
        ("~encodr", Problem("encodr", None, "there is no group or option 'encodr'", "did you mean 'encoder'?")),
        (
            "encodr.width=3",
            Problem("encodr.width", 3, "there is no group or option 'encodr'", "did you mean 'encoder'?"),
        ),
        (
            "encoder.widht=3",
            Problem(
                "encoder.widht",
                3,
                "load has no option 'widht'",
                "did you mean 'width'? available: size, width, dropout",
            ),
        ),
        (
            "decoding.num_beam=3",
            Problem(
                "decoding.num_beam",
                3,
                "decoding has no option 'num_beam'",
                "did you mean 'num_beams'? available: num_beams; to add an option, write +decoding.num_beam=VALUE",
            ),
        ),
        (
            "adapter.output_dim=3",
            Problem(
                "adapter.output_dim", 3, "adapter has no option 'output_dim'", "choose one first: adapter=linear | none"
            ),
        ),
        (
            "seed=abc",
            Problem("seed", "abc", "expected a whole number from 0 to 4294967295", "write a whole number, e.g. seed=1"),
        ),
        (
            "pretrained=maybe",
            Problem("pretrained", "maybe", "expected bool", "write pretrained=true or pretrained=false"),
        ),
        (
            "checkpoint=a=b",
            Problem("checkpoint", "a=b", "this has special characters", "quote it: 'checkpoint=\"a=b\"'"),
        ),
        ("encoder", Problem("encoder", "", "no value is given", "write encoder=VALUE")),
        (
            "encoder=hubert,wavlm",
            Problem(
                "encoder",
                "hubert,wavlm",
                "several values without --multirun",
                "add --multirun to run each; a list is 'encoder=[hubert,wavlm]', a text 'encoder=\"hubert,wavlm\"'",
            ),
        ),
        (
            "encoder.width=${widht}",
            Problem(
                "encoder.width",
                "${widht}",
                "this reference fails: Interpolation key 'widht' not found",
                "write a value, or refer to a key that has one",
            ),
        ),
        ("run_dir=???", Problem("run_dir", "???", "no value is given", "write run_dir=VALUE")),
        (
            "+encoder=hubert",
            Problem(
                "+encoder",
                "hubert",
                "encoder appears more than once in the final defaults list",
                "write encoder=hubert",
            ),
        ),
        (
            "+seed=3",
            Problem(
                "seed",
                3,
                "Could not append to config. An item is already at 'seed'.",
                "Either remove + prefix: 'seed=3' Or add a second + to add or override 'seed': '++seed=3'",
            ),
        ),
        (
            "hydra/output=nowhere",
            Problem("hydra/output", "nowhere", "hydra/output has no option 'nowhere'", "available: default"),
        ),
        (
            "experiment=mistyped",
            Problem(
                "seed",
                "abc",
                "expected a whole number from 0 to 4294967295 (set by experiment=mistyped)",
                "write a whole number, e.g. seed=1",
            ),
        ),
        (
            "experiment=lost",
            Problem(
                "experiment",
                "lost",
                "In 'train': Could not find 'encoder/wavml'",
                "did you mean 'wavlm'? available: hubert, wavlm",
            ),
        ),
    ],
)
def test_a_mistake_is_told_what_to_write(conf, override, expected):
    assert problems(conf, override) == [expected]


def test_an_unknown_key_in_an_option_file_is_named_with_the_file(conf):
    (problem,) = problems(conf, "experiment=unknown")
    assert problem.option == "sede"
    assert problem.wrong == "Key 'sede' not in 'Config' (set by experiment=unknown)"
    assert problem.write.startswith("did you mean 'seed'?")


def test_quoting_as_told_makes_a_value_readable(conf):
    assert check_overrides(['checkpoint="a=b"'], []) == ['checkpoint="a=b"']


def test_a_folder_of_ones_own_adds_options(conf, tmp_path):
    write_files(tmp_path / "my conf, 'all'", {"encoder/mine": "{_target_: user_overrides_module.load}"})
    folder = tmp_path / "my conf, 'all'"
    overrides = ["encoder=mine", "encoder.size=tiny"]
    checked = check_overrides(overrides, [folder])
    assert checked == ["encoder=mine", "++encoder.size=tiny"]
    (problem,) = problems(conf, "encoder=mine", folders=[folder])
    assert (problem.option, problem.wrong) == ("encoder.size", "load needs 'size'")
    chosen, missing = problems(conf, "encoder=min", folders=[folder])
    assert chosen.write == "did you mean 'mine'? available: hubert, mine, wavlm"
    assert missing == problem  # the close option stands in for the unknown one


def test_a_folder_on_hydras_search_path_counts_too(conf, tmp_path):
    write_files(tmp_path / "more", {"encoder/mine": "{_target_: user_overrides_module.load, size: tiny}"})
    overrides = [f"hydra.searchpath=[file://{tmp_path}/more]", "encoder=mine"]
    assert check_overrides(overrides, []) == overrides


def test_a_folder_that_does_not_exist_is_a_problem_beside_the_others(conf, tmp_path):
    found = problems(conf, "seed=abc", folders=[tmp_path / "nowhere"])
    assert found[0] == Problem("--config-dir", str(tmp_path / "nowhere"), "no such folder", "name a folder of groups")
    assert [each.option for each in found] == ["--config-dir", "seed"]


@pytest.mark.parametrize(
    ("text", "line", "shown", "wrong"),
    [
        ("a: 1\nb: 2: 3\n", 2, "b: 2: 3", "this is no YAML: mapping values are not allowed here"),
        ("a: 1\nb: [1,\n", 2, "b: [1,", "this is no YAML: expected the node content, but found '<stream end>'"),
        ("a: 1\na: 2\n", 2, "a: 2", "this is no YAML: found duplicate key a"),
    ],
)
def test_broken_yaml_is_named_with_file_and_line(conf, tmp_path, text, line, shown, wrong):
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "mine.yaml").write_text(text)
    found = problems(conf, "encoder=mine", "encoder.anything=3", "seed=abc", folders=[tmp_path])
    assert found[0].option == f"{tmp_path}/encoder/mine.yaml, line {line}"
    assert found[0].value == shown
    assert found[0].wrong == wrong
    assert [each.option for each in found[1:]] == ["seed"]


def test_every_value_of_a_sweep_is_checked_once(conf):
    sweep = ["encoder=hubert,wavlm", "encoder.dropout=0.1,0.2", "seed=range(0,1000000)"]
    expected = ["encoder=hubert,wavlm", "++encoder.dropout=0.1,0.2", "seed=range(0,1000000)"]
    assert check_overrides(sweep, [], multirun=True) == expected
    assert check_overrides([*sweep, "hydra.mode=MULTIRUN"], [])[:3] == expected
    found = problems(conf, "encoder=hubert,wavml,wavlm", "encoder.width=1,2,x", "seed=abc", multirun=True)
    assert [(each.option, each.value) for each in found] == [
        ("seed", "abc"),
        ("encoder", "wavml"),
        ("encoder.width", "x"),
    ]
    assert check_overrides(["encoder=glob(*)"], [], multirun=True) == ["encoder=glob(*)"]


def test_a_primary_configuration_that_does_not_exist_is_named(conf):
    (problem,) = problems(conf, config_name="nope")
    assert (problem.option, problem.value) == ("--config-name", "nope")
    assert problem.wrong.startswith("Cannot find primary config 'nope'")


def test_the_check_leaves_hydra_as_it_was(conf):
    check_overrides([], [])
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1, max_size=12) | st.builds("encoder={}".format, st.text(max_size=8)), max_size=3))
def test_no_command_line_ends_in_another_exception(conf, overrides):
    try:
        check_overrides(overrides, [])
    except UserError as error:
        assert str(error)


def test_the_check_takes_less_than_a_second(conf):
    start = time.perf_counter()
    check_overrides(["encoder=wavlm", "trainer.max_steps=3", "seed=1", "size=base"], [])
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_old_names_of_options_mean_todays(conf, prefix):
    old = [f"{prefix}normaliser=none", f"{prefix}training_normaliser=lowercase"]
    now = [f"{prefix}normalizer=none", f"{prefix}training_normalizer=lowercase"]
    if prefix == "+":  # Hydra's: the option exists
        assert problems(conf, *old) == problems(conf, *now)
    else:
        assert check_overrides(old, []) == now


def test_old_names_mean_todays_in_a_sweep_and_in_mistakes(conf):
    sweep = ["normaliser=none,lowercase"]
    assert check_overrides(sweep, [], multirun=True) == ["normalizer=none,lowercase"]
    assert [each.option for each in problems(conf, "normaliser=nne")] == ["normalizer"]
    assert [each.option for each in problems(conf, "normalisers=none")] == ["normalisers"]


# --- flags


@pytest.mark.parametrize("flag", ["--help", "--hydra-help", "--info"])
def test_asking_for_help_is_never_checked(conf, flag):
    assert check_command_line(["encoder=zzz", flag]) == ["encoder=zzz", flag]


def test_flags_may_stand_between_overrides_and_come_first(conf):
    arguments = ["--cfg", "job", "encoder.dropout=0.1", "--resolve"]
    assert check_command_line(arguments) == ["--cfg", "job", "--resolve", "++encoder.dropout=0.1"]
    assert check_command_line(["-m", "encoder=hubert,wavlm"]) == ["-m", "encoder=hubert,wavlm"]


def test_the_config_dir_flag_names_the_folder(conf, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check_command_line(["--config-dir", str(tmp_path / "nowhere")])


def test_a_checked_command_line_runs_in_hydra_without_torch(conf, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[2])!r}, {str(conf.parent)!r}]
from pathlib import Path
import hydra
import sedtrain.config.overrides as overrides
overrides.conf_dir = lambda: Path({str(conf)!r})

@hydra.main(config_path={str(conf)!r}, config_name="train", version_base="1.3")
def run(config):
    print("ran", config.encoder.dropout, config.run_dir, "torch" in sys.modules)

try:
    sys.argv[1:] = overrides.check_command_line(sys.argv[1:])
except overrides.UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
run()
"""
    )

    def call(*arguments):
        command = [sys.executable, str(script), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    finished = call("encoder.dropout=0.1", f"hydra.run.dir={tmp_path}/out")
    assert finished.stdout == f"ran 0.1 {tmp_path}/out False\n", finished.stderr
    refused = call("encoder.dorpout=0.1")
    assert refused.returncode == 2
    assert "did you mean 'dropout'?" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_place_of_a_user_that_does_not_exist_is_told(conf):
    with pytest.raises(UserError, match="there is no user 'nobody-here' on this machine"):
        check_overrides(["run_dir=~nobody-here/run"], [])
    assert check_overrides(["run_dir=~/run"], []) == ['run_dir="~/run"']

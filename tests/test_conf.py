"""Every option file of conf/, found by walking the folder."""

import re

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sedtrain.config import conf_dir, find_problems, register

FILES = sorted(path for path in conf_dir().glob("*/*.yaml"))
CHOICES = [(path.parent.name, path.stem) for path in FILES]
PARTS = [(group, name) for group, name in CHOICES if group in ("encoder", "decoder")]
LOCAL = ("folder", "manifest", "parquet", "webdataset")
MISSING = {
    **{("data", name): "data.path" for name in LOCAL},
    ("experiment", "connected_digits"): "data.path",
    ("augment", "recorded_noise"): "augment.recorded_noise.path",
    ("augment", "reverb"): "augment.reverb.folder",
}
FAMILIES = {
    "encoder": [
        "data2vec", "hubert", "moonshine", "parakeet", "seamless_m4t", "seamless_m4t_v2", "sew", "sew_d", "speech_to_text",
        "speecht5", "unispeech", "unispeech_sat", "w2v_bert", "wav2vec2", "wav2vec2_conformer", "wavlm", "whisper",
    ],
    "decoder": [
        "bart", "bert", "bert_generation", "blenderbot", "blenderbot_small", "camembert", "data2vec_text", "electra", "ernie",
        "gpt2", "marian", "mbart", "pegasus", "plbart", "rembert", "roberta", "trocr", "xglm", "xlm_roberta", "xmod",
    ],
}  # fmt: skip
ONLY_INSIDE_OTHERS = {"trocr"}  # published as half of vision-encoder-decoder models
PUBLISHED = {
    "hubert": "facebook/hubert-base-ls960",
    "wav2vec2": "facebook/wav2vec2-base",
    "wavlm": "microsoft/wavlm-base-plus",
    "w2v_bert": "facebook/w2v-bert-2.0",
    "whisper": "openai/whisper-base",
    "bert": "google-bert/bert-base-uncased",
    "gpt2": "openai-community/gpt2",
    "bart": "facebook/bart-base",
    "mbart": "facebook/mbart-large-50",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def composed(*overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("train", [*overrides, "run_dir=run"])


def defaults():
    """The defaults list as (group, option), options that are no choice of a group as (name, None)."""
    entries = yaml.safe_load((conf_dir() / "train.yaml").read_text())["defaults"]
    return [next(iter(entry.items())) if isinstance(entry, dict) else (entry, None) for entry in entries]


def test_the_walk_finds_the_options():
    assert len(CHOICES) >= 40
    assert {each.stem for each in conf_dir().glob("*.yaml")} == {"train", "data_settings"}
    assert len(list(conf_dir().glob("*/*.yaml"))) == len(CHOICES)
    assert {group for group, _ in CHOICES} == {each.name for each in conf_dir().iterdir() if each.is_dir()}


@pytest.mark.parametrize(("group", "name"), CHOICES, ids=map("/".join, CHOICES))
def test_every_option_composes_without_a_problem(group, name):
    problems = find_problems(composed(f"{group}={name}"))
    expected = [(MISSING[group, name], "no value is given")] if (group, name) in MISSING else []
    assert [(each.path, each.wrong) for each in problems] == expected


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
@pytest.mark.parametrize(("group", "name"), PARTS, ids=map("/".join, PARTS))
def test_every_family_composes_at_every_size(group, name, size):
    config = composed(f"{group}={name}", f"size={size}")
    assert find_problems(config) == []
    assert config[group].size == size


def test_every_group_has_its_line_in_the_table_of_contents():
    groups = [
        group for group, _ in defaults() if not group.startswith("override") and group not in ("schema", "_self_")
    ]
    assert sorted(groups) == sorted({group for group, _ in CHOICES})
    assert all(option is None or (group, option) in CHOICES for group, option in defaults() if group in groups)


def test_the_schema_is_first_and_an_experiment_has_the_last_word():
    names = [name for name, _ in defaults() if not name.startswith("override")]
    assert names[:2] == ["schema", "_self_"]
    assert names[-1] == "experiment"
    config = composed("experiment=translate_digits")
    assert (config.target, config.data.target) == ("translation", "translation")
    assert composed("experiment=connected_digits", "data.path=x").data.columns.id == "utt_id"


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_option_says_what_it_is_on_top(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(next(line for line in lines if not line.startswith("# @package")).removeprefix("# ")) > 8
    assert all(line.startswith("# ") for line in lines[:1])


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "experiment"])
def test_every_experiment_opens_with_its_command(name):
    text = (conf_dir() / f"experiment/{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n# ")
    assert f"#   python -m sedtrain experiment={name}" in text


def test_every_family_is_there():
    for group, names in FAMILIES.items():
        assert [name for each, name in PARTS if each == group] == names


@pytest.mark.parametrize(("group", "name"), PARTS, ids=map("/".join, PARTS))
def test_every_family_has_a_tiny_member_and_names_published_ones(group, name):
    family = OmegaConf.to_container(composed(f"{group}={name}")[group])
    assert family["tiny"]
    published = [family[size] for size in ("base", "large") if family[size] is not None]
    assert bool(published) is (name not in ONLY_INSIDE_OTHERS)
    assert all(HUB_ID.fullmatch(each) for each in published)
    assert family["base"] == PUBLISHED.get(name, family["base"])


def test_tiny_is_the_default_and_a_part_follows_the_root():
    config = composed()
    assert [config.size, config.encoder.size, config.decoder.size] == ["tiny"] * 3
    assert composed("attention=eager").decoder.attention == "eager"
    assert composed("pretrained=false").encoder.pretrained is False
    assert composed("seed=7").data.seed == 7

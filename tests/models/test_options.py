"""Values of families' configurations: impossible ones are refused with their range, others build a model or say why not."""

import os

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from sedtrain.config.schema import conf_dir
from sedtrain.errors import UserError
from sedtrain.models.decoder import load_decoder
from sedtrain.models.encoder import load_encoder
from sedtrain.models.options import range_of, refuse_impossible
from sedtrain.text.tokenizers import train_tokenizer

EXAMPLES = int(os.environ.get("SEDTRAIN_EXAMPLES", 0))
COUNT, FRACTION = "a whole number of 1 or more", "a fraction from 0 to 1"
VALUES = [0, -1, 1, 3, 7, 64, 0.5, 1.5, -0.1, float("inf"), float("nan"), None, True, "x", [], [1], [0], {}, {"a": 1}]
SHAPES = {
    "encoder": {"hubert": "wav2vec2", "wav2vec2": "wav2vec2", "whisper": "whisper", "moonshine": "moonshine"},
    "decoder": {"bert": "bert", "gpt2": "gpt2", "bart": "bart"},
}


def tiny_of(part, name):
    return yaml.safe_load((conf_dir() / part / f"{SHAPES[part][name]}.yaml").read_text(encoding="utf-8"))["tiny"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three", "four five"], kind="char", vocab_size=50)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_attention_heads", 0, COUNT),
        ("num_attention_heads", -1, COUNT),
        ("num_hidden_layers", -1, COUNT),
        ("hidden_size", 0, COUNT),
        ("hidden_size", 1.5, COUNT),
        ("intermediate_size", True, COUNT),
        ("conv_dim", [64, 0], f"a list, each {COUNT}"),
        ("conv_kernel", 3, "a list"),
        ("mask_time_prob", 2, FRACTION),
        ("layerdrop", -0.1, FRACTION),
        ("hidden_dropout", float("nan"), FRACTION),
        ("layer_norm_eps", float("inf"), "a number of 0 or more"),
        ("do_stable_layer_norm", 1, "true or false"),
        ("hidden_act", 3, "a text"),
    ],
)
@pytest.mark.parametrize("option", ["options", "tiny"])
def test_an_impossible_value_is_refused_with_its_range(option, name, value, words):
    with pytest.raises(UserError) as caught:
        refuse_impossible("encoder", {option: {name: value}}, AutoConfig.for_model("wav2vec2"))
    [error] = caught.value.errors
    assert error.option == f"encoder.{option}.{name}"
    assert error.wrong == f"expected {words}"
    assert error.write == f"write encoder.{option}.{name}=VALUE, {words}"


def test_heads_that_do_not_divide_the_width_are_refused_with_a_number_that_does():
    with pytest.raises(UserError) as caught:
        load_encoder("wav2vec2-conformer", {"hidden_size": 144}, options={"num_attention_heads": 7})
    [error] = caught.value.errors
    assert error.option == "encoder.options.num_attention_heads"
    assert (error.wrong, error.write) == ("it does not divide the width, 144", f"write {error.option}=6")


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_every_value_of_the_tiny_members_is_possible(part):
    files = sorted((conf_dir() / part).glob("*.yaml"))
    assert len(files) > 15
    for file in files:
        option = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "tiny" in option and "model_type" in option:
            refuse_impossible(part, {"tiny": option["tiny"]}, AutoConfig.for_model(option["model_type"]))


def test_defaults_of_every_family_lie_in_their_own_ranges():
    for file in [*(conf_dir() / "encoder").glob("*.yaml"), *(conf_dir() / "decoder").glob("*.yaml")]:
        defaults = AutoConfig.for_model(yaml.safe_load(file.read_text(encoding="utf-8"))["model_type"])
        own = {name: value for name, value in vars(defaults).items() if range_of(name, value)}
        assert own
        refuse_impossible("encoder", {"options": own}, defaults)


@settings(max_examples=EXAMPLES or 40, phases=[Phase.generate])
@given(st.data())
def test_an_option_builds_a_model_or_is_refused_with_place_and_remedy(tokenizer, data):
    part = data.draw(st.sampled_from(sorted(SHAPES)))
    name = data.draw(st.sampled_from(sorted(SHAPES[part])))
    tiny = tiny_of(part, name)
    known = st.sampled_from([*tiny, *(key for key in AutoConfig.for_model(name).to_dict() if not key.startswith("_"))])
    options = data.draw(st.dictionaries(known, st.sampled_from(VALUES), min_size=1, max_size=2))
    try:
        load_encoder(name, tiny, options=options) if part == "encoder" else load_decoder(
            tokenizer, name, tiny, options=options
        )
    except UserError as error:
        assert all(each.option and each.wrong and each.write for each in error.errors)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_defaults_of_every_family_fit(part):
    families = {
        yaml.safe_load(path.read_text(encoding="utf-8")).get("model_type")
        for path in (conf_dir() / part).glob("*.yaml")
    }
    for family in filter(None, families):
        config = AutoConfig.for_model(family)
        refuse_impossible(part, {"options": config.to_dict()}, config)


def test_a_decoder_needs_no_encoder_layers_and_a_list_of_several_kinds_is_left_to_the_family():
    refuse_impossible("decoder", {"options": {"encoder_layers": 0}}, AutoConfig.for_model("bart"))
    refuse_impossible("decoder", {"options": {"attention_types": [[["global"], 4]]}}, AutoConfig.for_model("gpt_neo"))

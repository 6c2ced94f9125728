"""Attention implementations: refused if a family or a machine lacks them, the same in encoder and decoder.

test_support.py shows, for every family, that they are equal to each other.
"""

import pytest
import torch
from families import ENCODERS, OPTIONS, tiny_decoder, tiny_encoder
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import PreTrainedModel

from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.models import attention
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

pytestmark = pytest.mark.filterwarnings(  # of FlexAttention, and of what it imports
    "ignore:_compile flag", "ignore:flex_attention called without", "ignore:.*torch.jit.script_method"
)
EAGER_ONLY = {"sew_d", "speech_to_text", "speecht5", "wavlm"} | {"rembert", "t5gemma", "trocr", "xglm"}
AUTO = "or attention=auto, the best that encoder and decoder each can"
IDS = torch.tensor([[1, 5, 6, 7, 8], [1, 9, 8, 0, 0]])
REAL_IDS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture
def interpreted():
    """FlexAttention as written: to compile it for a CPU takes ten seconds and more for each shape of mask."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(params=[False, True], ids=["cpu", "cuda"])
def has_cuda(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    return request.param


def heard():
    """Two utterances of different lengths, and their mask."""
    mask = torch.ones(2, 12800, dtype=torch.long)
    mask[1, 8480:] = 0
    return torch.randn(2, 12800, generator=torch.Generator().manual_seed(0)), mask


@pytest.mark.parametrize(("group", "name"), [*(("encoder", n) for n in ENCODERS), *(("decoder", n) for n in OPTIONS)])
def test_auto_is_sdpa_where_the_family_has_it_and_eager_elsewhere(group, name):
    model = {"encoder": tiny_encoder, "decoder": tiny_decoder}[group](name, attention=None)
    implementation = "eager" if name in EAGER_ONLY else "sdpa"
    assert model.config._attn_implementation == implementation
    assert {each.config._attn_implementation for each in parts(model)} == {implementation}


def parts(model):
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def test_auto_holds_for_saved_weights_too(tmp_path):
    for name, implementation in (("wavlm", "eager"), ("hubert", "sdpa")):
        tiny_encoder(name, attention="eager").save_pretrained(tmp_path / name)
        assert (
            tiny_encoder(name, attention=None, checkpoint=str(tmp_path / name)).config._attn_implementation
            == implementation
        )


# --- what a family or a machine has not


def problem(make, *arguments, **options):
    with pytest.raises(UserError) as caught:
        make(*arguments, **options)
    error = caught.value
    assert (error.option.rpartition(".")[2], error.value) == ("attention", options["attention"])
    return error.option.partition(".")[0], error.wrong, error.write


@pytest.mark.parametrize("name", sorted(EAGER_ONLY))
def test_a_family_without_sdpa_names_what_it_has(name):
    part, make = ("encoder", tiny_encoder) if name in ENCODERS else ("decoder", tiny_decoder)
    where, wrong, write = problem(make, name, attention="sdpa")
    assert where == part
    assert wrong.startswith(f"{make(name, attention=None).config.model_type} cannot use it here: ")
    assert "does not support an attention implementation through torch.nn.functional" in wrong
    assert write == f"write {part}.attention=eager, {AUTO}"


def test_saved_weights_of_such_a_family_are_refused_too(tmp_path):
    tiny_encoder("wavlm", attention=None).save_pretrained(tmp_path)
    _, wrong, _ = problem(tiny_encoder, "wavlm", attention="sdpa", checkpoint=str(tmp_path))
    assert wrong.startswith("wavlm cannot use it here: ")


def test_flash_attention_is_refused_before_training_where_it_is_not_installed():
    _, wrong, write = problem(tiny_decoder, "bert", attention="flash_attention_2")
    assert wrong.startswith("bert cannot use it here: FlashAttention2 has been ")
    assert "doesn't seem to be installed" in wrong
    assert write.startswith("write decoder.attention=eager or decoder.attention=sdpa")


def test_a_family_without_flash_attention_names_what_it_has(monkeypatch):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda _: True)
    _, wrong, write = problem(tiny_encoder, "w2v_bert", attention="flash_attention_2")
    assert "wav2vec2-bert cannot use it here" in wrong
    assert "does not support Flash Attention 2" in wrong
    assert "flash" not in write


def test_what_a_machine_has_is_offered(monkeypatch, has_cuda):
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda _: has_cuda)
    _, _, write = problem(tiny_decoder, "bert", attention="sdap")
    names = ["eager", "sdpa", *(["flash_attention_2", "flex_attention"] if has_cuda else [])]
    offered = " or ".join(f"decoder.attention={each}" for each in names)
    assert write == f"write {offered}, {AUTO}"


def test_flex_attention_is_refused_before_training_where_it_has_no_gradient(has_cuda):
    if has_cuda:
        assert tiny_encoder("hubert", attention="flex_attention").config._attn_implementation == "flex_attention"
    else:
        assert problem(tiny_encoder, "hubert", attention="flex_attention") == (
            "encoder",
            "hubert cannot use it here: FlexAttention has no backward on a CPU",
            f"write encoder.attention=eager or encoder.attention=sdpa, {AUTO}",
        )


@pytest.mark.parametrize("has_cuda", [True], indirect=True)
@pytest.mark.parametrize(
    ("part", "make", "name", "option"),
    [
        ("encoder", tiny_encoder, "hubert", "attention_dropout"),
        ("decoder", tiny_decoder, "bert", "attention_probs_dropout_prob"),
    ],
)
def test_flex_attention_is_refused_beside_attention_dropout(has_cuda, part, make, name, option):
    assert problem(make, name, attention="flex_attention", options={option: 0.1}) == (
        part,
        f"it has no dropout, and {option} is 0.1",
        f"write {part}.options.{option}=0, {AUTO}",
    )


@pytest.mark.parametrize("has_cuda", [True], indirect=True)
def test_flex_attention_is_refused_where_each_head_has_a_bias_of_its_own(has_cuda):
    _, wrong, write = problem(tiny_encoder, "parakeet", attention="flex_attention")
    assert wrong.startswith("parakeet_encoder cannot use it here: ")
    assert write == f"write encoder.attention=eager or encoder.attention=sdpa, {AUTO}"


# --- both parts


@pytest.mark.parametrize("option", ["auto", "eager", "sdpa"])
def test_the_option_reaches_both_parts(option):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("train", ["encoder=wav2vec2", "decoder=gpt2", f"attention={option}", "run_dir=run"])
    encoder = instantiate(config.encoder, _convert_="all")
    decoder = instantiate(config.decoder, _convert_="all")(tiny_decoder.__globals__["TOKENIZER"])
    implementation = "sdpa" if option == "auto" else option
    assert encoder.config._attn_implementation == decoder.config._attn_implementation == implementation


@pytest.fixture
def joined():
    torch.manual_seed(0)
    model = SpeechEncoderDecoder(encoder=tiny_encoder("wav2vec2"), decoder=tiny_decoder("bart"))
    return model.eval()


@torch.no_grad()
def spoken(model, **options):
    inputs, mask = heard()
    return model(inputs, attention_mask=mask, decoder_input_ids=IDS, decoder_attention_mask=REAL_IDS, **options)


def test_eager_set_on_the_joined_model_reaches_every_module_and_gives_attentions(joined):
    assert {each.config._attn_implementation for each in parts(joined)} == {"sdpa"}
    joined.set_attn_implementation("eager")
    assert {each.config._attn_implementation for each in parts(joined)} == {"eager"}
    output = spoken(joined, output_attentions=True)
    assert [len(output[f"{each}attentions"]) for each in ("encoder_", "decoder_", "cross_")] == [4, 2, 2]
    num_frames = output.encoder_attentions[0].shape[-1]
    assert output.encoder_attentions[0].shape == (2, 4, num_frames, num_frames)
    assert output.cross_attentions[0].shape == (2, 4, IDS.shape[1], num_frames)
    ends = joined.encoder._get_feature_vector_attention_mask(num_frames, heard()[1]).sum(1)
    assert ends[1] < num_frames
    assert (output.cross_attentions[0][1, ..., ends[1] :] == 0).all()


@pytest.mark.usefixtures("interpreted")
def test_logits_of_the_joined_model_are_equal(joined):
    given = []
    for implementation in ("eager", "sdpa", "flex_attention"):
        joined.set_attn_implementation(implementation)
        assert {each.config._attn_implementation for each in parts(joined)} == {implementation}
        given.append(spoken(joined).logits[REAL_IDS.bool()])
    for other in given[1:]:
        torch.testing.assert_close(other, given[0], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_flex_attention_has_no_gradient_on_a_cpu():
    decoder = tiny_decoder("bert", attention="eager")
    decoder.set_attn_implementation("flex_attention")
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        decoder(IDS, encoder_hidden_states=torch.randn(2, 20, decoder.config.hidden_size))


@pytest.mark.parametrize("decoder", ["rembert", "trocr", "xglm"])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_backend_that_a_part_lacks_is_refused_when_it_is_set_afterwards(decoder, attention, tmp_path):
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder(decoder))
    refused = f"decoder.attention = '{attention}'\n    {decoder} cannot use it here"
    with pytest.raises(UserError, match=refused) as caught:
        model.set_attn_implementation(attention)
    assert "decoder.attention=eager" in str(caught.value)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.decoder.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=refused):
        SpeechEncoderDecoder.from_pretrained(tmp_path, attn_implementation=attention)

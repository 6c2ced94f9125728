"""Decoders handed over as modules: used as they are, rebuilt so that they hear the audio, or refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    BioGptConfig,
    BioGptForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Model,
    WhisperConfig,
    WhisperForCausalLM,
    XmodConfig,
)

from sedtrain.errors import UserError
from sedtrain.models.decoder import as_decoder, refuse_deaf, settle_config

BERT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "dropout": 0.0,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
LLM = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
HEARS = {"is_decoder": True, "add_cross_attention": True}

IDS = torch.tensor([[1, 5, 6, 7, 8]])
AUDIO = torch.randn(2, 1, 7, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@torch.inference_mode()
def logits(decoder, ids=IDS, audio=AUDIO[0]):
    return decoder(input_ids=ids, encoder_hidden_states=audio, use_cache=False).logits


def assert_hears_and_is_causal(decoder):
    changed = IDS.clone()
    changed[:, 3] = 9
    before = logits(decoder)
    assert (before - logits(decoder, audio=AUDIO[1])).abs().amax() > 1e-4
    torch.testing.assert_close(before[:, :3], logits(decoder, changed)[:, :3])


# --- used as they are


@pytest.mark.parametrize(
    "decoder",
    [
        BertLMHeadModel(BertConfig(**BERT, **HEARS)),
        GPT2LMHeadModel(GPT2Config(**GPT2, add_cross_attention=True)),
        BartForCausalLM(BartConfig(**BART)),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_decoder_that_hears_stays_the_same_object_with_the_same_logits(decoder):
    decoder.eval()
    before = logits(decoder)
    assert as_decoder(decoder) is decoder
    assert torch.equal(logits(decoder), before)
    refuse_deaf(decoder)


def test_a_decoder_stays_causal_where_its_configuration_was_changed():
    decoder = BertLMHeadModel(BertConfig(**BERT, **HEARS)).eval()
    decoder.config.is_decoder = False
    assert_hears_and_is_causal(as_decoder(decoder))


class OwnConfig(PreTrainedConfig):
    model_type = "own-decoder"


class OwnDecoder(PreTrainedModel):
    """A decoder of the user's own, of torch's layers."""

    config_class = OwnConfig

    def __init__(self, config, layer):
        super().__init__(config)
        self.layer = layer

    def forward(self, input_ids=None, encoder_hidden_states=None):
        raise NotImplementedError


class CrossAttending(nn.Module):
    def __init__(self):
        super().__init__()
        self.cross_attn = nn.Linear(4, 4)


@pytest.mark.parametrize("layer", [nn.TransformerDecoderLayer(4, 1), CrossAttending()])
def test_a_class_of_the_user_s_own_is_known_by_torch_s_layer_or_by_the_name(layer):
    decoder = OwnDecoder(OwnConfig(), layer)
    assert as_decoder(decoder) is decoder


def test_a_class_of_the_user_s_own_without_cross_attention_is_refused():
    with pytest.raises(UserError) as caught:
        as_decoder(OwnDecoder(OwnConfig(), nn.Linear(4, 4)))
    assert "OwnDecoder was built without cross-attention" in caught.value.what_is_wrong
    assert "named cross_attn, crossattention or encoder_attn" in caught.value.write_instead


# --- rebuilt


def rebuilt(module):
    """The decoder around the weights of a module, for inference, and the warning."""
    with pytest.warns(UserWarning, match="as it was built cannot hear audio and write text") as warned:
        decoder = as_decoder(module.eval())
    return decoder, str(warned[0].message)


@pytest.mark.parametrize(
    ("module", "name", "told"),
    [
        (BertLMHeadModel(BertConfig(**BERT)), "BertLMHeadModel", "starting at random: cross-attention"),
        (
            BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
            "BertLMHeadModel",
            "starting at random: cross-attention",
        ),
        (RobertaForCausalLM(RobertaConfig(**BERT)), "RobertaForCausalLM", "starting at random: cross-attention"),
        (BertForMaskedLM(BertConfig(**BERT)), "BertLMHeadModel", "starting at random: cross-attention"),
        (
            BertModel(BertConfig(**BERT)),
            "BertLMHeadModel",
            "starting at random: cls.predictions, cross-attention; left out: pooler.dense",
        ),
        (GPT2LMHeadModel(GPT2Config(**GPT2)), "GPT2LMHeadModel", "starting at random: cross-attention"),
        (GPT2Model(GPT2Config(**GPT2)), "GPT2LMHeadModel", "starting at random: cross-attention"),
        (BartForConditionalGeneration(BartConfig(**BART)), "BartForCausalLM", "left out: model.encoder"),
        (BartModel(BartConfig(**BART)).decoder, "BartForCausalLM", "with the same weights"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_deaf_module_is_rebuilt_with_its_weights(module, name, told):
    decoder, warning = rebuilt(module)
    assert type(decoder).__name__ == name
    assert not decoder.training
    assert warning.endswith(told)
    assert_hears_and_is_causal(decoder)
    given = {id(weight) for weight in module.parameters()}
    assert sum(id(weight) in given for weight in decoder.parameters()) >= 15
    assert decoder.get_output_embeddings().weight is decoder.get_input_embeddings().weight


def test_a_rebuilt_decoder_without_audio_writes_as_the_module_did():
    module = GPT2LMHeadModel(GPT2Config(**GPT2)).eval()
    expected = module(IDS).logits
    decoder, _ = rebuilt(module)
    torch.testing.assert_close(decoder(IDS).logits, expected)


def test_a_seq2seq_module_s_decoder_alone_writes_as_the_whole_did():
    module = BartForConditionalGeneration(BartConfig(**BART)).eval()
    expected = module(encoder_outputs=(AUDIO[0],), decoder_input_ids=IDS).logits
    decoder, _ = rebuilt(module)
    torch.testing.assert_close(logits(decoder), expected)


def test_a_flipped_configuration_does_not_hide_that_a_module_is_deaf():
    module = BertLMHeadModel(BertConfig(**BERT))
    module.config.is_decoder = module.config.add_cross_attention = True  # as joining two modules does upstream
    assert_hears_and_is_causal(rebuilt(module)[0])


def test_a_rebuilt_decoder_keeps_precision_mode_and_what_is_frozen():
    module = BertLMHeadModel(BertConfig(**BERT)).to(torch.bfloat16)
    module.bert.embeddings.requires_grad_(False)
    config = copy.deepcopy(module.config)
    with pytest.warns(UserWarning, match="as it was built"):
        decoder = as_decoder(module.train())
    assert {weight.dtype for weight in decoder.parameters()} == {torch.bfloat16}
    assert decoder.training
    frozen = {name for name, weight in decoder.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in decoder.named_parameters() if name.startswith("bert.embeddings.")}
    assert module.config.to_dict() == config.to_dict()


def test_positions_that_are_computed_are_no_weights_of_a_rebuilt_decoder():
    module = PegasusForConditionalGeneration(PegasusConfig(**BART)).eval()
    decoder, _ = rebuilt(module)
    assert [name for name, _ in decoder.named_parameters() if "embed_positions" in name] == []
    positions = decoder.state_dict()["model.decoder.embed_positions.weight"]
    assert torch.equal(positions, module.model.decoder.embed_positions.weight)


# --- refused


@pytest.mark.parametrize(
    "decoder",
    [
        LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **LLM)),
        LlamaModel(LlamaConfig(num_key_value_heads=2, **LLM)),
        Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **LLM)),
        GemmaForCausalLM(GemmaConfig(num_key_value_heads=2, head_dim=8, **LLM)),
        BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)),
        BioGptForCausalLM(BioGptConfig(**LLM)),
        WhisperForCausalLM(
            WhisperConfig(vocab_size=40, d_model=16, decoder_layers=1, decoder_attention_heads=2, pad_token_id=0)
        ),
        T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
@pytest.mark.parametrize("check", [as_decoder, refuse_deaf])
def test_a_family_without_cross_attention_is_refused(check, decoder):
    with pytest.raises(UserError) as caught:
        check(decoder)
    name = type(decoder).__name__
    assert caught.value.what_is_wrong == f"decoder {name} has no cross-attention: it would never hear the audio"
    assert caught.value.write_instead.startswith("decoder=bert, roberta, gpt2, bart or mbart, or another decoder")


def test_a_module_whose_family_has_no_text_decoder_is_refused():
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="T5Stack has no output layer, and its family no decoder that could have one"):
        as_decoder(T5Model(config).decoder)


@pytest.mark.parametrize(
    ("decoder", "ahead"),
    [
        (BertLMHeadModel(BertConfig(**BERT)), True),
        (BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), False),
        (RobertaForCausalLM(RobertaConfig(**BERT)), True),
        (GPT2LMHeadModel(GPT2Config(**GPT2)), False),
    ],
)
def test_what_was_built_without_cross_attention_is_told_apart(decoder, ahead):
    with pytest.raises(UserError) as caught:
        refuse_deaf(decoder)
    name = type(decoder).__name__
    assert caught.value.what_is_wrong == (
        f"decoder {name} was built without cross-attention: it would never hear the audio"
        + (", and each token would see the later ones" if ahead else "")
    )
    assert caught.value.write_instead.startswith(
        f"{name}(config) with config.is_decoder = config.add_cross_attention = True"
    )


# --- the configuration


def test_a_settled_configuration_has_the_decoder_s_layers_and_heads():
    config = BartConfig(**BART)
    settle_config(config)
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 4)
    assert (config.is_decoder, config.add_cross_attention, config.is_encoder_decoder) == (True, True, False)


def test_a_settled_configuration_stays_as_it_is():
    config = BertConfig(**BERT, **HEARS)
    before = config.to_dict()
    settle_config(config)
    assert config.to_dict() == before


def test_the_only_language_is_the_one_to_use():
    config = XmodConfig()
    settle_config(config)
    assert config.default_language == "en_XX"

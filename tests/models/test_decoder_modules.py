"""Decoders handed over as modules: used as they are, or refused."""

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
    PegasusForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Model,
    XmodConfig,
)

from sedtrain.errors import UserError
from sedtrain.models.decoder import as_decoder, settle_config

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


def refusal(decoder, write="write decoder=bert, roberta, gpt2, bart or mbart, or another decoder"):
    """Why a decoder is refused."""
    with pytest.raises(UserError) as caught:
        as_decoder(decoder)
    assert (caught.value.option, caught.value.value) == ("decoder", type(decoder).__name__)
    assert caught.value.write.startswith(write)
    return caught.value.wrong


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
    wrong = refusal(OwnDecoder(OwnConfig(), nn.Linear(4, 4)), "write OwnDecoder(config) with config.is_decoder")
    assert wrong == "it was built without cross-attention: it would never hear the audio"


def test_positions_that_are_computed_are_no_weights():
    decoder = as_decoder(PegasusForCausalLM(PegasusConfig(**BART, **HEARS)))
    positions = "model.decoder.embed_positions.weight"
    assert positions in decoder.state_dict()
    assert positions not in dict(decoder.named_parameters())


@pytest.mark.parametrize(
    "decoder",
    [
        LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **LLM)),
        Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **LLM)),
        GemmaForCausalLM(GemmaConfig(num_key_value_heads=2, head_dim=8, **LLM)),
        BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)),
        BioGptForCausalLM(BioGptConfig(**LLM)),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_language_model_without_cross_attention_hears_and_keeps_its_weights(decoder):
    weights = {name: weight.clone() for name, weight in decoder.state_dict().items()}
    assert as_decoder(decoder.eval()) is decoder
    assert decoder.state_dict().keys() == weights.keys()
    assert all(torch.equal(weights[name], weight) for name, weight in decoder.state_dict().items())
    assert_hears_and_is_causal(decoder)


# --- refused


@pytest.mark.parametrize(
    "decoder",
    [
        BartForConditionalGeneration(BartConfig(**BART)),
        LlamaModel(LlamaConfig(num_key_value_heads=2, **LLM)),
        T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
    ],
    ids=lambda decoder: type(decoder).__name__,
)
def test_a_family_without_cross_attention_is_refused(decoder):
    assert refusal(decoder) == "it takes no encoder_hidden_states: it would never hear the audio"


@pytest.mark.parametrize(
    "module",
    [
        BertModel(BertConfig(**BERT, **HEARS)),
        BertForMaskedLM(BertConfig(**BERT)),
        GPT2Model(GPT2Config(**GPT2, add_cross_attention=True)),
        BartModel(BartConfig(**BART)).decoder,
        T5Model(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).decoder,
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_that_is_no_causal_language_model_is_refused(module):
    assert refusal(module) == "it is no causal language model: it would write no text"


def claims_cross_attention():
    """Its configuration says that it has cross-attention, as joining two modules does upstream; the module has none."""
    decoder = BertLMHeadModel(BertConfig(**BERT))
    decoder.config.is_decoder = decoder.config.add_cross_attention = True
    return decoder


@pytest.mark.parametrize(
    ("decoder", "ahead"),
    [
        (BertLMHeadModel(BertConfig(**BERT)), True),
        (claims_cross_attention(), True),
        (BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), False),
        (RobertaForCausalLM(RobertaConfig(**BERT)), True),
        (GPT2LMHeadModel(GPT2Config(**GPT2)), False),
    ],
)
def test_a_module_built_without_cross_attention_is_refused(decoder, ahead):
    name = type(decoder).__name__
    write = f"write {name}(config) with config.is_decoder = config.add_cross_attention = True"
    assert refusal(decoder, write) == (
        "it was built without cross-attention: it would never hear the audio"
        + (", and each token would see the later ones" if ahead else "")
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

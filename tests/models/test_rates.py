"""Dropout rates that are changed after a part was built, against a part built with them."""

import copy

import pytest
import torch
from families import tiny_decoder, tiny_encoder

from sedtrain.models.config import FollowedRates
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

CHANGES = [
    (tiny_encoder, "hubert", {"hidden_dropout": 0.3, "attention_dropout": 0.2, "layerdrop": 0.4}),
    (tiny_encoder, "whisper", {"dropout": 0.3, "encoder_layerdrop": 0.4}),
    (tiny_encoder, "w2v_bert", {"conformer_conv_dropout": 0.25}),
    (tiny_decoder, "bert", {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2}),
    (tiny_decoder, "gpt2", {"resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}),
    (tiny_decoder, "bart", {"dropout": 0.3, "activation_dropout": 0.2, "decoder_layerdrop": 0.1}),
]


def rates(part):
    return {
        (path, attribute): value
        for path, module in part.named_modules()
        for attribute, value in vars(module).items()
        if attribute == "p" or "drop" in attribute
        if type(value) is float
    }


@pytest.mark.parametrize(("make", "name", "changes"), CHANGES, ids=[each[1] for each in CHANGES])
def test_every_module_takes_the_changed_rates(make, name, changes):
    part = make(name)
    followed, weights = FollowedRates(part.config), copy.deepcopy(part.state_dict())
    for option, value in changes.items():
        setattr(part.config, option, value)
    followed.follow(part)
    built = type(part)(copy.deepcopy(part.config))
    assert rates(part) == rates(built)
    assert {*changes.values()} <= {*rates(part).values()} | {getattr(part.config, "layerdrop", None)}
    assert all(torch.equal(weight, weights[key]) for key, weight in part.state_dict().items())


def test_rates_of_the_joined_model_s_configuration_reach_the_next_step():
    model = SpeechEncoderDecoder(encoder=tiny_encoder("hubert"), decoder=tiny_decoder("bert")).train()
    model.set_special_tokens(1, 2, 0)
    audio, labels = torch.randn(1, 4000), torch.tensor([[5, 6, 2]])
    assert model(audio, labels=labels).loss == model(audio, labels=labels).loss
    model.config.decoder.hidden_dropout_prob = 0.5
    assert model(audio, labels=labels).loss != model(audio, labels=labels).loss
    model.config.decoder.hidden_dropout_prob = 0.0
    model.config.encoder.hidden_dropout = 0.5
    assert model(audio, labels=labels).loss != model(audio, labels=labels).loss
    model.config.encoder.hidden_dropout = 0.0
    assert model(audio, labels=labels).loss == model(audio, labels=labels).loss

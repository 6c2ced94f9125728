"""A step that computes on the meta device, whose tensors have no values, asks an accelerator for none: it never waits."""

import pytest
import torch
from families import END, PAD, START, batch_of, tiny_decoder, tiny_encoder
from torch.utils._python_dispatch import TorchDispatchMode

from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

PAIRS = [("hubert", "bert"), ("wavlm", "bart"), ("whisper", "gpt2"), ("w2v_bert", "t5"), ("speech_to_text", "marian")]


def joined(encoder, decoder):
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder), decoder=tiny_decoder(decoder)).train()
    model.set_special_tokens(START, END, PAD)
    return model


def loss_of(model, batch):
    logits = {"output_logits": True}  # labelled positions alone are chosen by their values
    return model(batch.inputs, attention_mask=batch.attention_mask, labels=batch.labels, **logits).loss


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize(("encoder", "decoder"), PAIRS)
def test_a_forward_and_a_backward_pass_ask_for_no_value(encoder, decoder):
    model = joined(encoder, decoder)
    batch = batch_of(model, 0.7, 1.3, 0.4).to(torch.device("meta"))
    loss_of(model.to("meta"), batch).backward()
    assert model.decoder.get_output_embeddings().weight.grad is not None


class CountsReads(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_on_a_cpu_a_batch_without_padding_still_computes_without_masks():
    model = joined("hubert", "bert")
    batch = batch_of(model, 0.7, 0.7)
    with CountsReads() as reads:
        loss_of(model, batch)
    assert reads.number == 2  # the mask of the encoder, and of the attention to it

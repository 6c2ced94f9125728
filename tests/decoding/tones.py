"""Utterances in which each token is a tone, and tiny models that learn to write them in seconds."""

import numpy as np
import torch
from transformers import BertConfig, BertLMHeadModel, HubertConfig, HubertModel

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.text.tokenizers import train_tokenizer

PAD, START, END = 0, 1, 2
TOKENS = range(5, 13)
SAMPLES, HOP = 160, 20  # of a token, of a frame
AB = train_tokenizer(["ab"], "char", 10)  # seven tokens


def batch_of(texts, noise=0.02, seed=0, prompts=None):
    """A padded batch of texts of token ids."""
    random = np.random.default_rng(seed)
    tones = [np.concatenate([np.sin((0.3 * token - 1.2) * np.arange(SAMPLES)) for token in text]) for text in texts]
    audio = [torch.tensor(tone + random.normal(0, noise, len(tone)), dtype=torch.float32) for tone in tones]
    labels = [torch.tensor([*text, END]) for text in texts]
    return Batch(
        inputs=torch.nn.utils.rnn.pad_sequence(audio, True),
        attention_mask=torch.nn.utils.rnn.pad_sequence(
            [torch.ones(len(each), dtype=torch.long) for each in audio], True
        ),
        labels=torch.nn.utils.rnn.pad_sequence(labels, True, IGNORE_INDEX),
        ids=[str(number) for number in range(len(texts))],
        texts=[""] * len(texts),
        seconds=1.0,
        prompts=prompts,
    )


def drawn_texts(number, seed):
    """Texts that count up to the last token, some tokens replaced by others."""
    random = np.random.default_rng(seed)
    counted = [range(random.integers(5, 10), TOKENS[-1] + 1) for _ in range(number)]
    return [[int(random.choice(TOKENS)) if random.random() < 0.15 else token for token in text] for text in counted]


def joined(decoder, seed=0):
    """A model with a CTC head and random weights."""
    torch.manual_seed(seed)
    config = HubertConfig(
        hidden_size=144, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(32, 32),
        conv_kernel=(10, 3), conv_stride=(5, 4), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        apply_spec_augment=False,
    )  # fmt: skip
    model = SpeechEncoderDecoder(encoder=HubertModel(config), decoder=decoder).eval()
    model.set_special_tokens(START, END, PAD)
    model.add_ctc_head(model.decoder.config.vocab_size)
    return model.eval()


def two_tokens(seed=0):
    """A model of the seven tokens of `AB`, with weights that make some texts far more probable than others."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(AB), is_decoder=True, add_cross_attention=True, **sizes)
    model = joined(BertLMHeadModel(config), seed)
    for layer in (model.ctc_head, model.decoder.get_output_embeddings()):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return model


def train(model, steps=30):
    """Trains the decoder to count up, as the texts mostly do, and the CTC head to hear tones; the encoder stays random."""
    batch = batch_of(drawn_texts(32, seed=1), seed=1)
    with torch.no_grad():
        encoded = model.encode(batch.inputs, batch.attention_mask)
    inside = torch.arange(encoded.encoder_frames.shape[1]) * HOP % SAMPLES
    heard = batch.labels.repeat_interleave(SAMPLES // HOP, 1)[:, : len(inside)]
    heard = heard.masked_fill((inside < SAMPLES // 4) | (heard < TOKENS[0]), PAD)
    fit(
        model.ctc_head, 100, lambda: torch.nn.functional.cross_entropy(model.ctc_head(encoded.encoder_frames).mT, heard)
    )
    fit(model.decoder, steps, lambda: model(encoder_outputs=encoded, labels=batch.labels).loss)
    return model


def fit(module, steps, loss):
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

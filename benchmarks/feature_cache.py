"""Epochs of a frozen encoder, with and without its outputs on disk, and of stock transformers: CPU seconds, one thread.

python benchmarks/feature_cache.py

The same weights, optimizer and sorted batches everywhere: wav2vec2 256 x 6 with the published 7 x 512 convolutions (layer
norm), BERT decoder 256 x 4, vocabulary 30,522, log-normal durations of 1 to 20 s. Audio is noise that is read already.
"""

import copy
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertLMHeadModel, SpeechEncoderDecoderModel, Wav2Vec2Config, Wav2Vec2Model

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.data.collate import fingerprint
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.training.feature_cache import FeatureCache, Store
from sedtrain.training.finetune import FineTuning

ROUNDS, NUM_UTTERANCES, BATCH_SECONDS, RATE, VOCABULARY = 3, 12, 24, 16_000, 30_522
TOKENS_PER_SECOND = 4


def parts() -> tuple[Any, Any]:
    size = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    front_end = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
    alike_each_time = {"mask_time_prob": 0.0, "layerdrop": 0.0}
    encoder = Wav2Vec2Model(Wav2Vec2Config(**size, num_hidden_layers=6, **front_end, **alike_each_time))
    roles = {"is_decoder": True, "add_cross_attention": True, "vocab_size": VOCABULARY}
    return encoder, BertLMHeadModel(BertConfig(**size, num_hidden_layers=4, **roles))


def batches() -> list[Batch]:
    seconds = torch.randn(NUM_UTTERANCES).mul(0.6).exp().mul(6).clamp(1, 20).sort(descending=True).values.tolist()
    groups: list[list[float]] = [[]]
    for each in seconds:
        if groups[-1] and (len(groups[-1]) + 1) * groups[-1][0] > BATCH_SECONDS:
            groups.append([])
        groups[-1].append(each)
    return [batch(group) for group in groups]


def batch(seconds: list[float]) -> Batch:
    audio = [torch.randn(int(RATE * each)) for each in seconds]
    labels = [torch.randint(999, VOCABULARY, (int(TOKENS_PER_SECOND * each) + 1,)) for each in seconds]
    return Batch(
        inputs=pad_sequence(audio, batch_first=True),
        attention_mask=pad_sequence([torch.ones_like(each, dtype=torch.long) for each in audio], batch_first=True),
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        ids=[""] * len(seconds),
        texts=[""] * len(seconds),
        seconds=sum(seconds),
        keys=[fingerprint(each) for each in audio],
    )


def epoch(model: Any, some: list[Batch], cache: FeatureCache | None = None) -> float:
    """CPU seconds of a step for each batch."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
    start = time.process_time()
    for each in some:
        served: AbstractContextManager[None] = nullcontext() if cache is None else cache.serve(model, each)
        with served:
            loss = model(each.inputs, attention_mask=each.attention_mask, labels=each.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder, decoder = parts()
    stock = SpeechEncoderDecoderModel(encoder=copy.deepcopy(encoder), decoder=copy.deepcopy(decoder)).train()
    stock.encoder.requires_grad_(False)
    stock.config.decoder_start_token_id, stock.config.pad_token_id = 101, 0
    ours = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).train()
    ours.set_special_tokens(101, 102, 0)
    FineTuning(["encoder"]).prepare(ours)
    ours.encoder.eval()
    some = batches()
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(partial(Store, Path(folder), max_bytes=1e9, num_ranks=1), {})
        first = epoch(ours, some, cache)
        rounds = [(epoch(ours, some, cache), epoch(ours, some), epoch(stock, some)) for _ in range(ROUNDS)]
    cached, computed, theirs = map(min, zip(*rounds, strict=True))
    print(
        f"{sum(each.seconds for each in some):.0f} s of audio: transformers {theirs:.1f} s, without cache {computed:.1f} s"
    )
    print(
        f"first epoch with it {first:.1f} s, later {cached:.2f} s: {theirs / cached:.0f} and {computed / cached:.1f} times"
    )


if __name__ == "__main__":
    main()

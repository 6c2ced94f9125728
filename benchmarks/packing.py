"""Training steps with the padding of a batch and without it: CPU seconds and memory, one thread, in turns.

python benchmarks/packing.py
"""

import time
from collections import defaultdict
from functools import partial

import numpy as np
import torch
from feature_cache import parts
from memory import peak

from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

BATCH_SIZE, NUM_BATCHES, ROUNDS = 6, 4, 2


def model_of() -> SpeechEncoderDecoder:
    torch.manual_seed(0)
    encoder, decoder = parts()
    model = SpeechEncoderDecoder(encoder=encoder, decoder=decoder).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def batch_of(seconds: np.ndarray) -> dict[str, torch.Tensor]:
    """Noise of these lengths, and four tokens a second."""
    lengths, tokens = torch.tensor(seconds * 16_000).long(), torch.tensor(seconds * 4).long()
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    labels = torch.randint(5, 30_000, (len(seconds), int(tokens.max())))
    labels[torch.arange(labels.shape[1]) >= tokens[:, None]] = -100
    return {"inputs": torch.randn(mask.shape) * mask, "attention_mask": mask, "labels": labels}


def step(model: SpeechEncoderDecoder, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of a forward and backward pass."""
    start = time.process_time()
    model(**batch).loss.backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    seconds = np.random.default_rng(0).lognormal(np.log(5), 0.6, BATCH_SIZE * NUM_BATCHES).clip(1, 20)
    for frozen in ("nothing", "convolutions"):
        model = model_of()
        if frozen == "convolutions":
            model.freeze_feature_encoder()
        for order, sorted_seconds in (("random", seconds), ("bucketed", np.sort(seconds))):
            best, peaks = defaultdict(float), defaultdict(float)
            for part in np.split(sorted_seconds, NUM_BATCHES):
                batch, times = batch_of(part), defaultdict(list)
                for choice in ("never", "always") * ROUNDS:
                    model.encoder.config.packing = choice
                    times[choice].append(step(model, batch))
                for choice in times:
                    model.encoder.config.packing = choice
                    best[choice] += min(times[choice])
                    peaks[choice] = max(peaks[choice], peak(partial(step, model, batch)) / 1e6)
            padding = 1 - seconds.sum() / sum(len(each) * each.max() for each in np.split(sorted_seconds, NUM_BATCHES))
            print(f"{frozen} frozen, {order} batches, {padding:.0%} padding: ", end="")
            print(f"{best['never']:.2f} s and {peaks['never']:.0f} MB with it, ", end="")
            print(f"{best['always']:.2f} s and {peaks['always']:.0f} MB without", flush=True)


if __name__ == "__main__":
    main()

"""Convolutional front ends of wav2vec2's size against those of transformers: CPU seconds of one padded batch, one thread.

python benchmarks/front_end.py
"""

import time

import torch
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from sedtrain.models.encoder import encoder_from_config

LENGTHS = (48_000, 45_000, 42_000, 40_000)
ROUNDS = 5


def measured(encoder: PreTrainedModel, audio: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """CPU seconds of a forward pass without gradients, and of a forward and backward pass."""
    start = time.process_time()
    with torch.no_grad():
        encoder(audio, attention_mask=mask)
    middle = time.process_time()
    encoder(audio, attention_mask=mask)[0].sum().backward()
    return middle - start, time.process_time() - middle


def main() -> None:
    torch.set_num_threads(1)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    audio = torch.randn(mask.shape) * mask
    for norm in ("layer", "group"):
        config = Wav2Vec2Config(
            hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512, mask_time_prob=0.0,
            feat_extract_norm=norm, conv_bias=norm == "layer",
        )  # fmt: skip
        encoders = Wav2Vec2Model(config).train(), encoder_from_config(config).train()
        rounds = [[measured(encoder, audio, mask) for encoder in encoders] for _ in range(ROUNDS)]
        stock, ours = (tuple(map(min, zip(*times, strict=True))) for times in zip(*rounds, strict=True))
        forward, both = (s / o for s, o in zip(stock, ours, strict=True))
        print(f"{norm} norm: transformers {stock[0]:.2f} s forward, {stock[1]:.2f} s with backward; ", end="")
        print(f"sedtrain {ours[0]:.2f} s, {ours[1]:.2f} s: {forward:.2f} and {both:.2f} times as fast")


if __name__ == "__main__":
    main()

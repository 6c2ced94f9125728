"""Decoding in 8 bits beside decoding in float32: errors of a trained model, and time of a model of base size.

python -m sedtrain encoder=hubert decoder=bert run_dir=RUN    # the model, about eight minutes
python benchmarks/int8.py RUN                                 # two minutes

wer    of greedy search on the test utterances of the embedded corpus, and its paired test
times  how many times as fast 8 bits are, in CPU seconds of one thread, the fastest of five rounds in turns:
       HuBERT-base and BART-base with random weights, noise of 10 s, 40 tokens
"""

import argparse
import time

import torch
from decoding import METRICS, created
from transformers import BartConfig, BartForCausalLM, HubertConfig, HubertModel

from sedtrain.build_saved import connect
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.searches import SearchInputs, by_decoder
from sedtrain.evaluation.statistics import confidence_intervals, paired_test
from sedtrain.models.int8 import in_int8
from sedtrain.models.saved import load
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

NUM_TOKENS = 40


def errors(run):
    saved, data = load(run), created("data")
    connect(data, saved, ["test"])
    batches, counts = list(data.batches("test")), {}
    references = [text for batch in batches for text in batch.texts]
    for name, model in (("float32", saved.model), ("int8", in_int8(saved.model))):
        found = [each for batch in batches for each in decode_batch(model, saved.tokenizer, batch, DecodingOptions())]
        counts[name] = METRICS.count(references, [each.texts[0] for each in found])
        wer = confidence_intervals(METRICS, counts[name])["wer"]
        print(f"  {name:8} wer {wer.value:.2%} ({wer.low:.2%} to {wer.high:.2%})")
    test = paired_test(METRICS, counts["float32"], counts["int8"])["wer"]
    print(f"  difference {test.difference:+.2%} ({test.low:+.2%} to {test.high:+.2%}), p = {test.p_value:.3f}")


def base_model():
    torch.manual_seed(0)
    decoder = BartForCausalLM(
        BartConfig(d_model=768, decoder_layers=6, decoder_ffn_dim=3072, decoder_attention_heads=12)
    )
    model = SpeechEncoderDecoder(encoder=HubertModel(HubertConfig()), decoder=decoder)
    model.set_special_tokens(2, 2, 1)
    return model.eval()


@torch.inference_mode()
def speed(rounds=5):
    floats, best = base_model(), {}
    models = {"float32": floats, "int8": in_int8(floats)}
    audio, prompt = 0.1 * torch.randn(1, 160_000), torch.full((1, 1), 2)
    for model in models.values():
        model.generation_config.min_new_tokens = NUM_TOKENS
    for _ in range(rounds):
        for name, model in models.items():
            for part in ("encoder", "decoder"):
                began = time.process_time()
                if part == "encoder":
                    encoded = model.encode(audio, torch.ones_like(audio, dtype=torch.long))
                else:
                    by_decoder(model, SearchInputs(encoded, prompt, torch.tensor([NUM_TOKENS]), DecodingOptions()))
                taken = time.process_time() - began
                best[name, part] = min(taken, best.get((name, part), taken))
    for part in ("encoder", "decoder"):
        exact, small = best["float32", part], best["int8", part]
        print(f"  {part} float32 {exact:.2f} s, int8 {small:.2f} s: {exact / small:.2f} times as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a training on the embedded corpus")
    torch.set_num_threads(1)
    errors(parser.parse_args().run)
    speed()

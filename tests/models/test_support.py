"""Every encoder with three decoders, every decoder with two encoders or three: what the table in docs/support.md claims.

`SEDTRAIN_WRITE_SUPPORT=1 python -m pytest tests/models/test_support.py` writes the table again.
"""

import os
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from families import (
    ENCODERS,
    END,
    OPTIONS,
    PAD,
    PREFIXED,
    STACKS,
    START,
    batch_of,
    tiny_decoder,
    tiny_encoder,
)

from sedtrain.models.decoder import CROSS_ATTENTION
from sedtrain.models.encoder import loads_in_stock_transformers
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder

PAIRS = sorted(
    {
        *product(ENCODERS, ["bert", "gpt2", "bart"]),
        *product(["hubert", "whisper"], OPTIONS),
        *product(["sew"], STACKS),
        *product(["hubert", "whisper", "w2v_bert"], PREFIXED),
    }
)
TABLE = Path(__file__).parents[2] / "docs/support.md"
BACKENDS = {"eager": None, "sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
ROWS: dict[tuple[str, str], list[str]] = {}


def joined(encoder, decoder):
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder), decoder=tiny_decoder(decoder))
    model.set_special_tokens(START, END, PAD)
    return model.eval()


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def pair(request):
    """The pair's names, its model and a batch whose first utterance is the shorter one."""
    model = joined(*request.param)
    ROWS[request.param] = []
    return request.param, model, batch_of(model, 0.6, 1.0)


def logits(model, batch, rows=slice(None), inputs=None):
    inputs = batch.inputs if inputs is None else inputs
    ids = torch.tensor([[START, 5, 9, 7]]).expand(len(inputs[rows]), 4)
    with torch.no_grad():
        return model(inputs[rows], attention_mask=batch.attention_mask[rows], decoder_input_ids=ids).logits


def generated(model, batch, **options):
    transformers.set_seed(0)
    return model.generate(
        batch.inputs, attention_mask=batch.attention_mask, max_new_tokens=3, min_new_tokens=3, **options
    )


def test_it_trains_with_gradients_everywhere_and_hears_the_audio(pair):
    names, model, batch = pair
    model.train().zero_grad()
    loss = model(batch.inputs, attention_mask=batch.attention_mask, labels=batch.labels).loss
    loss.backward()
    model.eval()
    assert loss.isfinite()
    without = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
    assert without == []
    assert any(weight.grad.any() for weight in model.encoder.parameters() if weight.grad is not None)
    cross = [weight for name, weight in model.decoder.named_parameters() if CROSS_ATTENTION.search(name)]
    assert any(weight.grad.any() for weight in cross) or names[1] in PREFIXED
    assert (logits(model, batch) - logits(model, batch, inputs=batch.inputs.roll(1, 0))).abs().max() > 1e-6


def test_padding_changes_nothing_whatever_it_holds(pair):
    _, model, batch = pair
    alone = batch_of(model, 0.6)
    garbage = batch.inputs.clone()
    time_last = model.encoder.main_input_name == "input_values" or garbage.shape[-1] == batch.attention_mask.shape[1]
    padding = ~batch.attention_mask.bool()
    (garbage if garbage.ndim == 2 or not time_last else garbage.transpose(1, 2))[padding] = 1e3
    expected = logits(model, alone)
    for inputs in (batch.inputs, garbage):
        assert (logits(model, batch, slice(0, 1), inputs) - expected).abs().max() < 1e-4
        assert (logits(model, batch, inputs=inputs)[:1] - expected).abs().max() < 1e-4
    assert generated(model, batch)[0].tolist() == generated(model, alone)[0].tolist()


def test_it_generates_and_cached_is_uncached_is_teacher_forcing(pair):
    _, model, batch = pair
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        tokens = generated(model, batch, **options)
        assert tokens.shape == (2, 4)
        assert tokens.tolist() == generated(model, batch, use_cache=False, **options).tolist()
    output = generated(model, batch, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        forced = model(
            batch.inputs, attention_mask=batch.attention_mask, decoder_input_ids=output.sequences[:, :-1]
        ).logits
    assert (torch.stack(output.logits, 1) - forced).abs().max() < 1e-4


def test_it_is_saved_and_loaded(pair, tmp_path):
    (encoder, decoder), model, batch = pair
    model.save_pretrained(tmp_path)
    expected = logits(model, batch)
    assert (logits(SpeechEncoderDecoder.from_pretrained(tmp_path).eval(), batch) - expected).abs().max() < 1e-5
    stock = all(map(loads_in_stock_transformers, (model.config.encoder, model.config.decoder)))
    stock = stock and decoder not in PREFIXED
    if stock:
        base = transformers.SpeechEncoderDecoderModel.from_pretrained(tmp_path).eval()
        alone = batch_of(model, 1.0)
        with torch.no_grad():
            ours, theirs = (each(alone.inputs, labels=alone.labels) for each in (model, base))
        assert (ours.logits - theirs.logits).abs().max() < 1e-5
        assert (ours.loss - theirs.loss).abs() < 1e-5
        assert ours_and_base_write_the_same(model, base, alone)
    ROWS[encoder, decoder].append("yes" if stock else "sedtrain")


def ours_and_base_write_the_same(model, base, batch):
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    return model.generate(batch.inputs, **options).tolist() == base.generate(batch.inputs, **options).tolist()


@pytest.mark.filterwarnings(
    "ignore:_compile flag", "ignore:flex_attention called without", "ignore:.*torch.jit.script_method"
)
def test_attention_backends_agree(pair):
    names, model, batch = pair
    expected, works = logits(model, batch), []
    for attention, flag in BACKENDS.items():
        if all(flag is None or getattr(type(part), flag) for part in (model.encoder, model.decoder)):
            model.set_attn_implementation(attention)
            with torch.compiler.set_stance("force_eager"):  # FlexAttention as written: compiling it takes long
                assert (logits(model, batch) - expected).abs().max() < 1e-5
            works.append(attention)
    ROWS[names].append(", ".join(works))


def table():
    head = Path(TABLE).read_text(encoding="utf-8").partition("| encoder |")[0]
    lines = ["| encoder | decoder | folder loads in | attention |", "|---|---|---|---|"]
    lines += [f"| {' | '.join([*pair, *ROWS[pair]])} |" for pair in PAIRS]
    return head + "\n".join(lines).replace("| yes |", "| transformers, sedtrain |") + "\n"


def test_the_table_says_what_was_found():
    if set(ROWS) != set(PAIRS) or any(len(row) < 2 for row in ROWS.values()):
        pytest.skip("the table is of all pairs")
    if os.environ.get("SEDTRAIN_WRITE_SUPPORT"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table()

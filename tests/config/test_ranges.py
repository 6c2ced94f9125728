"""Numbers outside the range of their option, refused by the check of the command line before torch is imported."""

import re
from math import inf, nan
from typing import get_args

import pytest

from sedtrain import ranges
from sedtrain.annotations import evaluated, nested_types
from sedtrain.config.overrides import check_command_line
from sedtrain.config.schema import conf_dir
from sedtrain.config.signatures import read_signature
from sedtrain.errors import UserError

POSITIVE, FROM_0 = "a number above 0", "a number of 0 or more"
FINITE = "a finite number"
COUNT, COUNT_FROM_0 = "a whole number of 1 or more", "a whole number of 0 or more"
UP_TO_1000, UP_TO_MILLION = "a whole number from 1 to 1,000", "a whole number from 1 to 1,000,000"
UP_TO_1000_FROM_0 = "a whole number from 0 to 1,000"
FRACTION, BELOW_1, INNER = "a fraction from 0 to 1", "a fraction from 0 to below 1", "a fraction between 0 and 1"
ABOVE_0 = "a fraction above 0, at most 1"

# What has to be chosen before an option exists, by the beginning of its name.
CHOICES = {
    "memory_gb": ["task=fit_batches"],
    "adapter.num_heads": ["adapter=transformer"],
    "adapter.num_layers": ["adapter=conv"],
    "adapter.num_queries": ["adapter=qformer"],
    "adapter.stride": ["adapter=conv"],
    "adapter.window": ["adapter=qformer"],
    "augment.gain": ["augment=gain"],
    "augment.noise": ["augment=noise"],
    "augment.recorded_noise": ["augment=recorded_noise", "augment.recorded_noise.path=noises"],
    "augment.reverb": ["augment=reverb", "augment.reverb.folder=rooms"],
    "augment.speed": ["augment=speed"],
    "augment.time_mask": ["augment=time_mask"],
    "callbacks.average": ["callbacks=[default,average]"],
    "callbacks.ema": ["callbacks=[default,ema]"],
    "data.mix": ["data=mix", "data.mix.german.path=a", "data.mix.english.path=b"],
    "decoding.t": ["decoding=sample"],
    "finetune.alpha": ["finetune=lora"],
    "finetune.dropout": ["finetune=lora"],
    "finetune.rank": ["finetune=lora"],
    "finetune.thaw": ["finetune=gradual"],
    "hydra.sweeper": ["-m", "hydra/sweeper=optuna", "size=tiny,base"],
    "scheduler.final_scale": ["scheduler=tri_stage"],
    "scheduler.hold_fraction": ["scheduler=tri_stage"],
    "scheduler.initial_scale": ["scheduler=tri_stage"],
}
# option, a value that it does not take, and how the range is told
ROWS = [
    ("seed", -1, "a whole number from 0 to 4294967295"),
    ("seed", 2**32, "a whole number from 0 to 4294967295"),
    ("memory_gb", 0, f"{POSITIVE}, or null"),
    ("memory_gb", inf, f"{POSITIVE}, or null"),
    ("inspect_utterances", 0, f"{COUNT}, or null"),
    ("vocabulary_texts", -1, f"{COUNT_FROM_0}, or null"),
    ("hydra.sweeper.num_trials", 0, COUNT),
    ("hydra.sweeper.num_parallel", 0, COUNT),
    ("hydra.sweeper.full_trials", -1, COUNT_FROM_0),
    ("hydra.sweeper.warmup_steps", -1, COUNT_FROM_0),
    ("hydra.sweeper.seed", -1, COUNT_FROM_0),
    ("trainer.val_check_interval", 0, COUNT),
    ("trainer.accumulate_grad_batches", 0, COUNT),
    ("trainer.max_time", 5, "this has no unit"),
    ("trainer.max_time", 0.5, "this has no unit"),
    ("data.batch_seconds", -3, POSITIVE),
    ("data.batch_seconds", nan, POSITIVE),
    ("data.batch_tokens", 0, f"{COUNT}, or null"),
    ("data.num_buckets", 0, UP_TO_1000),
    ("data.block_utterances", 0, COUNT),
    ("data.temperature", 0, POSITIVE),
    ("data.min_seconds", -1, FROM_0),
    ("data.min_characters", -1, COUNT_FROM_0),
    ("data.max_bad_fraction", 1.5, FRACTION),
    ("data.keep_decoded_hours", -1, FROM_0),
    ("data.num_workers", -1, f"{UP_TO_1000_FROM_0}, or null"),
    ("data.mix.german.weight", 0, POSITIVE),
    ("data.mix.german.weight", inf, POSITIVE),
    ("augment.speed.probability", 2, FRACTION),
    ("augment.gain.probability", -0.5, FRACTION),
    ("augment.noise.probability", nan, FRACTION),
    ("augment.recorded_noise.probability", 2, FRACTION),
    ("augment.reverb.probability", 2, FRACTION),
    ("augment.time_mask.probability", 2, FRACTION),
    ("augment.time_mask.num_masks", 0, UP_TO_1000),
    ("augment.time_mask.max_seconds", 0, POSITIVE),
    ("augment.time_mask.max_fraction", 0, ABOVE_0),
    ("adapter.num_heads", 0, COUNT),
    ("adapter.num_layers", 0, UP_TO_1000),
    ("adapter.num_queries", 0, UP_TO_1000),
    ("adapter.stride", 0, COUNT),
    ("adapter.window", 0, UP_TO_MILLION),
    ("tokenizer.max_texts", 0, f"{COUNT}, or null"),
    ("loss.label_smoothing", 7, FRACTION),
    ("loss.ctc_weight", 5, f"{FRACTION}, or null"),
    ("loss.ctc_weight", nan, f"{FRACTION}, or null"),
    ("augment.speed.factors", [0], f"a list, each {POSITIVE}"),
    ("augment.gain.gain_db", [-inf, 6], f"a list, each {FINITE}"),
    ("decoding.length_penalty", 1e20, "a number from -10 to 10"),
    ("callbacks.guards.min_audio_gain", inf, FINITE),
    ("callbacks.progress.log_every_seconds", 0, POSITIVE),
    ("trainer.gradient_clip_val", -1, FROM_0),
    ("trainer.log_every_n_steps", -1, COUNT_FROM_0),
    ("optimizer.lr", nan, FINITE),
    ("decoding.num_beams", 0, UP_TO_1000),
    *((name, 100_000, UP_TO_1000) for name in ("decoding.num_beams", "data.num_buckets", "adapter.num_queries")),
    ("decoding.num_return_sequences", 0, UP_TO_1000),
    ("decoding.ctc_weight", 1.5, FRACTION),
    ("decoding.max_new_tokens", 0, f"{COUNT}, or null"),
    ("decoding.no_repeat_ngram_size", -1, COUNT_FROM_0),
    ("decoding.top_k", -1, COUNT_FROM_0),
    ("decoding.temperature", -1, POSITIVE),
    ("decoding.temperature", inf, POSITIVE),
    ("decoding.top_p", 0, ABOVE_0),
    ("scheduler.warmup_fraction", 2, FRACTION),
    ("scheduler.hold_fraction", -0.1, FRACTION),
    ("scheduler.initial_scale", 2, FRACTION),
    ("scheduler.final_scale", 0, ABOVE_0),
    ("finetune.thaw.encoder", -1, COUNT_FROM_0),
    ("finetune.learning_rates.encoder", 0, POSITIVE),
    ("finetune.layer_decay", 0, ABOVE_0),
    ("finetune.layer_decay", 1.5, ABOVE_0),
    ("finetune.rank", 0, UP_TO_1000),
    ("finetune.alpha", 0, POSITIVE),
    ("finetune.dropout", 1, BELOW_1),
    ("callbacks.ema.decay", 1, INNER),
    ("callbacks.average.number", 0, COUNT),
    ("callbacks.guards.max_bad_steps", 0, COUNT),
    ("callbacks.guards.min_loss_rise", 0, POSITIVE),
    ("callbacks.guards.probe_after", 2, FRACTION),
    ("callbacks.checkpoints.every_steps", 0, f"{COUNT}, or null"),
    ("callbacks.checkpoints.every_minutes", 0, f"{POSITIVE}, or null"),
    ("callbacks.checkpoints.every_epochs", 0, f"{COUNT}, or null"),
]


@pytest.mark.parametrize(("option", "value", "words"), ROWS, ids=[f"{option}={value}" for option, value, _ in ROWS])
def test_a_value_out_of_range_is_refused_with_its_range(option, value, words):
    chosen = next((each for start, each in CHOICES.items() if option.startswith(start)), [])
    with pytest.raises(UserError) as caught:
        check_command_line([*chosen, f"{option}={value}"])
    [error] = caught.value.errors
    assert (error.option, str(error.value).replace(".0", "")) == (option, str(value).replace(".0", ""))
    assert error.wrong == (words if words.startswith("this") else f"expected {words}")
    assert error.write.startswith("write ") and f"{option}=" in error.write


@pytest.mark.parametrize(("option", "words"), sorted({(option, words) for option, _, words in ROWS}))
def test_what_is_told_to_be_written_is_taken(option, words):
    chosen = next((each for start, each in CHOICES.items() if option.startswith(start)), [])
    values = {
        "this has no unit": ["{minutes: 5}", "00:01:00:00"],
        POSITIVE: [1e-3],
        FRACTION: [0, 1],
        BELOW_1: [0, 0.9],
    }
    values |= {FROM_0: [0], COUNT: [1], COUNT_FROM_0: [0], INNER: [0.999], ABOVE_0: [1e-3, 1]}
    values |= {FINITE: [1.5], f"a list, each {FINITE}": [[-10, 6]], f"a list, each {POSITIVE}": [[1.1]]}
    values |= {"a number from -10 to 10": [-10, 10], UP_TO_1000: [1, 1_000], UP_TO_1000_FROM_0: [0], UP_TO_MILLION: [1]}
    ends = values.get(words.removesuffix(", or null"), [0, 2**32 - 1])
    for value in [*ends, *(["null"] if words.endswith("null") else [])]:
        assert check_command_line([*chosen, f"{option}={value}"])


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("Finite", [-1e9, 0, 1e9], []),
        ("Positive", [1e-9, 1e9], [0, -1]),
        ("NonNegative", [0, 1e9], [-1e-9]),
        ("Fraction", [0, 0.5, 1], [-1e-9, 1.001]),
        ("PositiveFraction", [1e-9, 1], [0, 1.001]),
        ("FractionBelowOne", [0, 0.999], [-1e-9, 1]),
        ("InnerFraction", [1e-9, 0.999], [0, 1]),
        ("Count", [1, 10**9], [0, -1]),
        ("CountOrZero", [0, 10**9], [-1]),
    ],
)
def test_the_ends_of_a_range_belong_to_it_as_its_words_say(name, inside, outside):
    _, numbers = get_args(getattr(ranges, name))
    assert [each for each in inside if each not in numbers] == []
    assert [each for each in [*outside, nan, inf, -inf] if each in numbers] == []


def numeric_without_range(target):
    for each in read_signature(target).parameters.values():
        kinds = [] if each.annotation is each.empty else list(nested_types(evaluated(each.annotation)))
        if {int, float} & set(filter(lambda kind: isinstance(kind, type), kinds)) and not any(
            isinstance(kind, ranges.Range) for kind in kinds
        ):
            yield f"{target}.{each.name}"


def test_every_number_that_an_option_takes_has_a_range():
    texts = [file.read_text(encoding="utf-8") for file in conf_dir().rglob("*.yaml")]
    targets = {name for text in texts for name in re.findall(r"_target_: (sedtrain\.\S+)", text)}
    assert len(targets) > 25
    known_later = {"input_dim", "output_dim"}  # widths, which build hands over
    elsewhere = {"batches", "seed"}  # checked bucket by bucket; the root's
    found = [name for target in sorted(targets) for name in numeric_without_range(target)]
    assert [name for name in found if name.rpartition(".")[2] not in known_later | elsewhere] == []

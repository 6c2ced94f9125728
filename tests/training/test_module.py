"""The training step on a tiny batch, frozen parts, and the weight of CTC that build chooses."""

import copy

import lightning
import numpy as np
import pytest
import torch
from corpora import syllables
from hydra import compose, initialize_config_dir

from sedtrain import build
from sedtrain.batch import Utterance
from sedtrain.config.schema import conf_dir, register
from sedtrain.data.datamodule import SpeechTextDataModule
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.decoding.recordings import RecordingDecoder
from sedtrain.errors import UserError
from sedtrain.evaluation.evaluate import evaluate
from sedtrain.evaluation.metric_set import MetricSet
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.models.losses import LossWeights, ctc, shift_right
from sedtrain.training.module import SpeechSeq2SeqModule

SMALL = ["encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1", "decoding.max_new_tokens=5"]


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    """A function of overrides: the connected objects of a run on the small corpus."""

    def run(*overrides):
        register()
        folder = tmp_path_factory.mktemp("run")
        choices = ["data=parquet", f"data.path={corpus}", f"run_dir={folder}", "logger=none", "trainer.max_steps=2"]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            connected = build.training_run(compose("train", [*choices, *SMALL, *overrides]))
        connected.module.trainer = connected.trainer
        return connected

    return run


@pytest.fixture
def run(built):
    return built()


@pytest.fixture
def batch(run):
    return next(run.data.batches("validation"))


def per_token(module, batch):
    """Cross-entropy of a batch in nats per target token."""
    sums = module.losses(batch)
    return sums.cross_entropy / sums.num_tokens


def test_the_loss_falls_within_five_steps(run, batch):
    module = run.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_the_cross_entropy_is_the_loss_of_the_model_in_evaluation(run, batch):
    module = run.module.eval()
    expected = module.model(batch.inputs, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(per_token(module, batch), expected, rtol=1e-5, atol=1e-6)


def test_the_loss_to_minimise_is_the_weighted_sum_of_two_sums(run, batch):
    module = run.module.eval()
    cross_entropy, num_tokens, ctc_loss, num_aligned, _ = module.losses(batch)
    torch.testing.assert_close(1024 * module.training_step(batch, 0), 0.7 * cross_entropy + 0.3 * ctc_loss)
    assert num_tokens == (batch.labels >= 0).sum()
    config = module.model.config
    output = module.model(
        batch.inputs,
        attention_mask=batch.attention_mask,
        decoder_input_ids=shift_right(batch.labels, config.decoder_start_token_id, config.pad_token_id),
    )
    num_frames = module.model.encoder._get_feat_extract_output_lengths(batch.attention_mask.sum(1))
    logits = module.model.ctc_head(output.encoder_last_hidden_state)
    loss_sum, num_tokens = ctc(logits, num_frames, batch.labels, blank=config.pad_token_id, end=config.eos_token_id)
    torch.testing.assert_close(ctc_loss, loss_sum)
    assert num_aligned == num_tokens


def test_smoothing_acts_in_training_only(run, batch):
    module = run.module
    assert module.weights.label_smoothing == 0.1
    smoothed = per_token(module.train(), batch)
    plain = per_token(module.eval(), batch)
    assert (smoothed - plain).abs() > 1e-3
    sums = module.train().losses(batch)
    torch.testing.assert_close(sums.unsmoothed / sums.num_tokens, plain, rtol=1e-4, atol=0)
    assert not sums.unsmoothed.requires_grad


def test_without_ctc_there_is_no_ctc_head(built, batch):
    module = built("loss=cross_entropy").module
    assert module.model.ctc_head is None
    sums = module.losses(batch)
    assert 1024 * module.training_step(batch, 0) == sums.cross_entropy
    assert sums.ctc == sums.num_aligned == 0


def test_a_validation_encodes_each_batch_once_and_writes_the_texts_of_decoding_alone(run, batch):
    module = run.module.eval()
    assert not batch.attention_mask.all()
    alone = decode_batch(module.model, module.tokenizer, batch, module.decoding)
    calls = []
    hook = module.model.encoder.register_forward_hook(lambda *_: calls.append(1))
    found = module.validation_step(batch, 0)
    hook.remove()
    assert len(calls) == 1 and found == {"hypotheses": [each.texts[0] for each in alone]}
    loss, num_tokens = module.validation_sums.tolist()[:2]
    assert loss / num_tokens == pytest.approx(per_token(module, batch).item(), rel=1e-5)


def test_a_batch_with_nothing_readable_adds_nothing(run):
    module = run.module
    loss = module.training_step(run.data.collator([]), 0)
    loss.backward()
    assert loss == 0
    assert module.micro_batches[-1].tolist() == [0, 0, 0, 0, 0]
    assert all(not weight.grad.any() for weight in module.parameters())


def test_a_validation_in_which_nothing_is_readable_is_an_error(run):
    class Unreadable(lightning.Callback):
        def on_validation_batch_start(self, trainer, pl_module, batch, *_):
            batch.ids.clear()

    run.trainer.callbacks.append(Unreadable())
    with pytest.raises(UserError) as raised:
        run.trainer.validate(run.module, datamodule=run.data, verbose=False)
    assert str(raised.value) == (
        "1 problem:\n\n  data.validation_split = 'validation'\n"
        "    no utterance of this split could be decoded, so the best weights cannot be chosen\n"
        "    skipped.jsonl names the fault of each\n"
        "    write data.validation_split and data.columns of audio that can be decoded"
    )


def test_an_evaluation_in_which_nothing_is_readable_is_an_error(run):
    empty = run.data.collator([])
    with pytest.raises(UserError) as raised:
        evaluate(RecordingDecoder(run.saved, DecodingOptions()), [empty], [], MetricSet(["wer"]))
    assert str(raised.value) == (
        "1 problem:\n\n  data = '0 utterances'\n    none of the utterances could be decoded: there is nothing to score\n"
        "    write data.path and data.columns of audio that can be read; skipped.jsonl says what is wrong with these"
    )


def test_long_utterances_are_scored_by_the_text_of_their_windows(run):
    decoder = RecordingDecoder(run.saved, DecodingOptions(window=1.5, max_new_tokens=2))
    audio = np.concatenate([syllables(0.8), np.zeros(16_000, "float32"), syllables(0.8)])
    text = decoder.transcription("a", [audio]).text
    long = Utterance("a", torch.from_numpy(audio), 16_000, text, None, "someone", 2.6)
    scored = evaluate(decoder, [run.data.collator([])], [long], MetricSet(["wer"]))
    [found] = scored.hypotheses
    assert (found.id, found.reference, found.hypothesis, found.seconds) == ("a", text, text, 2.6)
    assert (scored.num_cut, scored.audio_seconds, len(decoder.transcription("a", [audio]).segments)) == (1, 2.6, 2)


# --- frozen parts


class Watch(lightning.Callback):
    """Notes after every backward which parts train and which have gradients."""

    def __init__(self, part):
        self.part, self.seen = part, []

    def on_after_backward(self, trainer, pl_module):
        part = pl_module.model.get_submodule(self.part)
        modes = {module.training for module in part.modules()}
        self.seen.append((modes, any(weight.grad is not None for weight in part.parameters())))


@pytest.mark.parametrize(
    ("option", "part", "moving"),
    [
        ("encoder_frozen", "encoder", "decoder"),
        ("feature_encoder_frozen", "encoder.feature_extractor", "encoder.feature_projection"),
    ],
)
def test_frozen_parts_stay_in_evaluation_mode_without_gradient_and_do_not_move(built, option, part, moving):
    run = built(f"finetune={option}", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1")
    watch = Watch(part)
    run.trainer.callbacks.append(watch)
    before = copy.deepcopy(run.module.model.state_dict())
    run.trainer.fit(run.module, datamodule=run.data)
    assert watch.seen == [({False}, False)] * 2
    after = run.module.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith(part))
    assert not all(torch.equal(before[name], after[name]) for name in before if name.startswith(moving))


def test_a_part_that_is_not_there_is_refused(built):
    with pytest.raises(
        UserError, match=r"finetune.frozen = 'ears'\n    the model has no part 'ears', it has encoder, adapter"
    ):
        built("finetune.frozen=[ears]")


# --- what build decides


def test_ctc_helps_by_default_where_the_encoder_starts_random(run):
    assert run.module.weights == LossWeights(label_smoothing=0.1, ctc_weight=0.3)


@pytest.mark.parametrize(("pretrained", "expected"), [("true", 0.0), ("false", 0.3)])
def test_ctc_is_off_by_default_where_the_encoder_is_pretrained(run, built, tmp_path, pretrained, expected):
    encoder = run.module.model.encoder
    encoder.save_pretrained(tmp_path)
    feature_extractor_of(encoder).save_pretrained(tmp_path)
    again = built(f"encoder.checkpoint={tmp_path}", f"pretrained={pretrained}")
    assert again.module.weights.ctc_weight == expected


def test_pretrained_parts_start_in_training_mode(run, built, tmp_path):
    """from_pretrained leaves evaluation mode, and Lightning does not change it: dropout would never act."""
    encoder = run.module.model.encoder
    encoder.save_pretrained(tmp_path)
    feature_extractor_of(encoder).save_pretrained(tmp_path)
    assert all(module.training for module in built(f"encoder.checkpoint={tmp_path}").module.modules())


def test_a_given_ctc_weight_is_kept(built):
    assert built("loss.ctc_weight=0.5").module.weights.ctc_weight == 0.5


def test_training_and_generation_start_end_and_pad_with_the_tokens_of_the_tokenizer(run):
    for config in (run.saved.model.config, run.saved.model.generation_config):
        assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_unequal_widths_without_an_adapter_are_refused(built):
    with pytest.raises(UserError, match="adapter = 'none'\n    the encoder is 96 wide and the decoder 144") as caught:
        built("adapter=none", "encoder.tiny.hidden_size=96")
    assert caught.value.write == "write adapter=linear, which projects one to the other"


def test_data_and_module_are_what_lightning_takes(run):
    assert isinstance(run.data, SpeechTextDataModule)
    assert isinstance(run.module, SpeechSeq2SeqModule)
    assert run.data.collator.decoder_start_token_id == run.saved.model.config.decoder_start_token_id

"""Every family of speech encoder, as its option file builds it."""

import pytest
import torch
from families import ENCODERS, tiny_encoder
from transformers import AutoModel, Wav2Vec2Config, WhisperConfig, WhisperModel

from sedtrain.batch import Utterance
from sedtrain.data.collate import Collator
from sedtrain.errors import UserError
from sedtrain.models.encoder import encoder_from_config
from sedtrain.models.family_settings import feature_extractor_of
from sedtrain.text.tokenizers import train_tokenizer

ALONE = ["whisper", "speech_to_text", "moonshine", "seamless_m4t", "seamless_m4t_v2", "speecht5"]


@pytest.fixture(scope="module", params=ENCODERS)
def named_encoder(request):
    return request.param, tiny_encoder(request.param)


def batch(encoder, *lengths):
    """A collated batch of noise of so many samples each, as the encoder's feature extractor prepares it."""
    collator = Collator(feature_extractor_of(encoder), train_tokenizer(["one"], "char", 50), 1)
    noise = [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in lengths]
    return collator([Utterance(str(len(each)), each, 16000, "one", None, None, len(each) / 16000) for each in noise])


@torch.inference_mode()
def frames(encoder, *lengths):
    """(B, T, D) frames of noise and the number of valid frames of each utterance."""
    prepared = batch(encoder, *lengths)
    output = encoder(prepared.inputs, attention_mask=prepared.attention_mask).last_hidden_state
    mask = encoder._get_feature_vector_attention_mask(output.shape[1], prepared.attention_mask)
    assert mask.shape == output.shape[:2]
    return output, mask.sum(1).tolist()


def test_the_folder_has_the_families():
    assert len(ENCODERS) == 17
    assert set(ALONE) < set(ENCODERS)


def test_frames_are_as_wide_as_the_configuration_says(named_encoder):
    _, encoder = named_encoder
    output, [num_frames] = frames(encoder, 16000)
    assert output.shape == (1, num_frames, encoder.config.hidden_size)
    assert output.isfinite().all()
    assert output.dtype == torch.float32


def test_every_family_makes_20_to_60_frames_a_second(named_encoder):
    _, encoder = named_encoder
    _, [num_frames] = frames(encoder, 5 * 16000)
    assert 5 * 20 < num_frames < 5 * 60


@pytest.mark.parametrize("num_samples", [1600, 4000, 16000, 16001])
def test_a_mask_of_samples_becomes_a_mask_of_as_many_frames_as_the_utterance_has_alone(named_encoder, num_samples):
    _, encoder = named_encoder
    alone, [num_alone] = frames(encoder, num_samples)
    _, [_, num_padded] = frames(encoder, 30000, num_samples)
    assert num_padded == num_alone == alone.shape[1]


@pytest.mark.parametrize("num_samples", [1600, 15999, 16000, 16161])
def test_padding_changes_no_frame(named_encoder, num_samples):
    _, encoder = named_encoder
    alone, [num_frames] = frames(encoder, num_samples)
    padded, _ = frames(encoder, 30000, num_samples)
    torch.testing.assert_close(padded[1, :num_frames], alone[0], rtol=0, atol=2e-5)


def test_every_parameter_that_trains_gets_a_gradient(named_encoder):
    _, encoder = named_encoder
    prepared = batch(encoder, 16000, 12000)
    output = encoder(prepared.inputs, attention_mask=prepared.attention_mask).last_hidden_state
    (output * torch.randn_like(output)).sum().backward()
    without = {n for n, weight in encoder.named_parameters() if weight.requires_grad and weight.grad is None}
    encoder.zero_grad()
    assert without == set()


# --- whisper


def test_whisper_computes_an_utterance_at_its_own_length():
    output, [num_frames] = frames(tiny_encoder("whisper"), 32000)
    assert output.shape[1] == num_frames == 100


def test_whisper_of_30_seconds_is_that_of_transformers():
    config = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=16, decoder_layers=1, vocab_size=20,
        decoder_attention_heads=2, decoder_ffn_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    upstream = WhisperModel(config).get_encoder().eval()
    ours = encoder_from_config(config).eval()
    ours.load_state_dict(upstream.state_dict())
    features = torch.randn(2, 80, 3000)
    with torch.inference_mode():
        expected = upstream(features).last_hidden_state
        torch.testing.assert_close(ours(features).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        mask = torch.ones(2, 3000, dtype=torch.long)
        masked = ours(features, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)


def test_whisper_refuses_more_than_30_seconds():
    encoder = tiny_encoder("whisper")
    with pytest.raises(UserError, match="1501 frames does not fit its 1500 positions") as caught:
        encoder(torch.zeros(1, 80, 3002))
    assert caught.value.write == "write data.max_seconds=30, the limit of Whisper's encoder"


# --- checkpoints


def save(folder, model, dtype=torch.float32):
    model.to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_saved_folder_loads_in_float32_with_its_own_weights(name, tmp_path):
    original = tiny_encoder(name)
    feature_extractor_of(original).save_pretrained(tmp_path)
    save(tmp_path, original, torch.float16)
    loaded = tiny_encoder(name, checkpoint=str(tmp_path))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert loaded.config._name_or_path == str(tmp_path)
    for (key, weight), saved in zip(loaded.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(weight, saved.float(), rtol=1e-3, atol=1e-3, msg=key)
    output, _ = frames(loaded, 16000)
    assert output.isfinite().all()


def test_a_checkpoint_brings_its_own_feature_extractor(tmp_path):
    original = tiny_encoder("whisper")
    feature_extractor_of(original).save_pretrained(tmp_path)
    text = (tmp_path / "preprocessor_config.json").read_text()
    (tmp_path / "preprocessor_config.json").write_text(text.replace('"hop_length": 160', '"hop_length": 200'))
    save(tmp_path, AutoModel.from_config(original.config))
    assert feature_extractor_of(tiny_encoder("whisper", checkpoint=str(tmp_path))).hop_length == 200


def test_not_pretrained_takes_the_architecture_of_a_checkpoint_and_no_weights(tmp_path):
    original = tiny_encoder("hubert", options={"num_hidden_layers": 1})
    torch.nn.init.constant_(original.feature_projection.projection.weight, 7.0)
    save(tmp_path, original)
    random = tiny_encoder("hubert", checkpoint=str(tmp_path), pretrained=False)
    assert random.config.num_hidden_layers == 1
    assert random.feature_projection.projection.weight.max() < 7


def problem(name, **options):
    with pytest.raises(UserError) as caught:
        tiny_encoder(name, **options)
    return caught.value


def test_an_unknown_option_is_met_with_the_close_one():
    error = problem("hubert", options={"hiden_size": 3})
    assert (error.option, error.value) == ("encoder.options.hiden_size", 3)
    assert error.wrong == "HubertConfig has no such option; did you mean 'hidden_size'?"
    assert error.write == "write encoder.options.NAME=VALUE with a NAME of HubertConfig"


def test_an_option_of_the_wrong_type_is_refused():
    error = problem("hubert", options={"hidden_size": "many"})
    assert (error.option, error.value) == ("encoder.options.hidden_size", "many")
    assert error.wrong == "expected a whole number of 1 or more"


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    error = problem("hubert", checkpoint=str(tmp_path))
    assert (error.option, error.value) == ("encoder.checkpoint", str(tmp_path))
    assert error.wrong == "this folder is no model, it holds no config.json"
    assert "size=tiny (random weights, needs no network)" in error.write


def test_a_folder_without_weights_is_refused(tmp_path):
    Wav2Vec2Config().save_pretrained(tmp_path)
    error = problem("wav2vec2", checkpoint=str(tmp_path))
    assert error.wrong.startswith("the folder gave: ")


def test_a_missing_folder_is_refused(tmp_path):
    missing = tmp_path / "nowhere"
    error = problem("hubert", checkpoint=str(missing))
    assert (error.value, error.wrong) == (str(missing), "there is no such folder")


def test_a_hub_id_without_network_names_the_ways_without_one():
    error = problem("hubert", checkpoint="facebook/hubert-base-ls960")
    assert (error.option, error.value) == ("encoder.checkpoint", "facebook/hubert-base-ls960")
    assert error.wrong.startswith("there is no such folder here, and the Hub or its cache gave: ")
    assert error.write.startswith("write encoder.checkpoint=FOLDER saved by save_pretrained")


def test_a_size_that_was_not_published_is_refused():
    error = problem("wav2vec2_conformer", size="base")
    assert (error.option, error.value) == ("size", "base")
    assert error.wrong == "this encoder has no published checkpoint of this size"
    assert error.write == "write size=ONE_OF tiny, large"

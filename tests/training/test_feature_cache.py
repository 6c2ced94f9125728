"""A frozen front of the model is computed once for each utterance: the same numbers, however the cache is found."""

import multiprocessing
import pickle
import shutil
from functools import partial
from types import SimpleNamespace

import datasets
import pytest
import torch
from families import batch_of, tiny_encoder
from omegaconf import OmegaConf
from pairs import part
from safetensors.torch import save

from sedtrain.build import cache_features
from sedtrain.errors import UserError
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.training.checkpoint_files import read_checkpoint
from sedtrain.training.feature_cache import FeatureCache, Store, digest, frozen_front, key_of
from sedtrain.training.finetune import FineTuning
from sedtrain.training.strategies import FullySharded

SECONDS = (0.7, 1.3, 0.4)
GIGABYTE = 10**9


def joined(encoder="wav2vec2", frozen="encoder", **options):
    """A model whose frozen part evaluates, as in training."""
    model = SpeechEncoderDecoder(encoder=tiny_encoder(encoder, **options), decoder=part("bert")).train()
    FineTuning([frozen]).prepare(model)
    frozen_front(model).module.eval()
    return model


def keyed(model, *seconds):
    batch = batch_of(model, *seconds)
    batch.keys = [f"{number:032x}" for number in range(len(batch))]
    return batch


def cache_in(folder, **options):
    return FeatureCache(partial(Store, folder, max_bytes=GIGABYTE, num_ranks=1), {}, **options)


def encoded(model, batch, cache):
    with cache.serve(model, batch):
        return model.encode(batch.inputs, batch.attention_mask)


def computed(front, monkeypatch):
    """A list that grows with every forward of the front itself."""
    lengths, forward = [], type(front).forward

    def counted(self, inputs, *args, **options):
        lengths.append(inputs.shape[1])
        return forward(self, inputs, *args, **options)

    monkeypatch.setattr(type(front), "forward", counted)
    return lengths


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_equal(some, others):
    assert torch.equal(some.last_hidden_state, others.last_hidden_state)
    assert torch.equal(some.encoder_frames, others.encoder_frames)
    assert torch.equal(some.attention_mask, others.attention_mask)


# --- what is served


@pytest.mark.parametrize(
    ("encoder", "frozen"),
    [
        ("wav2vec2", "encoder"), ("hubert", "encoder"), ("w2v_bert", "encoder"), ("speecht5", "encoder"),
        ("speech_to_text", "encoder"), ("sew", "encoder"),
        ("wav2vec2", "feature_encoder"), ("hubert", "feature_encoder"), ("speecht5", "feature_encoder"),
    ],
)  # fmt: skip
def test_the_frames_are_those_of_the_padded_batch_within_half_precision(tmp_path, encoder, frozen):
    model = joined(encoder, frozen)
    model.eval()
    batch = keyed(model, *SECONDS)
    expected = model.encode(batch.inputs, batch.attention_mask)
    found = encoded(model, batch, cache_in(tmp_path))
    again = encoded(model, batch, cache_in(tmp_path))
    real = expected.attention_mask.bool()
    assert torch.equal(found.attention_mask, expected.attention_mask)
    torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], rtol=2e-3, atol=2e-3)
    assert_equal(found, again)


def test_time_comes_last_in_whispers_features(tmp_path):
    model = joined("whisper")
    batch = keyed(model, 0.8, 0.3)  # as many frames as mel bands
    assert batch.inputs.shape == (2, 80, 80)
    expected = model.encode(batch.inputs, batch.attention_mask)
    found = encoded(model, batch, cache_in(tmp_path, time_is_last=True))
    real = expected.attention_mask.bool()
    torch.testing.assert_close(found.last_hidden_state[real], expected.last_hidden_state[real], rtol=2e-3, atol=2e-3)


def test_an_utterance_is_computed_once_and_alone_in_whatever_batches_it_comes(tmp_path, monkeypatch):
    model = joined()
    batch = keyed(model, *SECONDS)
    lengths, cache = computed(model.encoder, monkeypatch), cache_in(tmp_path)
    first = encoded(model, batch, cache)
    assert lengths == [int(16000 * seconds) for seconds in SECONDS]
    one = keyed(model, SECONDS[0])
    alone = encoded(model, one, cache_in(tmp_path))
    assert len(lengths) == len(SECONDS)
    num_frames = alone.encoder_frames.shape[1]
    assert torch.equal(alone.encoder_frames[0], first.encoder_frames[0, :num_frames])
    assert "forward" not in vars(model.encoder)


def test_random_numbers_and_what_does_not_fit_16_bits_are_the_same_whatever_is_cached(tmp_path):
    model = joined()
    model.encoder.config.layerdrop = 0.5  # upstream draws for every layer, in evaluation too
    with torch.no_grad():
        model.encoder.encoder.layer_norm.bias[0] = 1e5
    batch, drawn, found = keyed(model, *SECONDS), [], []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(encoded(model, batch, cache_in(tmp_path)))
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert_equal(*found)
    assert found[0].encoder_frames.max() > 9e4
    assert files(tmp_path) == []


def test_what_thaws_is_computed_again_and_gets_its_gradient(tmp_path):
    model, cache = joined(), cache_in(tmp_path)
    batch = keyed(model, *SECONDS)
    assert not encoded(model, batch, cache).encoder_frames.requires_grad
    front_end = model.encoder.feature_extractor
    for weight in model.encoder.parameters():
        weight.requires_grad_(True)
    front_end.requires_grad_(False)
    model.train()
    front_end.eval()
    assert frozen_front(model).name == "encoder.feature_extractor"
    encoded(model, batch, cache).encoder_frames.sum().backward()
    assert model.encoder.encoder.layers[0].attention.k_proj.weight.grad is not None
    assert front_end.conv_layers[0].conv.weight.grad is None
    front_end.requires_grad_(True)
    assert frozen_front(model) is None
    encoded(model, batch, cache).encoder_frames.sum().backward()
    assert front_end.conv_layers[0].conv.weight.grad is not None


# --- when it is served


def test_other_weights_settings_attention_and_configuration_have_another_key():
    model = joined()
    front, config = frozen_front(model), model.encoder.config
    keys = [key_of(front, config, {}), key_of(front, config, {"precision": "bf16-mixed"})]
    with torch.no_grad():
        model.encoder.encoder.layers[1].final_layer_norm.bias[3] += 1e-6
    keys.append(key_of(front, config, {}))
    config.layer_norm_eps *= 2
    keys.append(key_of(front, config, {}))
    config._attn_implementation = "eager"
    keys.append(key_of(front, config, {}))
    keys.append(key_of(frozen_front(joined(frozen="feature_encoder")), config, {}))
    assert len(set(keys)) == len(keys)
    same = joined()
    assert key_of(frozen_front(same), same.encoder.config, {}) == keys[0]


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of a file ran')",)


@pytest.mark.parametrize("damage", ["truncated", "a bit", "exchanged", "empty", "pickle", "no tensor"])
def test_a_damaged_file_is_computed_anew_and_replaced(tmp_path, damage):
    model = joined()
    batch = keyed(model, *SECONDS)
    expected = encoded(model, batch, cache_in(tmp_path))
    first, second, _ = files(tmp_path)
    whole = first.read_bytes()
    signed = {"pickle": pickle.dumps(Bomb()), "no tensor": save({"other": torch.zeros(2)})}
    if damage in signed:
        written = digest(first.name, signed[damage]) + signed[damage]
    else:
        flipped = bytes([*whole[:-9], whole[-9] ^ 1, *whole[-8:]])
        kinds = {"truncated": whole[:-100], "a bit": flipped, "exchanged": second.read_bytes(), "empty": b""}
        written = kinds[damage]
    first.write_bytes(written)
    assert_equal(encoded(model, batch, cache_in(tmp_path)), expected)
    assert first.read_bytes() == whole


def test_processes_share_the_cache_also_while_both_fill_it(tmp_path, monkeypatch):
    model = joined()
    batch = keyed(model, *SECONDS)
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=encoded, args=(model, batch, cache_in(tmp_path))) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert [other.exitcode for other in others] == [0, 0]
    assert len(files(tmp_path)) == len(SECONDS)
    lengths = computed(model.encoder, monkeypatch)
    encoded(model, batch, cache_in(tmp_path))
    assert lengths == []


# --- its size


def written(store, number, num_frames=100):
    store.write(f"{number:032x}", torch.zeros(num_frames, 100, dtype=torch.float16))


def bytes_in(folder):
    return sum(path.stat().st_size for path in files(folder))


def test_a_full_cache_keeps_what_it_has_and_computes_the_rest(tmp_path, caplog):
    store = Store(tmp_path, "a" * 32, 50_000, num_ranks=1)
    for number in range(4):
        written(store, number)
    assert store.read(f"{1:032x}") is not None
    assert store.read(f"{2:032x}") is None
    assert 40_000 < bytes_in(tmp_path) <= 50_000
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "data.cache_gb" in caplog.text


def test_ranks_share_the_bytes_that_are_left(tmp_path):
    stores = [Store(tmp_path, "a" * 32, 100_000, num_ranks=2) for _ in range(2)]
    for number in range(20):
        written(stores[number % 2], number)
    assert 60_000 < bytes_in(tmp_path) <= 100_000


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    for key in "abc":
        written(Store(tmp_path, key * 32, GIGABYTE, num_ranks=1), 0)
    Store(tmp_path, "a" * 32, GIGABYTE, num_ranks=1)  # is used again
    written(Store(tmp_path, "d" * 32, 70_000, num_ranks=1), 0)
    assert sorted(folder.name[0] for folder in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_folder_that_cannot_be_made_ends_the_caching_and_not_the_training(tmp_path, caplog):
    model, taken = joined(), tmp_path / "taken"
    taken.write_text("a file")
    batch = keyed(model, *SECONDS)
    assert_equal(encoded(model, batch, cache_in(taken)), encoded(model, batch, cache_in(tmp_path / "free")))
    assert "features are no longer cached" in caplog.text and taken.read_text() == "a file"


def test_what_ends_a_run_while_it_writes_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def interrupted(path, place):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    model = joined()
    with pytest.raises(KeyboardInterrupt):
        encoded(model, keyed(model, *SECONDS), cache_in(tmp_path))
    assert files(tmp_path) == []


def test_a_disk_without_room_ends_the_caching_and_not_the_training(tmp_path, caplog, monkeypatch):
    def no_space(path, content):
        raise OSError(28, "No space left on device")

    model = joined()
    monkeypatch.setattr("pathlib.Path.write_bytes", no_space)
    found = encoded(model, keyed(model, *SECONDS), cache_in(tmp_path))
    assert found.last_hidden_state.isfinite().all()
    assert "No space left on device" in caplog.text
    assert len(caplog.records) == 1


# --- in whole runs

CACHED = [
    "data.cache_features=true", "data.batch_seconds=20", "trainer.val_check_interval=100", "decoding.max_new_tokens=2",
    "encoder.tiny.num_hidden_layers=1", "decoder.tiny.num_hidden_layers=1",
]  # fmt: skip


def losses(folder):
    lines = (folder / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[column]) for line in lines[1:] if line.split(",")[column]]


def test_a_run_that_resumes_ends_with_the_bits_of_one_that_never_stopped_whatever_is_cached(
    train, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    given = [*CACHED, "finetune=gradual", "finetune.thaw={encoder: 4, feature_encoder: 9}"]
    given += ["callbacks.checkpoints.every_steps=3"]
    whole = train(tmp_path / "whole", *given, steps=5)
    stores = list((tmp_path / "hf/sedtrain/features").iterdir())
    assert len(stores) == 2  # of the encoder, and of its front end from step 4 on
    assert "rounded to 16 bits" in (whole / "sedtrain.log").read_text()
    stopped = shutil.copytree(whole, tmp_path / "stopped")
    shutil.rmtree(stopped / "model")
    (stopped / "checkpoints/previous.ckpt").replace(stopped / "checkpoints/last.ckpt")
    shutil.rmtree(stores[0])
    train(stopped, *given, "resume=auto", steps=5)
    first, second = (read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"] for folder in (whole, stopped))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(stopped) == losses(whole)
    plain = train(tmp_path / "plain", *given, "data.cache_features=false", steps=5)
    assert losses(plain) == pytest.approx(losses(whole), rel=1e-3)
    assert losses(plain) != losses(whole)


@pytest.mark.parametrize(
    ("frozen", "augment", "strategy", "wrong"),
    [
        ("decoder", {}, None, "the encoder and its front end train from the first step on"),
        ("encoder", {"speed": {}, "noise": {}}, None, "speed, noise changes the audio in every epoch"),
        ("encoder", {}, FullySharded(), "a rank with cached utterances would not gather the encoder's weights"),
    ],
    ids=["nothing is frozen", "augmented", "sharded"],
)
def test_a_cache_that_could_never_serve_is_refused(frozen, augment, strategy, wrong):
    model = SpeechEncoderDecoder(encoder=tiny_encoder("wav2vec2"), decoder=part("bert"))
    FineTuning([frozen]).prepare(model)
    data, module = SimpleNamespace(cache_features=True), SimpleNamespace(model=model)
    with pytest.raises(UserError, match=wrong) as caught:
        cache_features(OmegaConf.create({"augment": augment}), data, module, SimpleNamespace(strategy=strategy))
    assert caught.value.option == "data.cache_features"
    assert caught.value.write.endswith("or data.cache_features=false")

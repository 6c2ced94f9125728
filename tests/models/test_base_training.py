"""Training as the base class trains, and what it does wrongly done right."""

import copy
import pickle

import pytest
import torch
from pairs import END, LABELS, PAD, START, assert_close, gradients, joined, ours_and_base, two_utterances
from torch.nn import functional as F

PAIRS = [("hubert", "bert"), ("hubert", "gpt2"), ("wav2vec2", "bart")]
of_pairs = pytest.mark.parametrize("parts", PAIRS, ids="+".join)


@pytest.fixture
def batch():
    return {**two_utterances(), "labels": LABELS}


def mel_batch():
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, 30:] = 0
    mels = torch.randn(2, 8, 60, generator=torch.Generator().manual_seed(0))
    return {"input_features": mels, "attention_mask": mask, "labels": LABELS}


def step(model, batch, **options):
    model.train().zero_grad()
    loss = model(**batch, **options).loss
    loss.backward()
    return loss.detach(), {name: gradient.clone() for name, gradient in gradients(model).items()}


def assert_equal_gradients(ours, base, atol=1e-6):
    assert ours.keys() == base.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, base[name], rtol=1e-3, atol=atol, msg=name)


@of_pairs
def test_loss_and_gradients_in_training_are_those_of_the_base_class(parts, batch):
    (loss, ours), (expected, base) = (step(model, batch) for model in ours_and_base(*parts))
    assert_close(loss, expected)
    assert_equal_gradients(ours, base)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # the name of it that documents have
@of_pairs
@pytest.mark.parametrize("options", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_gradient_checkpointing_changes_no_gradient(parts, batch, options):
    model = joined(*parts)
    _, expected = step(model, batch)
    model.gradient_checkpointing_enable(options)
    assert all(part.is_gradient_checkpointing for part in (model, model.encoder, model.decoder))
    _, checkpointed = step(model, batch)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_equal_gradients(checkpointed, expected)


@of_pairs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_autocast_is_finite_and_close(parts, batch, dtype):
    model = joined(*parts)
    expected, _ = step(model, batch)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        loss = model(**batch).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # in transformers
@pytest.mark.parametrize("parts", [("hubert", "bert"), ("wav2vec2", "gpt2"), ("whisper", "bart")], ids="+".join)
def test_the_training_forward_compiles_as_one_graph(parts, batch):
    batch = mel_batch() if parts[0] == "whisper" else batch
    model = joined(*parts, num_hidden_layers=1, encoder_layers=1, decoder_layers=1)
    expected, gradient = step(model, batch)
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="eager")
    loss, compiled = step(model, batch)
    torch._dynamo.reset()
    assert_close(loss, expected)
    assert_equal_gradients(compiled, gradient)
    assert not any("_orig_mod" in name for name in model.state_dict())


def pickled(model):
    return pickle.loads(pickle.dumps(model))


# wav2vec2's weight norm cannot be pickled: torch refuses
@pytest.mark.parametrize(
    ("parts", "twin_of"),
    [*((parts, copy.deepcopy) for parts in [*PAIRS, ("whisper", "bart")]), (("whisper", "bart"), pickled)],
)
def test_a_copy_trains_alike_with_weights_of_its_own(parts, twin_of, batch):
    batch = mel_batch() if parts[0] == "whisper" else batch
    model = joined(*parts)
    loss, expected = step(model, batch)
    twin = twin_of(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    twin_loss, gradient = step(twin, batch)
    assert torch.equal(twin_loss, loss)
    assert_equal_gradients(gradient, expected)


# --- parts that do not train, and settings that arrive late


def frozen(model):
    return {name for name, weight in model.named_parameters() if not weight.requires_grad}


def test_freeze_feature_encoder_freezes_what_the_base_class_freezes(batch):
    ours, base = ours_and_base("wav2vec2", "bart")
    before = frozen(ours)
    for model in (ours, base):
        model.freeze_feature_encoder()
    assert frozen(ours) - before == frozen(base)
    assert frozen(base)
    (loss, gradient), (expected, base_gradient) = (step(model, batch) for model in (ours, base))
    assert_close(loss, expected)
    assert_equal_gradients(gradient, base_gradient)


def test_a_frozen_encoder_gets_no_gradient_and_the_rest_does(batch):
    model = joined("hubert", "bert")
    _, before = step(model, batch)
    model.encoder.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    _, gradient = step(model, batch)
    assert gradient.keys() == {name for name in before if not name.startswith("encoder.")}
    assert_equal_gradients(gradient, {name: before[name] for name in gradient})


@of_pairs
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_an_attention_implementation_set_afterwards_reaches_every_module(parts, batch, implementation):
    model = joined(*parts)
    model.set_attn_implementation("sdpa" if implementation == "eager" else "eager")
    model.set_attn_implementation(implementation)
    found = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert found == {implementation}
    if implementation == "eager":
        assert len(model(**batch, output_attentions=True).encoder_attentions) == 2


@of_pairs
def test_layerdrop_set_in_the_configuration_afterwards_acts(parts, batch):
    model = joined(*parts).train()
    model.config.encoder.layerdrop = 1.0
    changed = []
    layer = model.encoder.encoder.layers[0]
    layer.register_forward_hook(lambda module, given, made: changed.append(made))
    model(**batch)
    assert not changed
    model.config.encoder.layerdrop = 0.0
    model(**batch)
    assert changed


def test_every_module_of_a_part_has_the_one_configuration_of_the_joined_model(batch):
    for parts in PAIRS:
        model = joined(*parts)
        for name in ("encoder", "decoder"):
            config = getattr(model.config, name)
            configs = {id(module.config) for module in getattr(model, name).modules() if hasattr(module, "config")}
            assert configs == {id(config)}


@of_pairs
@pytest.mark.parametrize("size", [25, 40])
def test_the_vocabulary_is_resized_where_the_base_class_raises(parts, batch, size):
    ours, base = ours_and_base(*parts)
    with pytest.raises(NotImplementedError):
        base.resize_token_embeddings(size)
    with torch.no_grad():
        expected = ours(**batch).logits
    embeddings = ours.resize_token_embeddings(size, mean_resizing=False)
    assert ours.get_input_embeddings() is embeddings
    assert embeddings.num_embeddings == ours.config.decoder.vocab_size == size
    smaller = min(size, 30)
    assert_close(ours(**batch).logits[..., :smaller], expected[..., :smaller])
    assert step(ours, batch)[0].isfinite()


# --- the loss


@of_pairs
def test_label_smoothing_is_that_of_the_trainer_without_decoder_inputs_in_the_batch(parts, batch):
    ours, base = ours_and_base(*parts)
    logits = base(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), LABELS.flatten(), label_smoothing=0.1)
    assert_close(ours(**batch, label_smoothing=0.1).loss, expected)
    assert_close(step(ours, batch, label_smoothing=0.1)[0], expected)


def test_the_end_token_is_learnt_where_it_is_the_pad_token_too(batch):
    model = joined("hubert", "gpt2")
    model.set_special_tokens(START, END, END)
    end = torch.tensor([[-100, -100, -100, END]] * 2)
    loss, gradient = step(model, {**batch, "labels": end})
    assert loss > 0
    assert gradient["decoder.transformer.h.0.mlp.c_fc.weight"].any()
    expected = F.cross_entropy(model.eval()(**{**batch, "labels": end}).logits[:, -1], end[:, -1])
    assert_close(loss, expected)


def test_a_batch_without_target_tokens_has_a_loss_of_zero_where_the_base_class_has_nan(batch):
    ours, base = ours_and_base("hubert", "bert")
    batch["labels"] = torch.full_like(LABELS, -100)
    assert base(**batch).loss.isnan()
    loss, gradient = step(ours, batch)
    assert loss == 0
    assert not any(each.any() for each in gradient.values())


def test_the_shift_has_one_owner(batch):
    """A decoder that shifts labels itself, as GPT-2's class for its own loss does, is never given labels."""
    ours, _ = ours_and_base("hubert", "gpt2")
    given = []
    ours.decoder.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    output = ours(**batch)
    assert "labels" not in given[0]
    assert given[0]["input_ids"].tolist() == [[START, 7, 8, 9], [START, 10, END, PAD]]
    assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), LABELS.flatten()))

"""Which weights each fine-tuning option moves, when and how fast, over all families; the same in a resumed run."""

import copy

import lightning
import pytest
import torch
import transformers
from families import DECODERS, ENCODERS, option_file, tiny_decoder, tiny_encoder
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn
from transformers import AutoModel

from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.models.adapter import ConvAdapter
from sedtrain.models.parts import PARTS, depths, layers_of, part_of
from sedtrain.models.saved import load
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.tasks import ends
from sedtrain.tasks import plan as table_of
from sedtrain.training.finetune import FineTuning, frozen_modules

PAIRS = [*((encoder, "bert") for encoder in ENCODERS), *(("hubert", decoder) for decoder in DECODERS)]


def joined(encoder="hubert", decoder="bert", adapter=None):
    parts = tiny_encoder(encoder), tiny_decoder(decoder)
    if adapter is not None:
        adapter = adapter(parts[0].config.hidden_size, parts[1].config.hidden_size)
    return SpeechEncoderDecoder(encoder=parts[0], decoder=parts[1], adapter=adapter).train()


def finetuning(name, *overrides):
    """The option of conf/finetune."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return instantiate(compose("train", [f"finetune={name}", "run_dir=run", *overrides]).finetune, _convert_="all")


def moving(model):
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def parts_of(names):
    return {part_of(name) for name in names}


# --- over all families


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=map("-".join, PAIRS))
def test_lna_moves_layer_norms_the_encoders_attention_and_the_decoders_to_it(encoder, decoder):
    model = joined(encoder, decoder)
    before = moving(model)
    finetuning("lna").prepare(model)
    after = moving(model)
    assert after < before
    encoder_layers, decoder_layers = (layers_of(model.get_submodule(part)) for part in ("encoder", "decoder"))
    for part, (path, layers) in {"encoder": encoder_layers, "decoder": decoder_layers}.items():
        for number in range(len(layers)):
            own = {name for name in before if name.startswith(f"{part}.{path}.{number}.")}
            attention = {name for name in own if any(word in name.lower() for word in ("attention", "attn"))}
            matrices = {name for name in own if model.get_parameter(name).ndim > 1}
            to_itself = {name for name in attention & matrices if part_of(name) == part}
            to_the_encoder = {name for name in own if part_of(name) == "cross_attention"}
            assert to_itself and own - after  # the feed-forward network of each layer is frozen
            assert not (matrices - attention) & after
            if part == "encoder":
                assert to_itself <= after and not to_the_encoder
            else:
                assert to_the_encoder <= after and len(to_the_encoder & matrices) >= 3
                assert not to_itself & after
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert {f"{name}.{own}" for own, _ in module.named_parameters()} & before <= after


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=map("-".join, PAIRS))
def test_every_weight_belongs_to_one_part_and_every_layer_has_its_depth(encoder, decoder):
    model = joined(encoder, decoder)
    assert set(parts_of(name for name, _ in model.named_parameters())) <= set(PARTS)
    depth_of = dict(depths(model))
    for part, family in {"encoder": encoder, "decoder": decoder}.items():
        found = [depth for name, depth in depth_of.items() if name.startswith(f"{part}.")]
        num_layers = len(layers_of(model.get_submodule(part))[1])
        sizes = [
            value for name, value in option_file(part, family)["tiny"].items() if "layers" in name or name == "n_layer"
        ]
        assert num_layers in sizes
        assert set(range(num_layers)) <= set(found) <= set(range(num_layers + 1))
        assert num_layers in found


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_frozen_encoder_is_outside_autograd_as_a_whole(encoder):
    model = joined(encoder)
    finetuning("encoder_frozen").prepare(model)
    assert "encoder" not in parts_of(moving(model))
    names = {id(module): name for name, module in model.named_modules()}
    has_own_adapter = "adapter" in dict(model.encoder.named_children())
    assert has_own_adapter or "encoder" in {names[id(module)] for module in frozen_modules(model)}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_frozen_feature_encoder_is_what_the_family_says(encoder):
    model, again = joined(encoder), joined(encoder)
    finetuning("feature_encoder_frozen").prepare(model)
    again.freeze_feature_encoder()
    assert moving(model) == moving(again)


@pytest.mark.parametrize(("encoder", "decoder"), PAIRS, ids=map("-".join, PAIRS))
def test_weights_that_no_forward_uses_never_move(encoder, decoder):
    model = joined(encoder, decoder)
    before = moving(model)
    everything = finetuning("all")
    everything.prepare(model)
    assert moving(model) == before == set(everything.starts)
    late = FineTuning(thaw={"encoder": 3})
    late.prepare(model)
    assert set(late.starts) == before


# --- options


def test_a_frozen_decoder_learns_its_cross_attention():
    model = joined()
    finetuning("decoder_frozen").prepare(model)
    assert parts_of(moving(model)) == {"encoder", "cross_attention"}


def test_of_a_frozen_language_model_encoder_and_adapter_learn_and_it_thaws_later():
    model = joined("hubert", "llama", ConvAdapter)
    finetuning("decoder_frozen").prepare(model)
    assert parts_of(moving(model)) == {"encoder", "adapter"}
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model(torch.randn(1, 8000), labels=torch.tensor([[5, 2]])).loss.backward()
    assert all(weight.grad.any() for weight in model.adapter.parameters())
    model = joined("hubert", "llama", ConvAdapter)
    finetuning("gradual").prepare(model)
    assert parts_of(moving(model)) == {"adapter"}


def test_the_adapter_alone_moves_where_there_is_one():
    model = joined(adapter=ConvAdapter)
    model.add_ctc_head(7)
    finetuning("adapter_only").prepare(model)
    assert parts_of(moving(model)) == {"adapter"}
    assert {name.split(".")[0] for name in moving(model)} == {"adapter"}


def test_without_an_adapter_there_is_no_adapter_to_train():
    with pytest.raises(UserError) as caught:
        finetuning("adapter_only").prepare(joined())
    assert str(caught.value) == (
        "1 problem:\n\n  finetune.frozen = ['encoder', 'cross_attention', 'decoder', 'ctc_head']\n"
        "    this freezes every weight of the model: nothing would be trained\n"
        "    write finetune=all, or an adapter that has weights, such as adapter=conv"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"frozen": ["ears"]}, "finetune.frozen = 'ears'\n    the model has no part 'ears', it has encoder, adapter, "
         "cross_attention, decoder, ctc_head, feature_encoder, "
         "encoder_self_attention, decoder_self_attention, layer_norms, lora and"),
        ({"thaw": {"ears": 3}}, "finetune.thaw.ears = 'ears'\n    the model has no part 'ears'"),
        ({"moving": ["ears"]}, "finetune.moving = 'ears'\n    the model has no part 'ears'"),
        ({"thaw": dict.fromkeys(PARTS, 3)}, "finetune.thaw = {'encoder': 3, 'adapter': 3, 'cross_attention': 3, 'decoder': 3, "
         "'ctc_head': 3}\n    no weight would move before step 3\n    write finetune.moving=[PART], with a part that moves"),
        ({"learning_rates": {"ears": 1}}, "finetune.learning_rates.ears = 1\n    this is no part of a model\n"
         "    write the name of a part: encoder, adapter, cross_attention, decoder, ctc_head"),
    ],
)  # fmt: skip
def test_names_without_weights_and_a_standstill_are_refused(options, text):
    with pytest.raises(UserError) as caught:
        FineTuning(**options).prepare(joined())
    assert text in str(caught.value)


# --- how fast


def rates_of(callback, model):
    optimizer = torch.optim.SGD(
        [{**group, "initial_lr": group["lr_scale"]} for group in callback.grouped(model)], lr=1.0
    )
    return {
        name: group["initial_lr"]
        for group in optimizer.param_groups
        for name, weight in model.named_parameters()
        if any(weight is each for each in group["params"])
    }


def test_every_part_has_its_learning_rate():
    model = joined(adapter=ConvAdapter)
    model.add_ctc_head(7)
    shares = {"encoder": 0.1, "adapter": 2.0, "cross_attention": 3.0, "decoder": 0.5, "ctc_head": 4.0}
    callback = finetuning("all", *(f"finetune.learning_rates.{part}={share}" for part, share in shares.items()))
    callback.prepare(model)
    assert rates_of(callback, model) == {name: shares[part_of(name)] for name in moving(model)}


def test_the_learning_rate_decays_from_layer_to_layer_towards_the_input():
    model = joined()
    callback = finetuning("all", "finetune.layer_decay=0.5", "finetune.learning_rates.encoder=0.1")
    callback.prepare(model)
    rates = rates_of(callback, model)
    for layer, share in enumerate([0.125, 0.25, 0.5, 1.0]):
        assert rates[f"encoder.encoder.layers.{layer}.feed_forward.output_dense.weight"] == 0.1 * share
    assert rates["encoder.feature_extractor.conv_layers.0.conv.weight"] == 0.1 * 0.0625
    assert rates["decoder.bert.embeddings.word_embeddings.weight"] == 0.25
    assert rates["decoder.bert.encoder.layer.0.attention.self.query.weight"] == 0.5
    assert rates["decoder.bert.encoder.layer.0.crossattention.self.query.weight"] == 1
    assert rates["decoder.bert.encoder.layer.1.output.dense.weight"] == 1
    assert rates["decoder.cls.predictions.transform.dense.weight"] == 1


# --- the table


def test_the_plan_says_what_moves_how_fast_and_how_much(capsys):
    model = joined()
    callback = FineTuning(["decoder"], {"encoder": 40, "feature_encoder": 1500}, learning_rates={"encoder": 0.1})
    callback.prepare(model)
    optimizer = torch.optim.AdamW(callback.grouped(model), lr=1e-3)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * group["lr_scale"]
    parts = {part.name: part for part in callback.plan(model, optimizer)}
    sizes = {part: sum(w.numel() for n, w in model.named_parameters() if part_of(n) == part) for part in PARTS}
    assert {name: part.num_trainable + part.num_frozen for name, part in parts.items()} == {
        part: size for part, size in sizes.items() if size
    }
    assert (parts["decoder"].num_trainable, parts["decoder"].learning_rates, parts["decoder"].steps) == (0, (), ())
    assert parts["encoder"].steps == (40, 1500)
    assert parts["encoder"].learning_rates == (1e-4,)
    assert parts["cross_attention"].num_frozen == 0
    assert (parts["cross_attention"].steps, parts["cross_attention"].learning_rates) == ((0,), (1e-3,))
    from rich.console import Console

    Console(width=120).print(table_of(list(parts.values()), {"steps": "9"}))
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ encoder ")]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "encoder", f"{sizes['encoder']:,}", "0", "0.0001", "40 to 1,500",
    ]  # fmt: skip


def test_ends_of_nothing_one_and_many():
    assert [ends(values) for values in ([], ["1"], ["1", "2", "3"])] == ["", "1", "1 to 3"]


# --- when


class Seen(lightning.Callback):
    """Records for every step the weights that changed in it, and the modules in training mode."""

    def __init__(self):
        self.steps, self.modes = [], []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = copy.deepcopy(dict(pl_module.model.named_parameters()))

    def on_after_backward(self, trainer, pl_module):
        self.modes.append({name for name, module in pl_module.model.named_modules() if module.training})

    def on_train_batch_end(self, trainer, pl_module, *_):
        changed = {n for n, w in pl_module.model.named_parameters() if not torch.equal(w, self.before[n])}
        self.steps.append(changed)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, inputs):
        return self.decoder(self.encoder(inputs))


class SmallModule(lightning.LightningModule):
    def __init__(self, finetuning):
        super().__init__()
        self.model, self.finetuning = Small(), finetuning

    def training_step(self, batch, index):
        torch.manual_seed(self.global_step)  # data and dropout depend on the step alone
        batch = torch.randn(5, 4)
        return self.model(batch).square().mean() + self.model(batch).sum()

    def configure_optimizers(self):
        groups = [{"params": group["params"]} for group in self.finetuning.grouped(self.model)]
        return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def run_small(folder, max_steps, resume=None, thaw=None, seen=None, **options):
    callback = FineTuning(thaw={"encoder": 3} if thaw is None else thaw)
    module = SmallModule(callback)
    callback.prepare(module.model)
    trainer = lightning.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=False, default_root_dir=folder,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*([seen] if seen else []), callback], **options,
    )  # fmt: skip
    trainer.fit(
        module,
        torch.utils.data.DataLoader(range(20), batch_size=None),
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    return trainer, module.model.state_dict()


QUIET = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*dataloader is not resumable")


@QUIET
def test_a_part_moves_from_its_step_on_and_is_frozen_before(tmp_path):
    seen = Seen()
    run_small(tmp_path, 5, seen=seen)
    names = {"encoder.0.weight", "encoder.0.bias"}
    assert [bool(step & names) for step in seen.steps] == [False] * 3 + [True] * 2
    assert all(step - names == {f"decoder.{k}.{w}" for k in (0, 1) for w in ("weight", "bias")} for step in seen.steps)
    assert ["encoder" in modes for modes in seen.modes] == [False] * 3 + [True] * 2
    assert all("decoder" in modes for modes in seen.modes)


@QUIET
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_schedule_that_is_stopped_and_resumed_ends_with_the_same_weights(tmp_path, stop):
    thaw = {"encoder.0": 3, "decoder.1": 1}
    whole = run_small(tmp_path, 6, thaw=thaw)[1]
    half, _ = run_small(tmp_path, stop, thaw=thaw)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run_small(tmp_path, 6, resume=tmp_path / "half.ckpt", thaw=thaw)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- in whole runs, from a saved model


@pytest.fixture(scope="module")
def pretrained(trained, tmp_path_factory):
    """Overrides that start from the encoder and the decoder of a trained model, each saved alone."""
    folder = tmp_path_factory.mktemp("pretrained")
    saved = load(str(trained))
    saved.model.encoder.save_pretrained(folder / "encoder")
    saved.feature_extractor.save_pretrained(folder / "encoder")
    saved.model.decoder.save_pretrained(folder / "decoder")
    saved.tokenizer.save_pretrained(folder / "decoder")
    return [f"encoder.checkpoint={folder / 'encoder'}", f"decoder.checkpoint={folder / 'decoder'}"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["finetune=gradual", "finetune.thaw={decoder: 1, encoder: 2, feature_encoder: 9}"],
        ["finetune=lna"],
        ["finetune=lora"],
        ["finetune=decoder_frozen"],
        ["finetune=lna", "finetune.layer_decay=0.8", "optimizer=adafactor", "scheduler=tri_stage"],
    ],
    ids=["gradual", "lna", "lora", "decoder_frozen", "lna_layer_decay_adafactor"],
)
def test_a_schedule_trains_a_saved_model_and_leaves_one_that_stock_transformers_loads(
    train, pretrained, tmp_path, overrides
):
    folder = train(tmp_path / "run", *pretrained, *overrides)
    log = (folder / "sedtrain.log").read_text()
    [row] = [line for line in log.splitlines() if line.startswith("│ all ")]
    trainable, frozen = (int(cell.replace(",", "")) for cell in row.strip("│").split("│")[1:3])
    assert trainable > 0
    assert frozen > 0 or overrides[0] == "finetune=gradual"  # where everything moves in the end
    stock = transformers.SpeechEncoderDecoderModel.from_pretrained(folder / "model").eval()
    own = load(str(folder))
    audio, tokens = torch.randn(1, 8000), torch.tensor([[1, 5, 6]])
    with torch.no_grad():
        logits = stock(audio, decoder_input_ids=tokens).logits
        torch.testing.assert_close(own.model(audio, decoder_input_ids=tokens).logits, logits, rtol=1e-4, atol=1e-4)
    before = AutoModel.from_pretrained(pretrained[0].partition("=")[2]).state_dict()
    moved = {name for name, weight in stock.encoder.state_dict().items() if not torch.equal(weight, before[name])}
    kept = before.keys() - moved
    feature_encoder = {name for name in before if name.startswith("feature_extractor.")}
    if overrides[0] != "finetune=decoder_frozen":
        matrices = {name for name in feature_encoder if before[name].ndim > 1}
        assert matrices <= kept
    if overrides[0] in ("finetune=lna", "finetune=lora"):
        assert all("attention" in name or "norm" in name for name in moved)
    assert any("attention" in name for name in moved)

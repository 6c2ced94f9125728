"""Parameter groups and schedules against closed formulas; every optimizer option takes a step that makes the loss smaller."""

import math
import sys

import pytest
import torch
from families import DECODERS, ENCODERS, tiny_decoder, tiny_encoder
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from sedtrain.config.schema import conf_dir, register
from sedtrain.errors import UserError
from sedtrain.training.optim import adamw_8bit, build_optimizer, decays, parameter_groups, tri_stage

STEPS = 200


def option(group, name, *overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return instantiate(compose("train", [f"{group}={name}", "run_dir=run", *overrides])[group], _convert_="all")


def rates(schedule_of, num_steps=STEPS, peak=0.5):
    """The learning rate of each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = schedule_of(optimizer, num_training_steps=num_steps)
    seen = []
    for _ in range(num_steps + 5):
        seen.append(optimizer.param_groups[0]["lr"] / peak)
        optimizer.step()
        schedule.step()
    return seen


def up(step):
    return step / 20


FORMULAS = {
    "cosine": lambda step: (1 + math.cos(math.pi * min(1, (step - 20) / 180))) / 2,
    "linear": lambda step: max(0, (200 - step) / 180),
    "constant": lambda step: 1,
    "inverse_sqrt": lambda step: math.sqrt(20 / step),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_warmed_up_schedule_follows_its_formula(name):
    expected = [up(step) if step < 20 else FORMULAS[name](step) for step in range(STEPS + 1)]
    assert rates(option("scheduler", name))[: STEPS + 1] == pytest.approx(expected, abs=1e-6)


def fairseq_tri_stage(step, peak, num_steps, phase_ratio, init_lr_scale, final_lr_scale):
    """fairseq/optim/lr_scheduler/tri_stage_lr_scheduler.py, its stages and its decay factor."""
    warmup, hold, decay = (int(num_steps * share) for share in phase_ratio)
    warmup_rate = (peak - init_lr_scale * peak) / warmup
    decay_factor = -math.log(final_lr_scale) / decay
    if step < warmup:
        return init_lr_scale * peak + warmup_rate * step
    if step < warmup + hold:
        return peak
    if step <= num_steps:
        return peak * math.exp(-decay_factor * (step - warmup - hold))
    return final_lr_scale * peak


def test_tri_stage_is_that_of_fairseq():
    expected = [fairseq_tri_stage(step, 1.0, STEPS, (0.1, 0.4, 0.5), 0.01, 0.05) for step in range(STEPS + 5)]
    assert rates(option("scheduler", "tri_stage")) == pytest.approx(expected, rel=1e-9)


def test_tri_stage_can_go_without_each_of_its_stages():
    for fractions in ({"warmup_fraction": 0.0}, {"hold_fraction": 0.0}, {"warmup_fraction": 0.3, "hold_fraction": 0.7}):
        seen = rates(lambda *args, f=fractions, **kwargs: tri_stage(*args, **f, **kwargs), num_steps=10)
        assert max(seen) == 1
        assert seen[10:] == [0.05] * 5


def test_stages_of_more_than_all_steps_are_refused():
    with pytest.raises(UserError) as caught:
        tri_stage(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), 10, hold_fraction=0.95)
    assert str(caught.value) == (
        "1 problem:\n\n  scheduler.hold_fraction = 0.95\n"
        "    warmup_fraction=0.1 leaves only a fraction of 0.9 of the steps\n    write a fraction from 0 to 0.9"
    )


def test_a_schedule_continues_where_a_checkpoint_left_it(tmp_path):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = tri_stage(optimizer, STEPS)
    for _ in range(150):
        optimizer.step()
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "state")
    again = tri_stage(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), STEPS)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.get_last_lr() == schedule.get_last_lr()


# --- groups


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize("part", [*(f"encoder/{name}" for name in ENCODERS), *(f"decoder/{name}" for name in DECODERS)])
def test_neither_biases_nor_norms_of_any_family_decay(part):
    kind, name = part.split("/")
    model = tiny_encoder(name) if kind == "encoder" else tiny_decoder(name)
    decaying = {id(weight) for name, weight in model.named_parameters() if decays(name, weight)}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        spared = own if isinstance(module, NORMS) else {name: weight for name, weight in own.items() if "bias" in name}
        assert not {id(weight) for weight in spared.values()} & decaying
        if type(module) is nn.Linear:
            assert id(module.weight) in decaying


def model_of_two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))


def test_groups_hold_what_trains_at_its_rate_and_with_its_decay():
    model = model_of_two()
    groups = parameter_groups(model, {"0.weight": 0.1, "0.bias": 0.1, "1.weight": 1.0})
    optimizer = build_optimizer(lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.3), groups)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name, weight in model.named_parameters()
        if any(weight is each for each in group["params"])
    }
    assert found == {"0.weight": (1e-3, 0.3), "0.bias": (1e-3, 0.0), "1.weight": (1e-2, 0.0)}
    assert not any("lr_scale" in group for group in optimizer.param_groups)


def test_without_rates_all_that_trains_is_in_two_groups():
    model = model_of_two()
    model[1].weight.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model)] == [1, 2]


def test_weight_decay_shrinks_matrices_and_nothing_else():
    model = model_of_two()
    optimizer = build_optimizer(option("optimizer", "adamw", "optimizer.weight_decay=0.5"), parameter_groups(model))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for name, weight in model.named_parameters():
        shrunk = before[name] * (1 - 1e-3 * 0.5) if name == "0.weight" else before[name]
        torch.testing.assert_close(weight.detach(), shrunk)


# --- optimizers


def regression(optimizer_of, num_steps=30):
    """The losses of a small regression."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    inputs, targets = torch.randn(16, 64), torch.randn(16, 64)
    optimizer = build_optimizer(optimizer_of, parameter_groups(model))
    losses = []
    for _ in range(num_steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_every_optimizer_makes_the_loss_smaller(name):
    losses = regression(option("optimizer", name))
    assert losses[-1] < 0.7 * losses[0]


def test_adamw_is_fused():
    assert option("optimizer", "adamw")([nn.Parameter(torch.zeros(1))]).defaults["fused"] is True


def test_eight_bits_without_bitsandbytes_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError) as caught:
        option("optimizer", "adamw_8bit")([nn.Parameter(torch.zeros(1))])
    error = caught.value
    assert (error.option, error.value) == ("optimizer", "adamw_8bit")
    assert error.wrong.startswith("this needs bitsandbytes: ")
    assert error.write == "pip install 'sedtrain[bitsandbytes]', or write optimizer=adafactor, which is small too"


def test_eight_bits_follow_adamw():
    pytest.importorskip("bitsandbytes", reason="an extra that few machines have")
    in_32_bits = regression(lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98)))
    assert regression(lambda groups: adamw_8bit(groups, lr=1e-3)) == pytest.approx(in_32_bits, rel=0.05)

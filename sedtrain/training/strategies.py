"""Training with the weights, their gradients and the state of the optimizer cut into one piece for each device (FSDP2)."""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sedtrain.errors import UserError
from sedtrain.models.parts import layers_of


def rejoin(strategy: Strategy) -> None:
    """Joins the other processes in place of Lightning, where this process was started again.

    The store of torchrun lasts over restarts, with the addresses of processes that have ended, under the same names: who
    reads before their successors have written waits for the dead. Each start has a part of the store of its own here.
    """
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts == 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not isinstance(strategy, DDPStrategy | ModelParallelStrategy) or torch.distributed.is_initialized():
        return
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), num_ranks, is_master=False)
    device = strategy.root_device
    torch.distributed.init_process_group(
        torch.distributed.get_default_backend_for_device(device),
        store=PrefixStore(f"restart {restarts}", store),
        rank=rank,
        world_size=num_ranks,
        timeout=strategy._timeout,
        device_id=device if device.type != "cpu" else None,
    )


def end_others(strategy: Strategy) -> None:
    """Ends the processes that Lightning started beside this one, which has failed and speaks for them.

    They would say the same again later, and Lightning ends whoever started a process that has failed: in a sweep, the next
    job. So it is first told that there are none.
    """
    started = getattr(strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()
    for process in processes:
        process.kill()


ROOT_FORWARDS = ("losses", "validation_step")
"""The methods of the module in which everything that uses its weights happens."""


class FullySharded(ModelParallelStrategy):
    """FSDP2: each layer of encoder and decoder is gathered when it is needed; the rest of the model while a batch lasts.

    Through a validation every device holds all weights, since the hypotheses of each end at another step. Checkpoints are
    those of a training in one process.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def own(self, model: Any) -> Any:
        """The model to cut: on the first rank a copy, so that the model itself is there for the weights at the end."""
        return copy.deepcopy(model) if self.is_global_zero else model

    def shard(self, module: Any) -> None:
        """Cuts the weights of `module` in place.

        Raises UserError where a layer may be left out on one rank and not on another, which would wait for it forever.
        """
        mesh = self.device_mesh["data_parallel"]
        for name in ("encoder", "decoder"):
            part = module.model.get_submodule(name)
            refuse_layerdrop(name, part.config)
            stack = layers_of(part)
            for layer in stack[1] if stack else ():
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for method in ROOT_FORWARDS:
            register_fsdp_forward_method(module, method)

    def setup_optimizers(self, trainer: lightning.Trainer) -> None:
        """Raises UserError for an optimizer whose state has not the shapes of the weights."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, AdamW | Adam | SGD):
                raise UserError(
                    f"optimizer={type(optimizer).__name__}: its state cannot be cut along with the weights",
                    "optimizer=adamw, or strategy=ddp",
                )

    def unshard(self) -> None:
        """All weights to every rank, so that no forward of the validation waits for another one."""
        for unit in units(self.lightning_module):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def reshard(self) -> None:
        """Of what was gathered every rank keeps its own pieces."""
        for unit in units(self.lightning_module):
            unit.set_reshard_after_forward(not isinstance(unit, lightning.LightningModule), recurse=False)
            unit.reshard()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer of a single process would give it, on the first rank; empty on the others."""
        state = optimizer.state_dict()
        entries = {
            number: {name: whole(value, keep=self.is_global_zero) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": entries} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint; every rank reads it and takes its pieces of the state of the optimizer."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(cut(state, optimizer))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Every rank takes its pieces of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)


def units(module: nn.Module | None) -> Iterator[FSDPModule]:
    """What is gathered at once: the layers, and the rest of the module."""
    assert module is not None
    return (each for each in module.modules() if isinstance(each, FSDPModule))


def whole(value: Any, keep: bool) -> Any:
    """A value of an optimizer's state on the CPU, gathered from all ranks; only for one that keeps it, else None."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not keep:
        return None
    return value.cpu() if isinstance(value, Tensor) else value


def cut(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer -> this rank's pieces of it; what has the shape of its weight is cut like it."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    entries = {
        number: {name: like(weight, value) for name, value in state["state"][number].items()}
        for number, weight in zip(numbers, weights, strict=True)
        if number in state["state"]
    }
    return {**state, "state": entries}


def like(weight: DTensor, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
        return value
    return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)


def refuse_layerdrop(part: str, config: Any) -> None:
    for name, value in config.to_dict().items():
        if name.endswith("layerdrop") and value:
            raise UserError(
                f"{part}={config.model_type}: {name} is {value}, and a layer that one device leaves out "
                "would keep the others waiting",
                f"{part}.options.{name}=0, or strategy=ddp",
            )

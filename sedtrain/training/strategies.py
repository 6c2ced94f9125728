"""Devices and processes of a run: TF32, FSDP2, restarts by torchrun, the end of failed processes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sedtrain.errors import UserError
from sedtrain.models.parts import layers_of


@contextmanager
def tensor_float32(device: torch.device) -> Iterator[None]:
    """Inside, float32 matrix products on a CUDA device use TF32, as its convolutions do by default."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FullySharded(ModelParallelStrategy):
    """FSDP2: gathers each layer of encoder and decoder when it runs, and the rest of the model once a batch.

    In a validation every rank holds all weights, because ranks finish decoding at different steps. Checkpoints equal those
    of a single process.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def shard(self, module: Any) -> None:
        """Shards the weights of `module` in place. Raises UserError for layer drop, with which ranks would deadlock."""
        mesh = self.device_mesh["data_parallel"]
        for name in ("encoder", "decoder"):
            part = module.model.get_submodule(name)
            for option, value in part.config.to_dict().items():
                if option.endswith("layerdrop") and value:
                    wrong = "one rank could skip a layer, and the others would wait for it forever"
                    option = f"{name}.options.{option}"
                    raise UserError(option, value, wrong, f"write {option}=0, or strategy=ddp")
            stack = layers_of(part)
            for layer in stack[1] if stack else ():
                fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)
        for method in ("losses", "validation_step"):  # they use the module's weights
            register_fsdp_forward_method(module, method)

    def setup_optimizers(self, trainer: lightning.Trainer) -> None:
        """Raises UserError for an optimizer whose state has other shapes than the weights."""
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if not isinstance(optimizer, AdamW | Adam | SGD):
                wrong, write = "its state cannot be sharded like the weights", "write optimizer=adamw, or strategy=ddp"
                raise UserError("optimizer", type(optimizer).__name__, wrong, write)

    def sharded_modules(self) -> Iterator[FSDPModule]:
        """The units that FSDP gathers: the layers, and the LightningModule with the rest."""
        assert self.lightning_module is not None
        return (module for module in self.lightning_module.modules() if isinstance(module, FSDPModule))

    def unshard(self) -> None:
        """Gives every rank all weights, so that no forward pass of a validation waits for another rank."""
        for module in self.sharded_modules():
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()

    def reshard(self) -> None:
        """Leaves each rank its own shards."""
        for module in self.sharded_modules():
            module.set_reshard_after_forward(not isinstance(module, lightning.LightningModule), recurse=False)
            module.reshard()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer state of a single process, on the first rank; empty on the others."""
        state = optimizer.state_dict()
        entries: dict[int, dict[str, Any]] = {}
        for number, entry in state["state"].items():
            for name, value in entry.items():
                value = value.full_tensor() if isinstance(value, DTensor) else value  # all ranks gather
                if self.is_global_zero:
                    entries.setdefault(number, {})[name] = value.cpu() if isinstance(value, Tensor) else value
        return {**state, "state": entries} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the checkpoint; every rank loads its shards of the optimizer state."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_state(state, optimizer))
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's shards of the weights."""
        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)


def shard_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Full optimizer state -> this rank's shards. Only values with the shape of their weight are sharded."""

    def shard(value: Any, weight: DTensor) -> Any:
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None)

    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    entries = {
        number: {name: shard(value, weight) for name, value in state["state"][number].items()}
        for number, weight in zip(numbers, weights, strict=True)
        if number in state["state"]
    }
    return {**state, "state": entries}


def gather_states(state: Any) -> list[Any]:
    """Every rank's `state`, by rank. All ranks must call this."""
    if not torch.distributed.is_initialized():
        return [state]
    states = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def rejoin(strategy: Strategy) -> None:
    """Initialises the process group, in place of Lightning, if torchrun has restarted this process.

    torchrun's store outlives a restart and still holds the addresses of the ended processes. A process that reads an old
    address waits forever, so each start writes under its own prefix.
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
    """Kills the other processes that Lightning started, after this one has failed; it reports the error for all.

    Lightning must not see them fail, since it would then end this process, and with it the next job of a sweep. So this
    removes them from Lightning's list first.
    """
    started = getattr(strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()
    for process in processes:
        process.kill()

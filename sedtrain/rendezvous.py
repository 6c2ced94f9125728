"""How the processes of a run meet, where nothing is left of those before, and part, when one has failed."""

import os

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]


def meet_again(strategy: Strategy) -> None:
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

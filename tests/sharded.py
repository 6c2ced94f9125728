"""Runs over two ranks, for `torchrun --nproc-per-node 2 tests/sharded.py FOLDER CORPUS`."""

import os
import sys
from pathlib import Path

import torch

from sedtrain.__main__ import main

SHORT = [
    "data=parquet", "data.batch_seconds=10", "data.num_buckets=1", "vocabulary_texts=0", "trainer.accelerator=cpu",
    "trainer.max_time=null", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5",
    "scheduler=constant", "encoder.tiny.num_hidden_layers=2", "decoder.tiny.num_hidden_layers=1",
]  # fmt: skip
BF16 = ["trainer.precision=bf16-mixed", "decoder=llama"]  # behind a prefix
RECOMPUTED = "activation_checkpointing=true"
STARTS_LATE = ["finetune.thaw={encoder: 2}", "trainer.gradient_clip_val=0.5", "callbacks=[default,ema]"]
OVER_RANKS = {
    "fsdp": ["strategy=fsdp"],
    "fsdp_on": ["strategy=fsdp", "resume=fsdp"],
    "single_fsdp": ["strategy=fsdp", "resume=single"],
    "fsdp_bf16": ["strategy=fsdp", "compile=eager", *BF16],
    "fsdp_late": ["strategy=fsdp", RECOMPUTED, *STARTS_LATE],
    "fsdp_late_on": ["strategy=fsdp", *STARTS_LATE, "resume=fsdp_late"],
    "ddp_late": ["strategy=ddp", RECOMPUTED, "compile=eager", *STARTS_LATE],
}


def arguments(folder, corpus, name, *overrides):
    """The command line of a run in FOLDER/NAME: three steps, or three more from the last checkpoint of another run."""
    resumed = [override.partition("=")[2] for override in overrides if override.startswith("resume=")]
    others = [override for override in overrides if not override.startswith("resume=")]
    resume = [f"resume={folder}/{run}/checkpoints/last.ckpt" for run in resumed]
    steps = f"trainer.max_steps={6 if resumed else 3}"
    return [*SHORT, f"data.path={corpus}", f"run_dir={folder}/{name}", steps, *others, *resume]


if __name__ == "__main__":
    folder, corpus = map(Path, sys.argv[1:3])
    os.environ["HF_DATASETS_CACHE"] = str(folder / f"cache {os.environ['RANK']}")
    torch.set_num_threads(1)
    for name in sys.argv[3:] or OVER_RANKS:
        sys.argv = ["sedtrain", *arguments(folder, corpus, name, *OVER_RANKS[name]), "trainer.devices=2"]
        main()

"""Runs over two ranks, which `two_ranks.py` launches."""

import sys

from sedtrain.__main__ import main

SHORT = [
    "data=parquet", "data.batch_seconds=10", "data.num_buckets=1", "vocabulary_texts=0", "trainer.accelerator=cpu",
    "trainer.max_time=null", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "decoding.max_new_tokens=5",
    "scheduler=constant",
    "+metrics.mine._target_=sharded.of_all_in_order",
]  # fmt: skip
TINY = ["encoder.tiny.num_hidden_layers=2", "decoder.tiny.num_hidden_layers=1"]
BF16 = ["trainer.precision=bf16-mixed", "decoder=llama"]  # behind a prefix
RECOMPUTED = "activation_checkpointing=true"
STARTS_LATE = ["finetune.thaw={encoder: 2}", "trainer.gradient_clip_val=0.5", "callbacks=[default,ema]"]
WHOLE = [
    "encoder=whisper", "decoder=whisper", "encoder.checkpoint={folder}/whisper", "decoder.checkpoint={folder}/whisper",
    "scheduler.warmup_fraction=0",  # whatever the number of steps
]  # fmt: skip
OVER_RANKS = {
    "fsdp_bf16": ["strategy=fsdp", "compile=eager", *BF16],
    "fsdp_late": ["strategy=fsdp", RECOMPUTED, *STARTS_LATE],
    "fsdp_late_on": ["strategy=fsdp", *STARTS_LATE, "resume=fsdp_late"],
    "single_fsdp": ["strategy=fsdp", *STARTS_LATE, "resume=single_late"],
    "fsdp_whole": ["strategy=fsdp", *WHOLE],
    "fsdp_whole_on": ["strategy=fsdp", *WHOLE, "resume=fsdp_whole"],
    "ddp_late": ["strategy=ddp", RECOMPUTED, "compile=eager", *STARTS_LATE],
}


def of_all_in_order(references, hypotheses):
    """A metric by the length and the place of every text: nothing of it adds up over ranks."""
    return sum(place * len(text) for place, text in enumerate([*references, *hypotheses]))


def arguments(folder, corpus, name, *overrides):
    """The command line of a run in FOLDER/NAME: three steps, or three more from the last checkpoint of another run."""
    resumed = [override.partition("=")[2] for override in overrides if override.startswith("resume=")]
    others = [each.replace("{folder}", str(folder)) for each in overrides if not each.startswith("resume=")]
    resume = [f"resume={folder}/{run}/checkpoints/last.ckpt" for run in resumed]
    steps = f"trainer.max_steps={6 if resumed else 3}"
    tiny = [] if "encoder=whisper" in others else TINY
    return [*SHORT, *tiny, f"data.path={corpus}", f"run_dir={folder}/{name}", steps, *others, *resume]


def run_all(folder, corpus):
    for name, overrides in OVER_RANKS.items():
        sys.argv = ["sedtrain", *arguments(folder, corpus, name, *overrides), "trainer.devices=2"]
        main()

"""A training that is killed with SIGKILL and resumed ends as one that never was; `kill_and_resume.py` does it more often."""

import pytest
from kill_and_resume import differences, kill_and_resume, whole_checkpoints


@pytest.mark.timeout(600)
def test_a_streamed_training_killed_while_it_writes_ends_with_the_same_bits(corpus, tmp_path):
    """With two workers. Tests of checkpoints stop what has a length at every step, those of launches kill a backward pass."""
    given = ["data=parquet", f"data.path={corpus}", "data.streaming=true", "data.block_utterances=7"]
    given += ["trainer.max_steps=12", "trainer.val_check_interval=4"]
    never, killed, struck = kill_and_resume(tmp_path, 1, 3, given, moments=("writing",))
    assert len(struck) == 1
    assert whole_checkpoints(killed)
    assert list(differences(killed, never)) == []

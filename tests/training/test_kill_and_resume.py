"""A run that is killed with SIGKILL and resumed equals one that is not; `kill_and_resume.py` kills more often."""

import pytest
from kill_and_resume import differences, kill_and_resume, whole_checkpoints


@pytest.mark.timeout(600)
def test_a_streamed_training_killed_while_it_writes_ends_with_the_same_bits(corpus, tmp_path):
    """With two workers. test_checkpoints.py stops other corpora at every step; test_launch.py kills a backward pass."""
    given = ["data=parquet", f"data.path={corpus}", "data.streaming=true", "data.block_utterances=7"]
    given += ["trainer.max_steps=12", "trainer.val_check_interval=4"]
    never, killed, struck = kill_and_resume(tmp_path, 1, 3, given, moments=("writing",))
    assert len(struck) == 1
    assert whole_checkpoints(killed)
    assert list(differences(killed, never)) == []

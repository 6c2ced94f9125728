"""A training that is killed with SIGKILL and resumed ends as one that never was; `kill_and_resume.py` does it more often."""

import pytest
from kill_and_resume import differences, kill_and_resume, whole_checkpoints


@pytest.mark.timeout(600)
def test_a_streamed_training_killed_twice_ends_with_the_same_bits(corpus, tmp_path):
    """With two workers; what has a length is stopped at every step by the tests of checkpoints."""
    given = ["data=parquet", f"data.path={corpus}", "data.streaming=true", "data.block_utterances=7"]
    given += ["trainer.max_steps=12", "trainer.val_check_interval=4"]
    never, killed, struck = kill_and_resume(tmp_path, 2, 3, given, moments=("writing", "backward"))
    assert len(struck) == 2
    assert whole_checkpoints(killed)
    assert list(differences(killed, never)) == []

"""Utterances that are left out: counted by reason, listed in a file, told of once per reason."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sedtrain.batch import Skipped, UserError

logger = logging.getLogger(__name__)


class SkippedUtterances:
    """Notes each utterance once; of several ranks, each notes what it has read itself.

    file: a line of JSON for each
    on_bad_utterance: `error` raises at the first instead
    """

    def __init__(self, file: Path, on_bad_utterance: Literal["skip", "error"]) -> None:
        self.file, self.on_bad_utterance = file, on_bad_utterance
        self.noted = read_noted(file)  # of a run that goes on
        self.counts = Counter(utterance.reason for utterance in self.noted)

    def note(self, skipped: Sequence[Skipped]) -> None:
        """Raises UserError where bad utterances are to stop the run."""
        skipped = [utterance for utterance in dict.fromkeys(skipped) if utterance not in self.noted]
        self.noted.update(skipped)
        for utterance in skipped:
            if self.on_bad_utterance == "error":
                raise UserError(
                    f"utterance {utterance.id!r}: {utterance.reason} {utterance.detail}".rstrip(),
                    "data.on_bad_utterance=skip to go on without it",
                )
            if not self.counts[utterance.reason]:
                first = f"{utterance.id} {utterance.detail}".rstrip()
                logger.warning("skipping utterances: %s (first: %s)", utterance.reason, first)
            self.counts[utterance.reason] += 1
        if skipped:
            with self.file.open("a") as lines:
                lines.writelines(json.dumps(utterance._asdict()) + "\n" for utterance in skipped)


def read_noted(file: Path) -> set[Skipped]:
    """What was noted in a file, but for a last line that was cut."""
    whole, _, _ = file.read_text(encoding="utf-8").rpartition("\n") if file.is_file() else ("", "", "")
    return {Skipped(**json.loads(line)) for line in whole.splitlines()}

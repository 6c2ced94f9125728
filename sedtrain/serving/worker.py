"""Transcribes several recordings at once: in each round, some windows of every recording."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice

from sedtrain.decoding.recordings import NUM_HELD, Recording
from sedtrain.decoding.transcribe import Transcriber
from sedtrain.decoding.transcription import Transcription
from sedtrain.decoding.windows import Window

logger = logging.getLogger(__name__)


class Job:
    """A recording to transcribe, and its windows that were read ahead: two at first, which may raise UserError."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.ahead = recording, list(islice(recording.windows, 2))
        self.text: Future[Transcription] = Future()

    def windows(self, number: int) -> list[Window]:
        """The next `number` windows. One more is read ahead, so that `ahead` is empty only when no window is left."""
        read = [*self.ahead, *islice(self.recording.windows, number + 1 - len(self.ahead))]
        self.ahead = read[number:]
        return read[:number]

    def end(self, error: Exception | None = None) -> None:
        """Delivers the text or the error, unless the text was cancelled."""
        if not self.text.set_running_or_notify_cancel():
            return
        if error is None:
            self.text.set_result(self.recording.transcription())
        else:
            self.text.set_exception(error)


Share = tuple[Job, list[Window]]


class Worker:
    """The work of one thread with its transcriber.

    note_batch: called with the number of windows that are decoded together
    held: most windows at once
    """

    def __init__(self, transcriber: Transcriber, note_batch: Callable[[int], object], held: int = NUM_HELD) -> None:
        self.transcriber, self.note_batch, self.held = transcriber, note_batch, held

    def advance(self, jobs: Sequence[Job]) -> list[Job]:
        """Decodes the next windows of each job, so that short recordings pass long ones; returns the unfinished jobs."""
        jobs = [job for job in jobs if not job.text.cancelled()]
        number = max(1, self.held // max(1, len(jobs)))
        shares = []
        for job in jobs:
            try:
                windows = job.windows(number)
                if len(windows) + len(job.ahead) > 1:
                    self.transcriber.find_language(job.recording, windows[0])
                shares.append((job, windows))
            except Exception as error:  # of this recording alone
                job.end(error)
        decoded = self.decode(shares)
        for job in decoded:
            if not job.ahead:
                job.end()
        return [job for job in decoded if job.ahead]

    def decode(self, shares: Sequence[Share]) -> list[Job]:
        """Decodes the windows of all jobs together, or each job's alone if that fails; returns the jobs that succeeded."""
        windows = [(job.recording, window) for job, windows in shares for window in windows]
        try:
            if windows:
                self.transcriber.add_texts(windows, returns_memory=False)
                self.note_batch(len(windows))
        except Exception as error:
            if len(shares) > 1:
                return [job for share in shares for job in self.decode([share])]
            logger.exception("a recording could not be transcribed")
            shares[0][0].end(error)
            return []
        return [job for job, _ in shares]

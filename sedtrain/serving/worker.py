"""Transcribes recordings together: the windows of all, a share of each in turn."""

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
    """A recording whose text is awaited, and the windows of it that were read ahead: two at first. Raises UserError."""

    def __init__(self, recording: Recording) -> None:
        self.recording, self.ahead = recording, list(islice(recording.windows, 2))
        self.text: Future[Transcription] = Future()

    def windows(self, number: int) -> list[Window]:
        """Its next windows; one more is read, since `ahead` is empty once there are none left."""
        read = [*self.ahead, *islice(self.recording.windows, number + 1 - len(self.ahead))]
        self.ahead = read[number:]
        return read[:number]

    def end(self, error: Exception | None = None) -> None:
        """Hands over the text, or why there is none; nobody waits for it where it was cancelled."""
        if not self.text.set_running_or_notify_cancel():
            return
        if error is None:
            self.text.set_result(self.recording.transcription())
        else:
            self.text.set_exception(error)


Share = tuple[Job, list[Window]]


class Worker:
    """What one thread does with its transcriber; `note_batch` is told how many windows are decoded together.

    held: windows at once
    """

    def __init__(self, transcriber: Transcriber, note_batch: Callable[[int], object], held: int = NUM_HELD) -> None:
        self.transcriber, self.note_batch, self.held = transcriber, note_batch, held

    def advance(self, jobs: Sequence[Job]) -> list[Job]:
        """Decodes the next windows of each job, so that short recordings pass long ones; returns the unfinished ones."""
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
        """Decodes windows of all jobs together, each alone where that fails; returns the jobs for which it did not."""
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

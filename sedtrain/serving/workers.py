"""Transcribes recordings in threads: one worker on an accelerator, on a CPU several that share its threads.

In each round, a worker decodes some windows of each of its recordings together.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import islice
from math import ceil
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import torch
from torch import Tensor

from sedtrain.data.memory import return_freed_memory
from sedtrain.decoding.recordings import NUM_HELD, Recording
from sedtrain.decoding.transcriber import Transcriber
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


MOST_WORKERS = 4
IDLE_SECONDS = 1.0  # before freed memory goes back to the system; a next request would have to wait for that


class Workers:
    """Threads with a transcriber each, which share their weights.

    note_batch: called with the number of windows that are decoded together
    """

    def __init__(self, transcriber: Transcriber, note_batch: Callable[[int], object]) -> None:
        self.transcriber, self.num_threads = transcriber, torch.get_num_threads()
        on_cpu = transcriber.saved.model.device.type == "cpu"
        number = min(MOST_WORKERS, self.num_threads) if on_cpu else 1
        own = [transcriber, *(sharing_weights(transcriber) for _ in range(number - 1))]
        workers = [Worker(each, note_batch, NUM_HELD // number) for each in own]
        self.threads = [Thread(target=self.run, args=(each,), name="transcribing", daemon=True) for each in workers]
        self.arrivals: SimpleQueue[Job | None] = SimpleQueue()
        self.num_busy, self.lock, self.is_ending = 0, Lock(), False

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    @property
    def are_alive(self) -> bool:
        return all(thread.is_alive() for thread in self.threads)

    def submit(self, file: str, language: str | None, with_words: bool) -> Future[Transcription]:
        """The text of a file, to come; cancelling it stops the work. The first windows are read in the caller's thread.

        Raises UserError for audio that cannot be read; an error further on in the file comes with the text.
        """
        job = Job(self.transcriber.recording_of(file, language, with_words))
        self.arrivals.put(job)
        return job.text

    def stop(self) -> None:
        """Ends each thread after the windows that it decodes now, and cancels all unfinished texts."""
        self.is_ending = True
        self.arrivals.put(None)
        for thread in self.threads:
            thread.join()
        while not self.arrivals.empty():
            if job := self.arrivals.get():
                job.text.cancel()

    def run(self, worker: Worker) -> None:
        jobs: list[Job] = []
        while not self.is_ending:
            arrived = [] if jobs else [self.awaited()]
            arrived += self.share(worker.held - len(jobs) - len(arrived))
            with self.busy():
                jobs = worker.advance([*jobs, *filter(None, arrived)])
        for job in jobs:
            job.text.cancel()
        self.arrivals.put(None)  # wakes the next thread

    def awaited(self) -> Job | None:
        """The next job to arrive. If none does for a while, freed memory goes back to the system first."""
        try:
            return self.arrivals.get(timeout=IDLE_SECONDS)
        except Empty:
            return_freed_memory()
            return self.arrivals.get()

    def share(self, most: int) -> list[Job | None]:
        """This worker's equal share of the waiting jobs, but not more than `most`."""
        taken: list[Job | None] = []
        with suppress(Empty):  # another worker was faster
            for _ in range(min(most, ceil(self.arrivals.qsize() / len(self.threads)))):
                taken.append(self.arrivals.get_nowait())
        return taken

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Divides PyTorch's threads among the workers that compute now, while this one does."""
        with self.lock:
            self.num_busy += 1
            torch.set_num_threads(max(1, self.num_threads // self.num_busy))
        try:
            yield
        finally:
            with self.lock:
                self.num_busy -= 1


def sharing_weights(transcriber: Transcriber) -> Transcriber:
    """A copy for another thread. It has its own modules, which keep their last results, and shares all tensors."""
    tensors = [
        each
        for module in transcriber.saved.model.modules()
        for place in (module._parameters, module._buffers, vars(module))
        for each in place.values()
        if isinstance(each, Tensor)
    ]
    return deepcopy(transcriber, {id(each): each for each in tensors})

"""The training step, the validation step and the optimizer, as Lightning calls them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.utilities.memory import is_oom_error
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.decoding.generate import DecodingOptions, transcribe_batch
from sedtrain.errors import UserError
from sedtrain.evaluation.metrics import CorpusMetrics, MetricSet
from sedtrain.models.encoded import EncodedSpeech
from sedtrain.models.losses import LossWeights, ctc
from sedtrain.models.parts import Execution, part_of
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.training.gradients import SCALE, LossSums, MicroBatches, RunningStatistics, Update
from sedtrain.training.optim import build_optimizer, parameter_groups
from sedtrain.training.strategies import FullySharded


class OutOfMemory(UserError):
    """A batch was too large."""


@contextmanager
def enough_for(batch: Batch) -> Iterator[None]:
    """Raises OutOfMemory with the size of the batch and the settings to change where memory runs out within."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error)):
            raise
        num_tokens = int((batch.labels != IGNORE_INDEX).sum())
        raise OutOfMemory(
            f"out of memory in a batch of {len(batch)} utterances, {batch.seconds:.1f} s of audio as an input of "
            f"{tuple(batch.inputs.shape)}, {num_tokens:,} target tokens",
            "data.batches=FILE of task=fit_batches, which finds what fits, data.batch_seconds=LESS (with "
            "trainer.accumulate_grad_batches=MORE each update stays as large), data.batch_tokens=NUMBER, "
            "data.max_seconds=LESS where one utterance is too long by itself, or trainer.precision=bf16-mixed",
        ) from error


class OtherAudio:
    """Gives each utterance the audio of the one before it, encoded once; the first of a batch hears the last."""

    def __init__(self) -> None:
        self.before: EncodedSpeech | None = None

    def instead_of(self, encoded: EncodedSpeech) -> EncodedSpeech | None:
        """An utterance alone in its batch hears the first of the batch before; None where there is none."""
        before, self.before = self.before, rows(encoded, [0])
        num_utterances = len(encoded.last_hidden_state)
        return before if num_utterances == 1 else rows(encoded, [num_utterances - 1, *range(num_utterances - 1)])


def rows(encoded: EncodedSpeech, order: list[int]) -> EncodedSpeech:
    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order]

    return EncodedSpeech(
        last_hidden_state=chosen(encoded.last_hidden_state), attention_mask=chosen(encoded.attention_mask)
    )


class SpeechSeq2SeqModule(lightning.LightningModule):
    """Trains a SpeechEncoderDecoder with teacher forcing, and CTC beside it where `weights.ctc_weight` is above 0.

    update: what the optimizer's last step was made of
    """

    def __init__(
        self,
        model: SpeechEncoderDecoder,
        tokenizer: PreTrainedTokenizerBase,
        weights: LossWeights,
        metric_set: MetricSet,
        decoding: DecodingOptions,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler],
        grouped: Callable[[nn.Module], list[dict[str, Any]]] = parameter_groups,
        execution: Execution | None = None,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.weights, self.decoding = model, tokenizer, weights, decoding
        self.optimizer, self.scheduler, self.grouped = optimizer, scheduler, grouped
        self.execution = execution or Execution()
        self.metrics = CorpusMetrics(metric_set)
        self.validation_sums, self.other_audio = torch.zeros(4, dtype=torch.float64), OtherAudio()
        self.micro_batches, self.update = MicroBatches(), cast(Update | None, None)

    def configure_model(self) -> None:
        strategy = self.trainer.strategy
        if isinstance(strategy, FullySharded):
            self.model = strategy.own(self.model)
        self.execution.prepare(self.model)
        if isinstance(strategy, FullySharded):
            strategy.shard(self)

    def losses(self, batch: Batch) -> LossSums:
        """What a micro-batch adds to the cross-entropy and to CTC; where it has no utterance, nothing."""
        if len(batch) == 0:
            none = torch.zeros((), device=self.device)
            return LossSums(self.zero_loss(), none, none, none)
        return self.loss_sums(batch)

    def loss_sums(self, batch: Batch) -> LossSums:
        encoded = self.model.encode(batch.inputs, batch.attention_mask)
        cross_entropy = self.cross_entropy(encoded, batch.labels)
        return LossSums(cross_entropy, (batch.labels != IGNORE_INDEX).sum(), *self.ctc(encoded, batch.text_labels))

    def cross_entropy(self, encoded: EncodedSpeech, labels: Tensor) -> Tensor:
        """Summed over the target tokens; smoothed in training only."""
        smoothing = self.weights.label_smoothing if self.training else 0.0
        output = self.model(
            encoder_outputs=encoded, labels=labels, label_smoothing=smoothing, output_logits=False, num_items_in_batch=1
        )
        assert output.loss is not None
        loss: Tensor = output.loss
        return loss

    def ctc(self, encoded: EncodedSpeech, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The CTC loss of the encoder's own frames and the number of aligned tokens; the pad token is the blank."""
        if not self.weights.ctc_weight:
            none = torch.zeros((), device=labels.device)
            return none, none
        assert self.model.ctc_head is not None and encoded.encoder_mask is not None
        config = self.model.config
        logits = self.model.ctc_head(encoded.encoder_frames)
        return ctc(logits, encoded.encoder_mask.sum(1), labels, blank=config.pad_token_id, end=config.eos_token_id)

    def zero_loss(self) -> Tensor:
        """A loss of zero with a gradient of zeros, by which a rank without utterances takes part in the step of the others.

        Where the weights lie in pieces it has to gather them as often as the others: it computes with silence.
        """
        if isinstance(self._trainer and self._trainer.strategy, FullySharded):
            datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            sums = self.loss_sums(datamodule.collator.dummy_batch().to(self.device))
            return 0.0 * self.weights.joint(sums.cross_entropy, sums.ctc)
        return 0.0 * torch.stack([weight.sum() for weight in self.parameters() if weight.requires_grad]).sum()

    def on_train_start(self) -> None:
        self.running_statistics = RunningStatistics(self.model)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        self.batch = batch

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        with enough_for(batch):
            sums = self.losses(batch)
        self.micro_batches.add(sums)
        # Lightning divides by the number of micro-batches, which would round 16 bits in another way for each number.
        return self.trainer.accumulate_grad_batches * SCALE * self.weights.joint(sums.cross_entropy, sums.ctc)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with enough_for(self.batch):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with enough_for(self.batch):
            super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the gradients, which the trainer clips next."""
        parts: dict[str, list[Tensor]] = {}
        for name, weight in self.model.named_parameters():
            parts.setdefault(part_of(name), []).append(weight)
        update = self.micro_batches.divide(parts, self.over_ranks, self.trainer.world_size)
        self.update = update
        self.running_statistics.settle(update)
        if update.num_tokens and update.loss_is_finite:
            self.log("train/loss", update.cross_entropy, prog_bar=True)
            if self.weights.ctc_weight:
                self.log("train/ctc_loss", update.ctc)

    def on_validation_start(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.unshard()

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.validation_sums.zero_()

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, list[str]] | None:
        if len(batch) == 0:
            return None
        with enough_for(batch), torch.compiler.set_stance("force_eager"):  # every token would be compiled anew
            encoded = self.model.encode(batch.inputs, batch.attention_mask)
            self.validation_sums += self.with_other_audio(encoded, batch.labels).cpu()
            hypotheses = transcribe_batch(self.model, self.tokenizer, batch, self.decoding)
        self.metrics.update(batch.texts, hypotheses)
        return {"hypotheses": hypotheses}

    def with_other_audio(self, encoded: EncodedSpeech, labels: Tensor) -> Tensor:
        """(4,): cross-entropy, its tokens; how much more it is with the audio of other utterances, and the tokens of this."""
        other = self.other_audio.instead_of(encoded)
        own_loss, other_loss = (
            self.cross_entropy(each, labels) for each in (encoded, encoded if other is None else other)
        )
        num_tokens = (labels != IGNORE_INDEX).sum()
        return torch.stack([own_loss, num_tokens, other_loss - own_loss, num_tokens * (other is not None)])

    def on_validation_epoch_end(self) -> None:
        """Logs the scores; raises UserError where no utterance could be read."""
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.reshard()
        self.other_audio = OtherAudio()
        loss_sum, num_tokens, gain_sum, num_compared = self.over_ranks(self.validation_sums).tolist()
        if not num_tokens:
            raise UserError(
                "none of the validation utterances could be decoded: there is nothing to choose the best weights by",
                "data.validation_split and data.columns of audio that can be read; skipped.jsonl says what is wrong with this",
            )
        self.metrics.set_counts(self.over_ranks(torch.from_numpy(self.metrics.counts())).cpu())
        scores = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        if num_compared:
            scores["val/audio_gain"] = gain_sum / num_compared
        self.log_dict({"val/loss": loss_sum / num_tokens, **scores}, prog_bar=True, sync_dist=True)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of this rank -> sums of all ranks."""
        if self.trainer.world_size == 1:
            return sums
        summed: Tensor = self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")
        return summed

    def optimizer_and_schedule(self, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(self.optimizer, self.grouped(self.model))
        return optimizer, self.scheduler(optimizer, num_training_steps=num_steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = self.optimizer_and_schedule(int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

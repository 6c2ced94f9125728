"""The training step, the validation step and the optimizer, as Lightning calls them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import IGNORE_INDEX, Batch
from sedtrain.decoding.generate import decode_batch
from sedtrain.decoding.options import DecodingOptions
from sedtrain.errors import UserError
from sedtrain.evaluation.metric_set import CorpusMetrics, MetricSet
from sedtrain.models.encoder import EncodedSpeech
from sedtrain.models.losses import LossWeights, ctc
from sedtrain.models.parts import Execution
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.models.steps import forget
from sedtrain.training.feature_cache import FeatureCache
from sedtrain.training.gradients import SCALE, LossSums, RunningStatistics, Update, divide_gradients, on_host, skip
from sedtrain.training.guards import OtherAudio
from sedtrain.training.memory import memory_for
from sedtrain.training.optim import build_optimizer, parameter_groups
from sedtrain.training.strategies import FullySharded, gather_states
from sedtrain.training.tracking import callbacks_of, is_logged


class SpeechSeq2SeqModule(LightningModule):
    """Trains a SpeechEncoderDecoder with teacher forcing, and with CTC if `weights.ctc_weight` is above 0.

    grouped: model -> its parameters in groups, for the optimizer
    update:  the last optimizer step; None before the first
    is_read: True if the numbers of `update` are reported: every step on a CPU; on a GPU only logged steps, since reading
        makes the host wait
    cache:   outputs of the frozen front of the model; None: the front computes every batch
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
        self.update: Update | None = None
        self.is_read = True
        self.cache: FeatureCache | None = None
        self.micro_batches: list[Tensor] = []
        self.metrics, self.other_audio = CorpusMetrics(metric_set), OtherAudio()
        self.validation_sums = torch.zeros(4, dtype=torch.float64)

    @property
    def sharding(self) -> FullySharded | None:
        """The strategy, if it shards the model."""
        strategy = self._trainer and self._trainer.strategy
        return strategy if isinstance(strategy, FullySharded) else None

    @property
    def data(self) -> Any:
        """The SpeechTextDataModule of the fit; None if batches come from plain loaders."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        if self.sharding and self.sharding.is_global_zero:
            config = self.model.encoder.config
            # The unsharded original takes the final weights. It shares the encoder's config, where `prepare` records how they
            # were computed.
            self.model = copy.deepcopy(self.model, {id(config): config})
        self.execution.prepare(self.model)
        if self.sharding:
            self.sharding.shard(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self.num_steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = self.optimizer_and_schedule(self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_and_schedule(self, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(self.optimizer, self.grouped(self.model))
        return optimizer, self.scheduler(optimizer, num_training_steps=num_steps)

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Moves the schedule one step; with `trainer.max_time`, further if more of the time than of the steps is over."""
        fraction = time_fraction(self.trainer)
        if fraction is None:
            super().lr_scheduler_step(scheduler, metric)
            return
        due = max(self.trainer.global_step, int(min(fraction, 1.0) * self.num_steps))
        while scheduler.last_epoch < due:
            scheduler.step()

    # --- a training step, in the order in which Lightning calls these

    def on_train_start(self) -> None:
        self.running_statistics = RunningStatistics(self.model)

    def on_train_batch_start(self, batch: Batch, batch_index: int) -> None:
        self.batch = batch

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        with memory_for(batch, self.data):
            sums = self.losses(batch)
        scalars = [scalar.detach().float().to(self.device, non_blocking=True) for scalar in sums]
        self.micro_batches.append(torch.stack(scalars))
        # Undoes Lightning's division by the number of micro-batches, which would round 16-bit gradients.
        return self.trainer.accumulate_grad_batches * SCALE * self.weights.joint(sums.cross_entropy, sums.ctc)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with memory_for(self.batch, self.data):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        with memory_for(self.batch, self.data):
            super().optimizer_step(*args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the gradients by the number of tokens; the trainer clips them next."""
        micro_batches = torch.stack(self.micro_batches)
        self.micro_batches.clear()
        update = self.update = divide_gradients(self.model, micro_batches, self.over_ranks, self.trainer.world_size)
        skip(update, optimizer, self.model)
        self.running_statistics.keep_or_restore(update)
        self.is_read = self.device.type == "cpu" or is_logged(self.trainer)
        if self.is_read and update.num_tokens and update.loss_is_finite:
            losses = {"train/loss": update.cross_entropy, "train/cross_entropy": update.unsmoothed}
            self.log_dict(on_host(losses | ({"train/ctc_loss": update.ctc} if self.weights.ctc_weight else {})))

    # --- losses

    def losses(self, batch: Batch) -> LossSums:
        """Summed losses of one micro-batch; zero, with a zero gradient, for an empty one.

        A sharded model still runs, on silence: every rank must gather the weights equally often.
        """
        if len(batch):
            return self.loss_sums(batch)
        if self.sharding:
            sums = self.loss_sums(self.data.collator.dummy_batch().to(self.device))
            loss = self.weights.joint(sums.cross_entropy, sums.ctc)
        else:
            loss = torch.stack([weight.sum() for weight in self.parameters() if weight.requires_grad]).sum()
        zero = torch.zeros((), device=self.device)
        return LossSums(0.0 * loss, zero, zero, zero, zero)

    def loss_sums(self, batch: Batch) -> LossSums:
        with self.cached(batch):
            encoded = self.model.encode(batch.inputs, batch.padding_mask)
        known = batch.on_host
        loss, unsmoothed = self.cross_entropy(encoded, known.labels)
        num_tokens = (known.labels != IGNORE_INDEX).sum()
        return LossSums(loss, num_tokens, *self.ctc(encoded, known.text_labels), unsmoothed)

    def cached(self, batch: Batch) -> AbstractContextManager[None]:
        """Inside, the cache replaces the frozen front of the model for this batch."""
        return nullcontext() if self.cache is None else self.cache.serve(self.model, batch)

    def cross_entropy(self, encoded: EncodedSpeech, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the target tokens: with label smoothing (only in training), and without it or a gradient."""
        smoothing = self.weights.label_smoothing if self.training else 0.0
        output = self.model(
            encoder_outputs=encoded, labels=labels, label_smoothing=smoothing, output_logits=False, num_items_in_batch=1
        )
        assert isinstance(output.loss, Tensor)
        return output.loss, output.get("cross_entropy", output.loss.detach())

    def ctc(self, encoded: EncodedSpeech, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Summed CTC loss on the encoder's frames, and the number of aligned tokens. The pad token is the blank."""
        if not self.weights.ctc_weight:
            zero = torch.zeros((), device=self.device)
            return zero, zero
        assert self.model.ctc_head is not None
        config, mask = self.model.config, encoded.encoder_mask
        logits = self.model.ctc_head(encoded.encoder_frames)
        num_frames = torch.full(logits.shape[:1], logits.shape[1]) if mask is None else mask.sum(1)
        return ctc(logits, num_frames, labels, blank=config.pad_token_id, end=config.eos_token_id)

    # --- a validation, in the order in which Lightning calls these

    def on_validation_start(self) -> None:
        if self.sharding:
            self.sharding.unshard()

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.validation_sums.zero_()
        self.other_audio = OtherAudio()

    def validation_step(self, batch: Batch, batch_index: int) -> dict[str, list[str]] | None:
        if len(batch) == 0:
            return None
        # torch.compile would compile anew for every token.
        with memory_for(batch, self.data), torch.compiler.set_stance("force_eager"), self.cached(batch):
            encoded = self.model.encode(batch.inputs, batch.padding_mask)
            self.validation_sums += self.probe(encoded, batch.labels).cpu()
            found = decode_batch(self.model, self.tokenizer, batch, self.decoding, encoded=encoded)
        hypotheses = [decoded.texts[0] for decoded in found]
        self.metrics.update(batch.texts, hypotheses)
        return {"hypotheses": hypotheses}

    def probe(self, encoded: EncodedSpeech, labels: Tensor) -> Tensor:
        """(4,): summed cross-entropy, its tokens, its increase with other utterances' audio, the tokens of that comparison.

        Texts are cut to the decoder's positions, for the comparison to those that both audios leave.
        """
        labels, other = cut(labels, self.model.rooms(encoded)), self.other_audio.exchanged(encoded)
        loss, _ = self.cross_entropy(encoded, labels)
        num_tokens, zero = (labels != IGNORE_INDEX).sum(), torch.zeros_like(loss)
        if other is None:
            return torch.stack([loss, num_tokens, zero, zero])
        compared = cut(labels, self.model.rooms(other))
        num_compared = (compared != IGNORE_INDEX).sum()
        own_loss = loss if num_compared == num_tokens else self.cross_entropy(encoded, compared)[0]
        return torch.stack([loss, num_tokens, self.cross_entropy(other, compared)[0] - own_loss, num_compared])

    def on_validation_epoch_end(self) -> None:
        """Logs the scores. Raises UserError if no utterance could be decoded."""
        forget(self.model)
        if self.sharding:
            self.sharding.reshard()
        loss_sum, num_tokens, gain_sum, num_compared = self.over_ranks(self.validation_sums).tolist()
        if not num_tokens:
            splits = {str(source.splits["validation"]) for source in self.data.corpus.sources}
            wrong = "no utterance of this split could be decoded, so the best weights cannot be chosen\n"
            wrong += "skipped.jsonl names the fault of each"
            write = "write data.validation_split and data.columns of audio that can be decoded"
            raise UserError("data.validation_split", ", ".join(sorted(splits)), wrong, write)
        self.metrics.counts = self.over_ranks(torch.from_numpy(self.metrics.counts)).cpu().numpy()
        if self.metrics.metric_set.own and self.trainer.world_size > 1:
            self.metrics.texts = [text for rank_texts in gather_states(self.metrics.texts) for text in rank_texts]
        scores = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        if num_compared:
            scores["val/audio_gain"] = gain_sum / num_compared
        self.log_dict({"val/loss": loss_sum / num_tokens, **scores}, prog_bar=True, sync_dist=True)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of this rank -> sums of all ranks."""
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum")


def cut(labels: Tensor, rooms: list[int] | None) -> Tensor:
    """(B, U) labels, each text cut to its room; None for any length."""
    if rooms is None:
        return labels
    positions = torch.arange(max(rooms), device=labels.device)[: labels.shape[1]]
    return labels[:, : len(positions)].where(positions < labels.new_tensor(rooms)[:, None], IGNORE_INDEX)


def time_fraction(trainer: Trainer) -> float | None:
    """Elapsed fraction of `trainer.max_time`, equal on all ranks; None without that limit."""
    timers = callbacks_of(trainer, Timer)
    remaining = timers[0].time_remaining() if timers else None
    if remaining is None:
        return None
    elapsed = timers[0].time_elapsed()
    fraction = elapsed / (elapsed + remaining)
    return fraction if trainer.world_size == 1 else float(trainer.strategy.broadcast(fraction))

"""The training step, the validation step and the optimizer, as Lightning calls them.

B batch, T frames, U target tokens, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch
from sedtrain.decoding.generate import DecodingOptions, transcribe_batch
from sedtrain.evaluation.metrics import CorpusMetrics, MetricSet
from sedtrain.losses import LossWeights, ctc, shift_right, token_cross_entropy
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.optim import parameter_groups


class SpeechSeq2SeqModule(lightning.LightningModule):
    """Trains a SpeechEncoderDecoder with teacher forcing, and CTC beside it where `weights.ctc_weight` is above 0."""

    def __init__(
        self,
        model: SpeechEncoderDecoder,
        tokenizer: PreTrainedTokenizerBase,
        weights: LossWeights,
        metric_set: MetricSet,
        decoding: DecodingOptions,
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., Any],
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.weights, self.decoding = model, tokenizer, weights, decoding
        self.optimizer, self.scheduler = optimizer, scheduler
        self.ctc_head = nn.Linear(model.decoder.config.hidden_size, len(tokenizer)) if weights.ctc_weight else None
        self.metrics = CorpusMetrics(metric_set)
        self.validation_sums = torch.zeros(2, dtype=torch.float64)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's loss to minimise, its cross-entropy and its CTC loss, each in nats per token."""
        config = self.model.config
        output = self.model(
            batch.inputs,
            attention_mask=batch.attention_mask,
            decoder_input_ids=shift_right(batch.labels, config.decoder_start_token_id, config.pad_token_id),
            use_cache=False,
        )
        smoothing = self.weights.label_smoothing if self.training else 0.0
        loss_sum, num_tokens = token_cross_entropy(output.logits, batch.labels, smoothing)
        cross_entropy = loss_sum / num_tokens.clamp(min=1)
        if self.ctc_head is None:
            return cross_entropy, cross_entropy, torch.zeros_like(cross_entropy)
        ctc_loss = self.ctc_loss(output.encoder_last_hidden_state, batch)
        weight = self.weights.ctc_weight or 0.0
        return (1 - weight) * cross_entropy + weight * ctc_loss, cross_entropy, ctc_loss

    def ctc_loss(self, frames: Tensor, batch: Batch) -> Tensor:
        """(B, T, D) encoder output -> CTC loss in nats per aligned token; the pad token is the blank."""
        assert self.ctc_head is not None
        config = self.model.config
        mask = self.model.encoder._get_feature_vector_attention_mask(frames.shape[1], batch.attention_mask)
        loss_sum, num_tokens = ctc(
            self.ctc_head(frames), mask.sum(1), batch.labels, blank=config.pad_token_id, end=config.eos_token_id
        )
        return loss_sum / num_tokens.clamp(min=1)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if len(batch) == 0:
            return None
        loss, cross_entropy, ctc_loss = self.losses(batch)
        self.log("train/loss", cross_entropy, prog_bar=True, batch_size=len(batch))
        if self.ctc_head is not None:
            self.log("train/ctc_loss", ctc_loss, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.validation_sums.zero_()

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        if len(batch) == 0:
            return
        _, cross_entropy, _ = self.losses(batch)
        num_tokens = (batch.labels >= 0).sum().item()
        self.validation_sums += torch.tensor([cross_entropy.item() * num_tokens, num_tokens], dtype=torch.float64)
        self.metrics.update(batch.texts, transcribe_batch(self.model, self.tokenizer, batch, self.decoding))

    def on_validation_epoch_end(self) -> None:
        loss_sum, num_tokens = self.over_ranks(self.validation_sums)
        self.metrics.set_counts(self.over_ranks(torch.from_numpy(self.metrics.counts())))
        scores = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict({"val/loss": float(loss_sum / num_tokens), **scores}, prog_bar=True, sync_dist=True)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of this rank -> sums of all ranks, on the CPU."""
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(parameter_groups(self))
        schedule = self.scheduler(optimizer, num_training_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

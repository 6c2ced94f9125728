"""The training step, the validation step and the optimizer, as Lightning calls them."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase

from sedtrain.batch import Batch, UserError
from sedtrain.decoding.generate import DecodingOptions, transcribe_batch
from sedtrain.evaluation.metrics import CorpusMetrics, MetricSet
from sedtrain.losses import LossWeights, ctc
from sedtrain.models.encoded import EncodedSpeech
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.optim import build_optimizer, parameter_groups


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
        scheduler: Callable[..., LRScheduler],
        grouped: Callable[[nn.Module], list[dict[str, Any]]] = parameter_groups,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.weights, self.decoding = model, tokenizer, weights, decoding
        self.optimizer, self.scheduler, self.grouped = optimizer, scheduler, grouped
        self.metrics = CorpusMetrics(metric_set)
        self.validation_sums = torch.zeros(2, dtype=torch.float64)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's loss to minimise, its cross-entropy and its CTC loss, each in nats per token."""
        encoded = self.model.encode(batch.inputs, batch.attention_mask)
        smoothing = self.weights.label_smoothing if self.training else 0.0
        output = self.model(
            encoder_outputs=encoded, labels=batch.labels, label_smoothing=smoothing, output_logits=False
        )
        assert output.loss is not None
        if not self.weights.ctc_weight:
            return output.loss, output.loss, torch.zeros_like(output.loss)
        ctc_loss = self.ctc_loss(encoded, batch.labels)
        weight = self.weights.ctc_weight
        return (1 - weight) * output.loss + weight * ctc_loss, output.loss, ctc_loss

    def ctc_loss(self, encoded: EncodedSpeech, labels: Tensor) -> Tensor:
        """The CTC loss of the encoder's own frames in nats per aligned token; the pad token is the blank."""
        assert self.model.ctc_head is not None and encoded.encoder_mask is not None
        config = self.model.config
        logits = self.model.ctc_head(encoded.encoder_frames)
        loss_sum, num_tokens = ctc(
            logits, encoded.encoder_mask.sum(1), labels, blank=config.pad_token_id, end=config.eos_token_id
        )
        return loss_sum / num_tokens.clamp(min=1)

    def nothing(self) -> Tensor:
        """A loss of zero with a gradient of zeros, by which a rank without utterances takes part in the step of the others."""
        return 0.0 * torch.stack([weight.sum() for weight in self.parameters() if weight.requires_grad]).sum()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor | None:
        if len(batch) == 0:
            return self.nothing() if torch.distributed.is_initialized() else None
        loss, cross_entropy, ctc_loss = self.losses(batch)
        self.log("train/loss", cross_entropy, prog_bar=True, batch_size=len(batch))
        if self.weights.ctc_weight:
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
        """Logs the scores; raises UserError where no utterance could be read."""
        loss_sum, num_tokens = self.over_ranks(self.validation_sums)
        if not num_tokens:
            raise UserError(
                "none of the validation utterances could be decoded: there is nothing to choose the best weights by",
                "data.validation_split and data.columns of audio that can be read; skipped.jsonl says what is wrong with this",
            )
        self.metrics.set_counts(self.over_ranks(torch.from_numpy(self.metrics.counts())))
        scores = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        self.log_dict({"val/loss": float(loss_sum / num_tokens), **scores}, prog_bar=True, sync_dist=True)

    def over_ranks(self, sums: Tensor) -> Tensor:
        """Sums of this rank -> sums of all ranks, on the CPU."""
        if self.trainer.world_size == 1:
            return sums
        return self.trainer.strategy.reduce(sums.to(self.device), reduce_op="sum").cpu()

    def optimizer_and_schedule(self, num_steps: int) -> tuple[Optimizer, LRScheduler]:
        optimizer = build_optimizer(self.optimizer, self.grouped(self.model))
        return optimizer, self.scheduler(optimizer, num_training_steps=num_steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = self.optimizer_and_schedule(int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

"""The trainer of transformers with our model."""

import pytest
import torch
from pairs import VOCABULARY, joined
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

pytest.importorskip("accelerate")

NUM_TOKENS = [9, 2, 5, 3, 7, 1, 6, 4]


class Utterances(torch.utils.data.Dataset):
    def __len__(self):
        return len(NUM_TOKENS)

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        generator = torch.Generator().manual_seed(i)
        labels = torch.randint(6, VOCABULARY, (NUM_TOKENS[i],), generator=generator)
        return {"input_values": torch.randn(800 + 300 * i, generator=generator), "labels": labels}


def collate(rows):
    """Neither decoder_input_ids nor a word of the start token."""
    pad = torch.nn.utils.rnn.pad_sequence
    audio = [row["input_values"] for row in rows]
    return {
        "input_values": pad(audio, batch_first=True),
        "attention_mask": pad([torch.ones(len(each), dtype=torch.long) for each in audio], batch_first=True),
        "labels": pad([row["labels"] for row in rows], batch_first=True, padding_value=-100),
    }


@pytest.fixture
def trainer_of(tmp_path):
    def make(model, batch_size, accumulation=1, collator=collate, **options):
        arguments = Seq2SeqTrainingArguments(
            output_dir=tmp_path, max_steps=1, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, use_cpu=True,
            report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        return Seq2SeqTrainer(
            model=model, args=arguments, train_dataset=Utterances(), eval_dataset=Utterances(), data_collator=collator
        )

    return make


def update_of(trainer):
    """The change of each weight by one step, and the loss that the trainer tells."""
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    loss = trainer.train().training_loss
    return {name: weight - before[name] for name, weight in trainer.model.state_dict().items()}, loss


def norm(update):
    return torch.stack([each.float().norm() for each in update.values()]).norm()


def test_accumulated_and_at_once_the_trainer_makes_one_update(trainer_of):
    at_once, loss = update_of(trainer_of(joined("hubert", "bert"), 8))
    for batch_size in (1, 4):
        update, accumulated_loss = update_of(trainer_of(joined("hubert", "bert"), batch_size, 8 // batch_size))
        difference = {name: update[name] - at_once[name] for name in update}
        assert norm(difference) / norm(at_once) < 1e-5
        assert accumulated_loss == pytest.approx(loss, rel=1e-5)


def test_the_trainer_evaluates_by_loss_and_by_generated_text(trainer_of):
    model = joined("hubert", "bert")
    model.generation_config.max_length = 6
    trainer = trainer_of(model, 4, predict_with_generate=True, per_device_eval_batch_size=4)
    predicted = trainer.predict(Utterances())
    assert predicted.predictions.shape == (8, 6)
    batch = collate([Utterances()[i] for i in range(8)])
    halves = [{name: each[half] for name, each in batch.items()} for half in (slice(4), slice(4, 8))]
    with torch.inference_mode():
        expected = sum(model.eval()(**half).loss for half in halves) / 2
    assert predicted.metrics["test_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_the_trainers_label_smoothing_needs_decoder_inputs_and_says_so(trainer_of):
    with pytest.raises(ValueError, match="let the collator add decoder_input_ids=model"):
        trainer_of(joined("hubert", "bert"), 8, label_smoothing_factor=0.1).train()
    model = joined("hubert", "bert")

    def with_decoder_inputs(rows):
        batch = collate(rows)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    with torch.no_grad():
        expected = joined("hubert", "bert")(**collate(list(Utterances())), label_smoothing=0.1).loss
    smoothed = trainer_of(model, 8, collator=with_decoder_inputs, label_smoothing_factor=0.1).train().training_loss
    assert smoothed == pytest.approx(float(expected), rel=1e-5)

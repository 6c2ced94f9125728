"""The Hugging Face folder: weights, configurations, tokenizer, feature extractor, model card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoFeatureExtractor, PreTrainedTokenizerBase, SequenceFeatureExtractor, Wav2Vec2Processor

from sedtrain.decoding.generate import DecodingOptions
from sedtrain.evaluation.results import Results
from sedtrain.models.encoder import loads_in_stock_transformers
from sedtrain.models.loading import check_loaded, load_tokenizer, loading
from sedtrain.models.lora import FOLDER, base_weights, load_adapter, lora_layers, save_adapter
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder
from sedtrain.run_dir import model_of, write_whole
from sedtrain.text.tags import TASK_OF, Tags


@dataclass(frozen=True)
class SavedModel:
    """A model with what turns audio into its input and its output into text."""

    model: SpeechEncoderDecoder
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: SequenceFeatureExtractor

    @property
    def training_normalizer(self) -> Mapping[str, str] | None:
        """Name and version of what rewrote the texts that the model learnt to write; None where its folder does not say."""
        label: Mapping[str, str] | None = getattr(self.model.config, "training_normalizer", None)
        return label

    @property
    def tags(self) -> Tags | None:
        """What asks the model for a language and a task, where it learnt several."""
        ids: Mapping[str, Mapping[str, Sequence[int]]] | None = getattr(self.model.config, "tags", None)
        return Tags(ids) if ids else None

    def save(self, folder: Path, decoding: DecodingOptions) -> None:
        """Writes a folder that `transformers` loads without sedtrain; `decoding` becomes its generation config."""
        for name, value in decoding.generation_kwargs().items():
            setattr(self.model.generation_config, name, value)
        if lora_layers(self.model):
            self.model.save_pretrained(folder, state_dict=base_weights(self.model))
            save_adapter(self.model, folder / FOLDER)
        else:
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        # the name of one family, but it joins any feature extractor with any tokenizer; AutoProcessor loads it
        Wav2Vec2Processor(self.feature_extractor, self.tokenizer).save_pretrained(folder)

    @classmethod
    def load(cls, checkpoint: str) -> "SavedModel":
        """From a run's folder (its `model/`), a Hugging Face folder or a Hub id; raises UserError when it is none."""
        name = model_of(checkpoint)
        with loading("checkpoint", name):
            model, loaded = SpeechEncoderDecoder.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            feature_extractor = AutoFeatureExtractor.from_pretrained(name)
        check_loaded("checkpoint", name, model, loaded, used=model)
        load_adapter(model, name)
        tokenizer = load_tokenizer("checkpoint", name)
        return cls(model.eval(), tokenizer, feature_extractor)


CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [speech-encoder-decoder, sedtrain]
---
# {encoder} + {decoder} on {data}

A `{encoder}` speech encoder joined to a `{decoder}` text decoder, trained with sedtrain on `{data}`.

| metric ({split}) | value | 95 % interval |
|---|---|---|
{rows}

Text normalizer for scoring: `{normalizer}`; for training: `{training_normalizer}`.
{num_utterances} utterances, {minutes:.1f} minutes of audio.

```python
{import_torch}from transformers import AutoProcessor
{import_model}

folder = "."  # where this card lies: its folder, or its name on the Hub
model = SpeechEncoderDecoderModel.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(audio, sampling_rate={sampling_rate}, return_tensors="pt")  # audio: one channel, float{prompt}
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```
"""
PIPELINE_TAGS = {"transcription": "automatic-speech-recognition", "translation": "translation"}


STOCK = "from transformers import SpeechEncoderDecoderModel"
OWN = """
# transformers has no class for this family's encoder alone, or for this adapter
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder as SpeechEncoderDecoderModel
""".strip()


PROMPT = """
tags = model.config.tags["{task}"]["{language}"]  # it writes {known}
inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *tags]])"""


def prompt(tags: Tags | None, task: str) -> str:
    """How a card asks a model with tags for the first language of a task."""
    if tags is None:
        return ""
    return PROMPT.format(task=task, language=next(iter(tags.ids[task])), known=" ".join(tags.known()))


def named(normalizer: Mapping[str, str] | None) -> str:
    return " ".join(normalizer.values()) if normalizer else "unknown"


def write_model_card(folder: Path, saved: SavedModel, results: Results, data: str) -> None:
    """README.md of the Hugging Face folder, with the metrics and how to load it; `data` names what it was trained on."""
    rows = [
        f"| {name} | {100 * interval.value:.2f} % | {100 * interval.low:.2f} to {100 * interval.high:.2f} % |"
        for name, interval in results.metrics.items()
    ]
    stock = saved.model.adapter is None and loads_in_stock_transformers(saved.model.config.encoder)
    card = CARD.format(
        task=PIPELINE_TAGS[results.task],
        import_torch="import torch\n" if saved.tags else "",
        import_model=STOCK if stock else OWN,
        prompt=prompt(saved.tags, TASK_OF[results.task]),
        encoder=saved.model.config.encoder.model_type,
        decoder=saved.model.config.decoder.model_type,
        data=data,
        split=results.split,
        rows="\n".join(rows),
        normalizer=named(results.normalizer),
        training_normalizer=named(results.training_normalizer),
        num_utterances=results.num_utterances,
        minutes=results.audio_seconds / 60,
        sampling_rate=saved.feature_extractor.sampling_rate,
    )
    write_whole(folder / "README.md", card)

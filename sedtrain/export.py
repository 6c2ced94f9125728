"""The Hugging Face folder: weights, configurations, tokenizer, feature extractor, model card."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoFeatureExtractor, PreTrainedTokenizerBase, SequenceFeatureExtractor, Wav2Vec2Processor

from sedtrain.decoding.generate import DecodingOptions
from sedtrain.evaluation.results import Results
from sedtrain.models.checkpoint import load_tokenizer, loading
from sedtrain.models.encoder import prepared
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder


@dataclass(frozen=True)
class SavedModel:
    """A model with what turns audio into its input and its output into text."""

    model: SpeechEncoderDecoder
    tokenizer: PreTrainedTokenizerBase
    feature_extractor: SequenceFeatureExtractor

    def save(self, folder: Path, decoding: DecodingOptions) -> None:
        """Writes a folder that `transformers` loads without sedtrain; `decoding` becomes its generation config."""
        for name, value in decoding.generation_kwargs().items():
            setattr(self.model.generation_config, name, value)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)
        # the name of one family, but it joins any feature extractor with any tokenizer; AutoProcessor loads it
        Wav2Vec2Processor(self.feature_extractor, self.tokenizer).save_pretrained(folder)

    @classmethod
    def load(cls, checkpoint: str) -> "SavedModel":
        """From a run's folder (its `model/`), a Hugging Face folder or a Hub id; raises UserError when it is none."""
        inside = Path(checkpoint).expanduser() / "model"
        name = str(inside if inside.is_dir() else checkpoint)
        with loading("checkpoint", name):
            model = SpeechEncoderDecoder.from_pretrained(name, dtype=torch.float32)
            feature_extractor = AutoFeatureExtractor.from_pretrained(name)
        tokenizer = load_tokenizer("checkpoint", name)
        prepared(model.encoder)
        return cls(model.eval(), tokenizer, feature_extractor)


CARD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags: [speech-encoder-decoder, sedtrain]
---
# {name}

A `{encoder}` speech encoder joined to a `{decoder}` text decoder, trained with sedtrain on `{data}`.

| metric ({split}) | value | 95 % interval |
|---|---|---|
{rows}

Text normaliser for scoring: `{normaliser}`. {num_utterances} utterances, {minutes:.1f} minutes of audio.

```python
from transformers import AutoProcessor
{import_model}

model = SpeechEncoderDecoderModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
inputs = processor(audio, sampling_rate={sampling_rate}, return_tensors="pt")  # audio: one channel, float
print(processor.decode(model.generate(**inputs)[0], skip_special_tokens=True))
```
"""


STOCK = "from transformers import SpeechEncoderDecoderModel"
OWN = """
# transformers has no class for the encoder of this family alone
from sedtrain.models.speech_encoder_decoder import SpeechEncoderDecoder as SpeechEncoderDecoderModel
""".strip()


def write_model_card(folder: Path, saved: SavedModel, results: Results, data: str) -> None:
    """README.md of the Hugging Face folder, with the metrics and how to load it."""
    rows = [
        f"| {name} | {100 * interval.value:.2f} % | {100 * interval.low:.2f} to {100 * interval.high:.2f} % |"
        for name, interval in results.metrics.items()
    ]
    card = CARD.format(
        name=folder,
        import_model=OWN if saved.model.config.encoder.is_encoder_decoder else STOCK,
        encoder=saved.model.config.encoder.model_type,
        decoder=saved.model.config.decoder.model_type,
        data=data,
        split=results.split,
        rows="\n".join(rows),
        normaliser=results.normaliser["name"],
        num_utterances=results.num_utterances,
        minutes=results.audio_seconds / 60,
        sampling_rate=saved.feature_extractor.sampling_rate,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")

"""The model card of the Hugging Face folder, and its score as the Hub reads it."""

import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from sedtrain.evaluation.metrics import METRICS
from sedtrain.evaluation.results import Results
from sedtrain.models.adapter import AdaptedSpeechEncoderDecoderConfig
from sedtrain.models.encoder import loads_in_stock_transformers
from sedtrain.models.saved import SavedModel
from sedtrain.models.whole import WholeSpeechModel
from sedtrain.run_dir import write_whole
from sedtrain.text.tags import TASK_OF, WholePrompt

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [speech-encoder-decoder, sedtrain]
---
# {title} on {data}

{described}, trained with sedtrain on `{data}`.

| metric ({split}) | value | {interval_title} |
|---|---|---|
{rows}

{scored_as}

Scored on {scored_data}. Text normalizer for training: `{training_normalizer}`.
Utterances: {headline}; {minutes:.1f} minutes of audio.

```python
{import_torch}from transformers import AutoProcessor
{import_model}

folder = "."  # where this card lies: its folder, or its name on the Hub
model = {model_class}.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = {takes_audio}(audio, sampling_rate={sampling_rate}, return_tensors="pt")  # audio: one channel, float{prompt}
print(processor.decode(model.generate(**inputs{asked})[0], skip_special_tokens=True))
```
"""
PIPELINE_TAGS = {"transcription": "automatic-speech-recognition", "translation": "translation"}
STOCK = "from transformers import SpeechEncoderDecoderModel"
OWN = """
# transformers has no class for this encoder alone, for this adapter, or for audio in front of a text
from sedtrain import SpeechEncoderDecoder as SpeechEncoderDecoderModel
""".strip()
WHOLE = "from transformers import AutoModelForSpeechSeq2Seq"
PROMPT = """
tags = model.config.tags["{task}"]["{language}"]  # it writes {known}
inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *tags]])"""


PROMPT_OF_WHOLE = """
inputs["decoder_input_ids"] = torch.tensor([[{start}, *{ids}]])  # {language}"""
HUB_DATA = re.compile(r"([\w.-]+/[\w.-]+), (?:([^,+]+), )?[^,+]+")
"""A single dataset of the Hub as `Corpus.described` writes it: id, configuration, split."""


def write_eval_results(folder: Path, results: Results) -> None:
    """Writes .eval_results/sedtrain.yaml, from which the Hub shows the first metric; nothing for data that it does not have."""
    name, interval = next((name, each) for name, each in results.metrics.items() if name in METRICS)
    of_hub = HUB_DATA.fullmatch(results.data)
    if not of_hub:
        return
    scored_as = "; ".join(results.scored_as())
    notes = f"{METRICS[name].title} in percent, 95 % interval {interval.ends}, of {results.data}; {scored_as}"
    entry = EvalResultEntry(of_hub[1], of_hub[2] or "default", round(100 * interval.value, 2), notes=notes)
    (folder / ".eval_results").mkdir(exist_ok=True)
    listed = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    write_whole(folder / ".eval_results/sedtrain.yaml", listed)


def write_model_card(folder: Path, saved: SavedModel, results: Results, data: str) -> None:
    """Writes README.md of the Hugging Face folder: the metrics, and code that loads the model; and the score for the Hub.

    data: the name of what it was trained on
    """
    rows = [f"| {' | '.join(row)} |" for row in results.rows()]
    tags, task, prompt, asked = saved.tags, TASK_OF[results.task], "", ""
    if isinstance(tags, WholePrompt) and not saved.is_whisper:
        language = tags.language or next(iter(tags.ids[task]))
        prompt = PROMPT_OF_WHOLE.format(
            start=saved.model.config.decoder_start_token_id, ids=tags.of(language, task), language=language
        )
    elif isinstance(tags, WholePrompt):
        asked = f', language="LANGUAGE", task="{task}"' if tags.languages and not tags.language else ""
    elif tags:
        prompt = PROMPT.format(task=task, language=next(iter(tags.ids[task])), known=" ".join(tags.known()))
    config = saved.model.config
    encoder, decoder = config.encoder, config.decoder
    title = f"{encoder.model_type} + {decoder.model_type}"
    described = f"A `{encoder.model_type}` speech encoder joined to a `{decoder.model_type}` text decoder"
    adapted = isinstance(config, AdaptedSpeechEncoderDecoderConfig)
    stock = not adapted and all(map(loads_in_stock_transformers, (encoder, decoder)))
    loads, model_class, takes_audio = STOCK if stock else OWN, "SpeechEncoderDecoderModel", "processor"
    if isinstance(saved.model, WholeSpeechModel):
        takes_audio = "processor.feature_extractor"  # processors of some families take a text first, or a language
        loads, model_class, title = WHOLE, "AutoModelForSpeechSeq2Seq", saved.model.stock_config.model_type
        described = f"A whole `{title}` model"
    card = CARD.format(
        task=PIPELINE_TAGS[results.task],
        import_torch="import torch\n" if prompt else "",
        import_model=loads,
        prompt=prompt,
        takes_audio=takes_audio,
        asked=asked,
        title=title,
        described=described,
        model_class=model_class,
        data=data,
        split=results.split,
        rows="\n".join(rows),
        interval_title=results.interval_title,
        scored_as="\n".join(f"- `{line}`" for line in results.scored_as()),
        scored_data=results.data,
        training_normalizer=" ".join((results.training_normalizer or {"name": "unknown"}).values()),
        headline=results.headline,
        minutes=results.audio_seconds / 60,
        sampling_rate=saved.feature_extractor.sampling_rate,
    )
    write_eval_results(folder, results)
    write_whole(folder / "README.md", card)

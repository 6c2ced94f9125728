"""The model card of the Hugging Face folder, and its score as the Hub reads it."""

import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from sedtrain.evaluation.metrics import METRICS
from sedtrain.evaluation.results import Results
from sedtrain.models.encoder import loads_in_stock_transformers
from sedtrain.models.saved import SavedModel
from sedtrain.run_dir import write_whole
from sedtrain.text.tags import TASK_OF

CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [speech-encoder-decoder, sedtrain]
---
# {encoder} + {decoder} on {data}

A `{encoder}` speech encoder joined to a `{decoder}` text decoder, trained with sedtrain on `{data}`.

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
from sedtrain import SpeechEncoderDecoder as SpeechEncoderDecoderModel
""".strip()
PROMPT = """
tags = model.config.tags["{task}"]["{language}"]  # it writes {known}
inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *tags]])"""


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
    tags, task, prompt = saved.tags, TASK_OF[results.task], ""
    if tags:
        prompt = PROMPT.format(task=task, language=next(iter(tags.ids[task])), known=" ".join(tags.known()))
    parts = saved.model.config.encoder, saved.model.config.decoder
    stock = saved.model.adapter is None and all(map(loads_in_stock_transformers, parts))
    card = CARD.format(
        task=PIPELINE_TAGS[results.task],
        import_torch="import torch\n" if tags else "",
        import_model=STOCK if stock else OWN,
        prompt=prompt,
        encoder=saved.model.config.encoder.model_type,
        decoder=saved.model.config.decoder.model_type,
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

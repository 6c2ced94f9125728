"""The model card of the Hugging Face folder."""

import inspect
import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from sedtrain.decoding.hypotheses import end_tokens
from sedtrain.evaluation.results import Results
from sedtrain.export.card_facts import CardFacts, metadata, write_eval_results
from sedtrain.export.checks import greedy
from sedtrain.models.lora import lora_layers
from sedtrain.models.saved import SavedModel
from sedtrain.models.whole import WholeSpeechModel
from sedtrain.run_dir import write_whole
from sedtrain.text.tags import TASK_OF, Tags, WholePrompt

CARD = """---
{metadata}
---
# {title}{on_data}

{described}{trained}.{in_8_bits}
{scores}
```python
{import_torch}from transformers import AutoProcessor
{import_model}

folder = "."  # the folder of this card, or its name on the Hub
model = {model_class}.from_pretrained(folder){adapter}
processor = AutoProcessor.from_pretrained(folder)
inputs = {takes_audio}(audio, sampling_rate={sampling_rate}, return_tensors="pt"){cast}  # audio: one channel, float{prompt}
print(processor.decode(model.generate(**inputs{asked})[0], skip_special_tokens=True))
```
{onnx}{training}"""
SCORES = """
| metric ({split}) | value | {interval_title} |
|---|---|---|
{rows}

{scored_as}

Scored on {scored_data}. Text normalizer for training: `{training_normalizer}`.
Utterances: {headline}; {minutes:.1f} minutes of audio.
"""
IN_8_BITS = """ Its linear layers have weights in 8 bits, which `transformers` reads with \
`pip install 'torchao>=0.18'`. {compared}."""
STOCK = "from transformers import SpeechEncoderDecoderModel"
OWN = """
# transformers has no class for this encoder by itself, for this adapter, or for audio in front of the text
from sedtrain import SpeechEncoderDecoder as SpeechEncoderDecoderModel
""".strip()
WHOLE = "from transformers import AutoModelForSpeechSeq2Seq"
PROMPT = """
tags = model.config.tags["{task}"]["{language}"]  # it writes {known}
inputs["decoder_input_ids"] = torch.tensor([[model.config.decoder_start_token_id, *tags]])"""
PROMPT_OF_WHOLE = """
inputs["decoder_input_ids"] = torch.tensor([[{start}, *{ids}]])  # {language}"""
ONNX = """
The same by `onnxruntime`:
```python
import numpy as np
import onnxruntime
from transformers import AutoProcessor


{greedy}

folder = "."
encoder, decoder = (onnxruntime.InferenceSession(f"{{folder}}/onnx/{{name}}.onnx") for name in ("encoder", "decoder"))
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(audio, sampling_rate={sampling_rate}, return_tensors="np", return_attention_mask=True)
ids = greedy(encoder, decoder, *inputs.values(), np.array([{prompt}]), ends={ends}, most={most})
print(processor.decode(ids[0], skip_special_tokens=True))
```
{int8}"""
INT8 = """
`onnx/encoder_int8.onnx` and `onnx/decoder_int8.onnx` are the same graphs with weights in 8 bits. {compared}.
"""
TRAINING = """
## Training
{totals}
<details><summary>Settings</summary>

```yaml
{settings}```
</details>
"""


def inert(text: str) -> str:
    """The text without characters that Markdown or HTML would interpret."""
    return re.sub(r"[\\`*<>\[\]|]", " ", " ".join(text.split()))


def scores(results: Results) -> str:
    """The table of metrics, how they were computed, and on which data."""
    return SCORES.format(
        split=inert(results.split),
        rows="\n".join(f"| {' | '.join(map(inert, row))} |" for row in results.rows()),
        interval_title=results.interval_title,
        scored_as="\n".join(f"- `{line.replace('`', ' ')}`" for line in results.scored_as()),
        scored_data=inert(results.data),
        training_normalizer=inert(" ".join((results.training_normalizer or {"name": "unknown"}).values())),
        headline=inert(results.headline),
        minutes=results.audio_seconds / 60,
    )


def training(results: Results | None, facts: CardFacts) -> str:
    """The length and the options of the training; empty if both are unknown."""
    done = results.train if results else None
    totals = (
        f"{done.steps:,} steps on {done.utterances:,} utterances in {done.seconds / 60:,.1f} minutes." if done else ""
    )
    settings = yaml.safe_dump(dict(facts.settings), sort_keys=False, allow_unicode=True).replace("```", "'''")
    return TRAINING.format(totals=totals, settings=settings) if facts.settings else totals


def first_tags(tags: Tags | WholePrompt | None) -> list[int]:
    """The tokens of the first task and language that a model learnt; none if it has no tags."""
    known = tags.ids.values() if isinstance(tags, Tags) else []
    return next((list(ids) for languages in known for ids in languages.values()), [])


def onnx_snippet(saved: SavedModel, int8: str) -> str:
    """The loop that checked the graphs, and a call of it."""
    generation = saved.model.generation_config
    source = re.sub(r": (Any|int|Sequence\[int\])| -> Any", "", inspect.getsource(greedy))
    tags = first_tags(saved.tags)
    return ONNX.format(
        greedy=source.replace("(\n    encoder", "(encoder").replace("= 0\n)", "= 0)"),
        sampling_rate=saved.feature_extractor.sampling_rate,
        prompt=[saved.model.config.decoder_start_token_id, *tags],
        ends=end_tokens(generation),
        most=generation.max_new_tokens,
        int8=INT8.format(compared=int8) if int8 else "",
    )


def prompt_of(saved: SavedModel, task: str) -> tuple[str, str]:
    """Code of the snippet that asks for a language and task: by prompt tokens, and by arguments of `generate`."""
    tags = saved.tags
    if isinstance(tags, WholePrompt) and saved.is_whisper:
        return "", f', language="LANGUAGE", task="{task}"' if tags.languages and not tags.language else ""
    if isinstance(tags, WholePrompt):
        language, start = tags.language or next(iter(tags.ids[task])), saved.model.config.decoder_start_token_id
        return PROMPT_OF_WHOLE.format(start=start, ids=tags.of(language, task), language=language), ""
    if tags:
        learnt = task if task in tags.ids else next(iter(tags.ids))
        return PROMPT.format(task=learnt, language=next(iter(tags.ids[learnt])), known=" ".join(tags.known())), ""
    return "", ""


def write_model_card(
    folder: Path,
    saved: SavedModel,
    results: Results | None,
    facts: CardFacts,
    task: str,
    *,
    onnx: bool = False,
    onnx_int8: str = "",
    in_8_bits: str = "",
) -> None:
    """Writes README.md with the metrics and code that loads the model, and the score in the Hub's form.

    results: None for a model that was not scored
    task: transcription or translation
    onnx: adds code for the graphs in the folder `onnx`
    onnx_int8: a sentence that compares the texts of the graphs in 8 bits and in float32; empty without these graphs
    in_8_bits: a sentence that compares the texts of the model in 8 bits and in float32; empty for other models
    """
    prompt, asked = prompt_of(saved, TASK_OF[task])
    config, data = saved.model.config, inert(facts.data)
    encoder, decoder = config.encoder, config.decoder
    title = f"{encoder.model_type} + {decoder.model_type}"
    described = f"A `{encoder.model_type}` speech encoder joined to a `{decoder.model_type}` text decoder"
    loads, model_class, takes_audio = STOCK if saved.is_stock else OWN, "SpeechEncoderDecoderModel", "processor"
    if isinstance(saved.model, WholeSpeechModel):
        takes_audio = (
            "processor.feature_extractor"  # the processors of some families expect a text first, or a language
        )
        loads, model_class, title = WHOLE, "AutoModelForSpeechSeq2Seq", saved.model.stock_config.model_type
        described = f"A whole `{title}` model"
    card = CARD.format(
        metadata=metadata(title, task, results, facts, "sedtrain" if loads == OWN else "transformers"),
        import_torch="import torch\n" if prompt else "",
        import_model=loads,
        prompt=prompt,
        takes_audio=takes_audio,
        asked=asked,
        adapter='\nmodel.load_adapter(f"{folder}/adapter")  # peft 0.20 or newer' if lora_layers(saved.model) else "",
        cast="" if saved.model.dtype.itemsize == 4 else ".to(model.dtype)",
        title=title,
        described=described,
        in_8_bits=IN_8_BITS.format(compared=in_8_bits) if in_8_bits else "",
        model_class=model_class,
        on_data=f" on {data}" if data else "",
        trained=f", trained with sedtrain on `{data}`" if data else "",
        scores=scores(results) if results else "",
        sampling_rate=saved.feature_extractor.sampling_rate,
        onnx=onnx_snippet(saved, onnx_int8) if onnx else "",
        training=training(results, facts),
    )
    if results:
        write_eval_results(folder, results)
    write_whole(folder / "README.md", card)

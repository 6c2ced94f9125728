"""Reads requests for a text and writes answers, in the form of OpenAI's API; refuses what the server cannot do."""

from dataclasses import dataclass
from typing import Any, cast

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from sedtrain.decoding.outputs import TRANSCRIPT_WRITERS, times
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.text.tags import TASK_OF

RESPONSE_FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("segment", "word")
FIXED = {  # fields with the only value that they may have, and the reason
    "stream": ("false", "this server sends a text once it is whole"),
    "chunking_strategy": ("auto", "this server cuts recordings at pauses"),
    "include[]": ("", "this server computes no log-probabilities of tokens"),
}
FIELDS = (
    "file", "model", "response_format", "language", "prompt", "temperature", "timestamp_granularities[]", *FIXED,
)  # fmt: skip


class Refused(HTTPException):
    """A refused request: the HTTP status, the reason, and the form field at fault."""

    def __init__(
        self, status: int, reason: str, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, reason, headers)
        self.field = field


@dataclass(frozen=True)
class Asked:
    """A file to transcribe, and the form of the answer.

    granularities: parts that verbose_json lists with times: segment, word
    """

    file: UploadFile
    format: str
    language: str | None
    granularities: tuple[str, ...]

    @classmethod
    def of(cls, form: FormData, model: str) -> "Asked":
        """Reads a form. Raises Refused for a missing or unknown field, or an impossible value; model: the only model's name."""
        for field, value in form.multi_items():
            if field.removesuffix("[]") + "[]" not in FIELDS and field not in FIELDS:
                raise Refused(422, f"there is no field {field!r}; known are {', '.join(FIELDS)}", field)
            if isinstance(value, UploadFile) != (field == "file"):
                raise Refused(422, f"{field} has to be {'a file' if field == 'file' else 'a text'}", field)
            if len(form.getlist(field)) > 1 and not field.startswith("timestamp"):
                raise Refused(422, f"{field} is given several times", field)
        if "file" not in form:
            raise Refused(422, "send one audio file in the field file", "file")
        texts = {field: cast(str, value).strip() for field, value in form.items() if field != "file"}
        if (named := texts.get("model")) not in (None, "", model):
            raise Refused(404, f"this server has the model {model!r}, and not {named!r}", "model")
        refuse_other_search(texts)
        format = texts.get("response_format") or "json"
        if format not in RESPONSE_FORMATS:
            raise Refused(
                422, f"there is no format {format!r}; known are {', '.join(RESPONSE_FORMATS)}", "response_format"
            )
        granularities = granularities_of(form, format)
        return cls(cast(UploadFile, form["file"]), format, texts.get("language") or None, granularities)

    @property
    def with_words(self) -> bool:
        """True if the answer needs times of words."""
        return self.format in ("srt", "vtt") or "word" in self.granularities


def refuse_other_search(texts: dict[str, str]) -> None:
    """Raises Refused for other values than those of FIXED, a prompt, and a temperature.

    The search is the same for all requests: `decoding` of the server.
    """
    for field, (taken, reason) in FIXED.items():
        given = texts.get(field) or texts.get(field.removesuffix("[]")) or taken
        if given.lower() != taken:
            raise Refused(422, f"{field} cannot be {given!r}: {reason}", field)
    if texts.get("prompt"):
        raise Refused(422, "this server takes no prompt; it can be started with decoding.hotwords=[WORD,...]", "prompt")
    temperature = texts.get("temperature") or "0"
    try:
        is_zero = float(temperature) == 0
    except ValueError:
        is_zero = False
    if not is_zero:
        wrong = (
            f"temperature is {temperature!r}; this server takes only 0, as its search was chosen when it was started"
        )
        raise Refused(422, wrong, "temperature")


def granularities_of(form: FormData, format: str) -> tuple[str, ...]:
    """The `timestamp_granularities[]` of a form, each once; `segment` if it has none."""
    field = "timestamp_granularities[]"
    given = tuple(dict.fromkeys(cast(list[str], [*form.getlist(field), *form.getlist(field.removesuffix("[]"))])))
    for each in given:
        if each not in GRANULARITIES:
            raise Refused(422, f"there is no granularity {each!r}; known are {', '.join(GRANULARITIES)}", field)
    if given and format != "verbose_json":
        raise Refused(422, f"response_format={format} has no granularities; write response_format=verbose_json", field)
    return given or ("segment",)


MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip; charset=utf-8", "vtt": "text/vtt"}


def reply(found: Transcription, asked: Asked, target: str) -> Response:
    """The successful answer; target: transcription or translation."""
    if asked.format == "json":
        return JSONResponse({"text": found.text})
    if asked.format == "verbose_json":
        return JSONResponse(verbose(found, asked, target))
    return Response(TRANSCRIPT_WRITERS[asked.format](found, asked.language), media_type=MEDIA_TYPES[asked.format])


def verbose(found: Transcription, asked: Asked, target: str) -> dict[str, Any]:
    """The values of verbose_json, with times in seconds; without those that sedtrain does not compute (`no_speech_prob`)."""
    values: dict[str, Any] = {
        "task": TASK_OF[target],
        "language": asked.language,
        "duration": round(found.seconds, 3),
        "text": found.text,
    }
    if "segment" in asked.granularities:
        values["segments"] = [segment_of(number, each) for number, each in enumerate(found.segments)]
    if "word" in asked.granularities:
        words = [word for segment in found.segments for word in segment.words or ()]
        values["words"] = [{"word": word.text, **times(word)} for word in words]
    return values


def segment_of(number: int, segment: Segment) -> dict[str, Any]:
    return {"id": number, **times(segment), "text": segment.text, "doubt": segment.doubt}


def failure(status: int, reason: str, field: str | None = None) -> dict[str, object]:
    """The body of an error, in the form of OpenAI's API."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": reason, "type": kind, "param": field, "code": status}}

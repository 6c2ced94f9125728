"""A transcription as the body of an answer, in the formats of OpenAI's API."""

from typing import Any

from starlette.responses import JSONResponse, Response

from sedtrain.decoding.outputs import FORMATS, times
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.serving.requests import Asked

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip; charset=utf-8", "vtt": "text/vtt"}


def reply(found: Transcription, asked: Asked, target: str) -> Response:
    """The successful answer; target: transcription or translation."""
    if asked.format == "json":
        return JSONResponse({"text": found.text})
    if asked.format == "verbose_json":
        return JSONResponse(verbose(found, asked, target))
    return Response(FORMATS[asked.format](found, asked.language), media_type=MEDIA_TYPES[asked.format])


def verbose(found: Transcription, asked: Asked, target: str) -> dict[str, Any]:
    """The values of verbose_json, with times in seconds; without those that sedtrain does not compute (`no_speech_prob`)."""
    values: dict[str, Any] = {
        "task": {"transcription": "transcribe", "translation": "translate"}[target],
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

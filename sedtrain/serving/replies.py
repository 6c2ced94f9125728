"""A transcription as the body of an answer, in the formats of OpenAI's clients."""

from typing import Any

from starlette.responses import JSONResponse, Response

from sedtrain.decoding.outputs import FORMATS
from sedtrain.decoding.transcription import Segment, Transcription
from sedtrain.serving.requests import Asked

MEDIA_TYPES = {"text": "text/plain", "srt": "application/x-subrip; charset=utf-8", "vtt": "text/vtt"}


def reply(found: Transcription, asked: Asked, target: str) -> Response:
    """The answer of status 200; target: transcription or translation."""
    if asked.format == "json":
        return JSONResponse({"text": found.text})
    if asked.format == "verbose_json":
        return JSONResponse(verbose(found, asked, target))
    return Response(FORMATS[asked.format](found, asked.language), media_type=MEDIA_TYPES[asked.format])


def verbose(found: Transcription, asked: Asked, target: str) -> dict[str, Any]:
    """Times in seconds. What this model does not compute, such as `no_speech_prob`, is left out."""
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
        values["words"] = [
            {"word": each.text, "start": round(each.start, 3), "end": round(each.end, 3)} for each in words
        ]
    return values


def segment_of(number: int, segment: Segment) -> dict[str, Any]:
    times = {"start": round(segment.start, 3), "end": round(segment.end, 3)}
    return {"id": number, **times, "text": segment.text, "doubt": segment.doubt}

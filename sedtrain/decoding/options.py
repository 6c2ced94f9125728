"""The options of a search."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sedtrain.annotations import refuse_misfits
from sedtrain.decoding.windows import Pauses, activity_of
from sedtrain.errors import UserError
from sedtrain.ranges import Count, CountOrZero, Exponent, Fraction, NonNegative, Positive, PositiveFraction, UpTo1000

Search = Literal["attention", "joint", "ctc", "rescore", "speculative"]
NOT_PASSED_ON = {
    *("search", "ctc_weight", "num_return_sequences", "lm", "lm_weight", "hotwords", "hotword_bonus"),
    *("window", "pauses", "int8"),
}
"""Options that `generate` does not take, or gets in another form."""


@dataclass(frozen=True)
class DecodingOptions:
    """Settings of the search for texts; most names are those of `transformers.GenerationConfig`.

    search: attention: the decoder alone writes the text; ctc: CTC alone; joint: both, in each step of a beam;
        rescore: CTC finds the best texts and the joint score ranks them; speculative: CTC drafts the text and the decoder
        verifies it, which gives the ids of greedy search
    ctc_weight: w in the joint score (1 - w) · decoder + w · CTC
    num_return_sequences: number of texts that `decode_batch` returns per utterance
    max_new_tokens: most tokens of a text. null: four times as many tokens as training texts of that duration have, plus 16;
        200 where the model does not say how many those are. With a CTC head, never more tokens than the utterance has frames
    top_k, no_repeat_ngram_size: 0 is off; top_p: 1 is off
    lm: folder or Hub id of a causal language model; `lm_weight` times its log-probability of each word is added
    hotwords: words and terms to expect; each of their tokens gets `hotword_bonus`, in nats
    window: seconds decoded at once; longer recordings are cut at pauses. None: the longest utterance in training, or 30 s
        where that is unknown. Never more than the encoder takes
    pauses: how pauses are found: by `energy`, by `silero` (silero-vad), or `auto`: silero-vad where it is installed
    int8: evaluation and transcription multiply in 8 bits, on a CPU; validation during training does not
    """

    search: Search = "attention"
    num_beams: UpTo1000 = 1
    num_return_sequences: UpTo1000 = 1
    ctc_weight: Fraction = 0.5
    do_sample: bool = False
    max_new_tokens: Count | None = None
    length_penalty: Exponent = 1.0
    temperature: Positive = 1.0
    top_k: CountOrZero = 50
    top_p: PositiveFraction = 1.0
    no_repeat_ngram_size: CountOrZero = 0
    lm: str | None = None
    lm_weight: NonNegative = 0.3
    hotwords: Sequence[str] = ()
    hotword_bonus: NonNegative = 2.0
    window: Positive | None = None
    pauses: Pauses = "auto"
    int8: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for values out of range, options that do not go together, and a missing silero-vad."""
        refuse_misfits("decoding.", type(self), vars(self))
        for option in filter(lambda option: getattr(self, option), ("lm", "hotwords")):
            if self.search not in ("attention", "joint"):
                write, python = "write decoding=beam or decoding=joint", "write search='joint', or no search"
                wrong = f"search={self.search} does not take it"
                raise UserError(f"decoding.{option}", getattr(self, option), wrong, write, python)
        if self.do_sample and self.search != "attention":
            write, python = "write decoding=sample, or decoding.do_sample=false", "write do_sample=False, or no search"
            raise UserError("decoding.do_sample", True, f"search={self.search} does not sample", write, python)
        if self.search == "speculative" and self.num_beams > 1:
            write, python = "write decoding.num_beams=1, or decoding=joint for a beam", "write num_beams=1"
            raise UserError("decoding.num_beams", self.num_beams, "search=speculative is greedy search", write, python)
        if self.num_return_sequences > self.num_beams and not self.do_sample:
            write = f"write decoding.num_beams={self.num_return_sequences} or more"
            wrong = f"num_beams={self.num_beams} gives at most {self.num_beams} texts"
            raise UserError("decoding.num_return_sequences", self.num_return_sequences, wrong, write)
        activity_of(self.pauses)

    def generation_kwargs(self) -> dict[str, Any]:
        """Arguments for `generate` of transformers: only those that this search reads, since it warns of others."""
        sampling = {"temperature", "top_k", "top_p"} if not self.do_sample else set()
        beams = {"length_penalty"} if self.num_beams == 1 else set()
        return {name: value for name, value in asdict(self).items() if name not in sampling | beams | NOT_PASSED_ON}

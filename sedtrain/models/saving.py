"""How the joined model is saved and loaded: like the base class, with an adapter and a CTC head too."""

from pathlib import Path
from typing import Any, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import cached_file

from sedtrain.models.attention import refuse_unsupported
from sedtrain.models.checkpoint import HUB_OPTIONS, configured
from sedtrain.models.decoder import decoder_from_pretrained
from sedtrain.models.encoder import encoder_from_pretrained
from sedtrain.models.generation import GeneratesFromSpeech
from sedtrain.models.masks import Masked

CTC_FILE = "ctc_head.safetensors"


class LoadsAndSaves(GeneratesFromSpeech):
    """The base class, which also keeps `ctc_head`, in a file of its own that `transformers` does not look at."""

    ctc_head: nn.Linear | None

    def save_pretrained(
        self, save_directory: str | Path, *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """The base class's; the CTC head goes into a file that `transformers` does not look at."""
        self.settle_generation_config()
        weights = self.state_dict() if state_dict is None else state_dict
        rest = {name: weight for name, weight in weights.items() if not name.startswith("ctc_head.")}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name) if kwargs.pop("push_to_hub", False) else None
        super().save_pretrained(save_directory, state_dict=rest, **kwargs)
        if self.ctc_head is not None and kwargs.get("is_main_process", True):
            head = {name: weights[f"ctc_head.{name}"].contiguous() for name in self.ctc_head.state_dict()}
            save_file(head, Path(save_directory) / CTC_FILE)
        if repo_id is not None:
            self.push_to_hub(repo_id, token=kwargs.get("token"))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The base class's, for models with an adapter and a CTC head too."""
        places = {name: kwargs[name] for name in HUB_OPTIONS & kwargs.keys()}
        if isinstance(kwargs.get("config"), (str, Path)):
            kwargs["config"] = AutoConfig.from_pretrained(kwargs["config"])
        if kwargs.get("config") is None:
            config, rest = configured(pretrained_model_name_or_path, kwargs)
            kwargs = {**rest, "config": config}
        refuse_unsupported(kwargs["config"], kwargs.get("attn_implementation"))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.encoder, Masked):
            model.encoder.set_up()  # freezes again what no forward uses
        if model.ctc_head is not None:
            model.ctc_head.load_state_dict(load_file(cached_file(pretrained_model_name_or_path, CTC_FILE, **places)))
        return loaded

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        *model_args: Any,
        **kwargs: Any,
    ) -> Self:
        """The base class's; of a sequence-to-sequence checkpoint the encoder is taken, and `dtype` and
        `attn_implementation` without a prefix reach both parts."""
        for name in {"dtype", "attn_implementation"} & kwargs.keys():
            kwargs = {f"encoder_{name}": kwargs[name], f"decoder_{name}": kwargs[name], **kwargs}
        kwargs.pop("dtype", None)  # the joined configuration reads its parts'
        names = {"encoder": encoder_pretrained_model_name_or_path, "decoder": decoder_pretrained_model_name_or_path}
        for part, load in {"encoder": encoder_from_pretrained, "decoder": decoder_from_pretrained}.items():
            if f"{part}_model" not in kwargs and (source := names[part]) is not None:
                options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(f"{part}_")}
                kwargs[f"{part}_model"] = load(
                    source, **{key.removeprefix(f"{part}_"): options[key] for key in options}
                )
        model: Self = super().from_encoder_decoder_pretrained(*names.values(), *model_args, **kwargs)
        model.eval()
        return model

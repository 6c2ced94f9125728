"""Whisper's encoder for clips of any length.

B batch, F mel bins, T feature frames, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from sedtrain.errors import UserError


class VariableLengthWhisperEncoder(WhisperEncoder):
    """Whisper's encoder for clips of any length up to its limit: positions are cropped, padding is masked.

    Upstream computes 30 seconds for every clip. Parameters and their names are unchanged.
    """

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        """(B, F, T) log-mel features -> (B, ceil(T / 2), D). Raises UserError for more frames than it has positions."""
        hidden_states = F.gelu(self.conv2(F.gelu(self.conv1(input_features)))).transpose(1, 2)
        num_frames = hidden_states.shape[1]
        if num_frames > self.max_source_positions:
            wrong = f"an utterance of {num_frames} frames does not fit its {self.max_source_positions} positions"
            raise UserError("encoder", "whisper", wrong, "write data.max_seconds=30, the limit of Whisper's encoder")
        hidden_states = hidden_states + self.embed_positions.weight[:num_frames]
        hidden_states = F.dropout(hidden_states, p=self.config.dropout, training=self.training)
        mask = None
        if attention_mask is not None:
            frame_mask = self._get_feature_vector_attention_mask(num_frames, attention_mask)
            mask = create_bidirectional_mask(self.config, hidden_states, frame_mask)
        layerdrop = self.config.encoder_layerdrop if self.training else 0.0
        for layer in self.layers:
            if layerdrop == 0.0 or torch.rand([]) >= layerdrop:
                hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden_states))

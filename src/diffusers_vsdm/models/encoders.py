"""Encoders of a sequence whose state can be carried on, one time after the other.

An encoder is a module with `forward(inputs, state=None)`: inputs `(batch, length, features)` that follow those that
made the state; it returns hidden vectors `(batch, length, width)`, each of which knows the inputs up to its own, and
the new state. `repeat(state, times)` repeats each sequence of a state in place of itself.
"""

from typing import Any

from torch import Tensor, nn


class LSTMEncoder(nn.Module):
    """A long short-term memory; arguments as in [`ENCODERS`]."""

    def __init__(self, num_features: int, width: int, num_layers: int, dropout: float, max_length: int):
        super().__init__()
        self.lstm = nn.LSTM(num_features, width, num_layers, batch_first=True, dropout=dropout * (num_layers > 1))

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See the module."""
        return self.lstm(inputs, state)

    @staticmethod
    def repeat(state: Any, times: int) -> Any:
        """See the module."""
        return tuple(part.repeat_interleave(times, dim=1) for part in state)


class TransformerEncoder(nn.Module):
    """A causal transformer, GPT-2's blocks from `transformers`, whose state are keys and values."""

    def __init__(self, num_features: int, width: int, num_layers: int, dropout: float, max_length: int):
        from transformers import GPT2Config, GPT2Model

        super().__init__()
        self.embed = nn.Linear(num_features, width)
        rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
        self.blocks = GPT2Model(
            GPT2Config(
                vocab_size=1,
                n_positions=max_length,
                n_embd=width,
                n_layer=num_layers,
                n_head=max(heads for heads in range(1, max(1, width // 16) + 1) if width % heads == 0),
                bos_token_id=None,
                eos_token_id=None,
                **rates,
            )
        )
        self.blocks.wte.requires_grad_(False)  # of words, of which there are none

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """See the module."""
        from transformers import DynamicCache

        if state is None and not self.training:
            state = DynamicCache()
        # by position, since its name is not the same in all versions; the blocks extend it in place
        output = self.blocks(None, state, inputs_embeds=self.embed(inputs), use_cache=not self.training)
        return output.last_hidden_state, state

    @staticmethod
    def repeat(state: Any, times: int) -> Any:
        """See the module."""
        state.batch_repeat_interleave(times)
        return state


# constructors of (features, width, layers, dropout, longest sequence)
ENCODERS = {"lstm": LSTMEncoder, "transformer": TransformerEncoder}

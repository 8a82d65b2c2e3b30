"""PyTorch: `dla`, one call over all tokens; `step`, one token; `Entries`, a cache for decoding that is stepped in place;
`DynamicLinearAttention`, the layer."""

from ._entries import Entries
from ._functional import Log, State, dla, empty_state, step
from ._layer import DynamicLinearAttention, LayerCache

__all__ = ["DynamicLinearAttention", "Entries", "LayerCache", "Log", "State", "dla", "empty_state", "step"]

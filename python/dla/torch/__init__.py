"""PyTorch: `dla`, one call over all tokens; `step`, one token; `DynamicLinearAttention`, the layer."""

from ._functional import Log, State, dla, empty_state, step
from ._layer import DynamicLinearAttention, LayerCache

__all__ = ["DynamicLinearAttention", "LayerCache", "Log", "State", "dla", "empty_state", "step"]

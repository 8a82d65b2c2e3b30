"""Dynamic Linear Attention (arXiv 2606.10650): linear attention whose memory is up to M states.

Here are the functions for numpy arrays, on the CPU; `dla.torch` and `dla.jax` have those of the frameworks. Layouts are those of
flash-linear-attention: q, k [B,T,H,dk], v and o [B,T,HV,dv], g and beta [B,T,HV], lam [B,T,HV,M].
"""

from ._native import __version__, check_cuda
from ._numpy import Forward, Gradients, State, backward, dla, empty_state, forward, step

__all__ = [
    "Forward", "Gradients", "State", "__version__", "backward", "check_cuda", "dla", "empty_state", "forward", "step",
]

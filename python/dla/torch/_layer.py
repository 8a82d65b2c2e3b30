"""The layer, with the constructor names of flash-linear-attention's GatedDeltaNet."""

import math
from typing import Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import nn

from ._functional import State, dla, step


class LayerCache(NamedTuple):
    """What a layer keeps of the tokens that it has seen."""

    state: State
    """States of the operator."""
    conv: Optional[torch.Tensor]
    """The last conv_size - 1 inputs of the short convolutions, q, k and v side by side: [B,conv_size-1,channels]."""


def _short_convolution(x, weight, bias, history, cu_seqlens):
    """Causal depthwise convolution over time, then SiLU. x [B,T,D], weight [D,K], history [B,K-1,D] or None."""
    taps = weight.shape[1]
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if history is None else history.to(x.dtype)
        x = torch.cat([before, x], 1)
        y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1).to(x.dtype), None, groups=weight.shape[0]).transpose(1, 2)
    else:
        # A tap that reaches past the beginning of its sequence reads nothing.
        time = x.shape[1]
        at = torch.arange(time, device=x.device)
        begin = cu_seqlens[torch.bucketize(at, cu_seqlens, right=True) - 1]
        y = torch.zeros_like(x)
        for back in range(min(taps, time)):
            shifted = F.pad(x[:, : time - back], (0, 0, back, 0))
            inside = (at - back >= begin).to(x.dtype)[None, :, None]
            y = y + shifted * inside * weight[:, taps - 1 - back].to(x.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return F.silu(y)


class DynamicLinearAttention(nn.Module):
    """Projections, short convolutions, gates, Dynamic Linear Attention, and the output's norm, gate and projection.

    Args:
        hidden_size: width of the tokens.
        expand_v: head size of the values over that of the keys.
        head_dim, num_heads, num_v_heads: size and number of the query and key heads; number of value heads (num_heads).
        mode: "chunk": all tokens in one call. A call of one token on a cache takes a step where there is no gradient.
        use_gate: multiply the normed output by the SiLU of a projection.
        use_short_conv, conv_size, conv_bias: the short convolutions of q, k and v.
        allow_neg_eigval: write strengths up to 2 (delta style).
        layer_idx: key of this layer in the cache that `forward` takes and returns.
        norm_eps: of the output's RMS norm.
        style: "delta", Gated DeltaNet's gates (beta; q and k of unit norm); "gated" (no beta; values times 2 sigmoid of a
            projection; q and k of unit norm); or "mamba2" (no beta; values times dt).
        read: "given": read weights are the softplus of a projection of the token; "routed": by content, with learned
            slope and bias per value head; "routed_logits": with a projection of the token beside.
        capacity, tau, merge, slot_order, soft: options of `dla.torch.dla`.
        learn_tau: tau is a parameter per value head; it has a gradient with `soft` alone.
        read_best: weigh only so many of the states present, those of the largest read weights, by 0 the others. Routed,
            this computes the forward twice: the weights first.
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 1.0,
        head_dim: int = 128,
        num_heads: int = 16,
        num_v_heads: Optional[int] = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: Optional[int] = None,
        norm_eps: float = 1e-5,
        *,
        style: str = "delta",
        read: str = "routed",
        capacity: int = 30,
        tau: float = 0.6,
        merge: str = "mass",
        slot_order: str = "oldest_first",
        soft: Optional[Tuple[float, bool]] = None,
        learn_tau: bool = False,
        read_best: Optional[int] = None,
    ):
        super().__init__()
        value_heads = num_heads if num_v_heads is None else num_v_heads
        if mode != "chunk":
            raise ValueError(f"mode: expected 'chunk', got {mode!r}")
        if style not in ("delta", "gated", "mamba2"):
            raise ValueError(f"style: expected 'delta', 'gated' or 'mamba2', got {style!r}")
        if read not in ("given", "routed", "routed_logits"):
            raise ValueError(f"read: expected 'given', 'routed' or 'routed_logits', got {read!r}")
        if read_best is not None and not 1 <= read_best <= capacity:
            raise ValueError(f"read_best: expected 1 to capacity = {capacity}, got {read_best}")
        if learn_tau and soft is None:
            raise ValueError("learn_tau: expected with soft, which gives tau its gradient")
        if value_heads % num_heads != 0:
            raise ValueError(f"num_v_heads: expected a multiple of num_heads = {num_heads}, got {value_heads}")
        self.head_v_dim = int(head_dim * expand_v)
        if not math.isclose(self.head_v_dim, head_dim * expand_v, rel_tol=1e-6):
            raise ValueError(f"expand_v: expected head_dim x expand_v to be whole, got {head_dim * expand_v}")
        self.hidden_size, self.head_dim, self.num_heads, self.num_v_heads = hidden_size, head_dim, num_heads, value_heads
        self.style, self.read, self.layer_idx, self.norm_eps = style, read, layer_idx, norm_eps
        self.allow_neg_eigval, self.use_gate, self.use_short_conv = allow_neg_eigval, use_gate, use_short_conv
        self.conv_size = conv_size
        self.soft, self.read_best = soft, read_best
        self.options = dict(capacity=capacity, merge=merge, slot_order=slot_order)
        self.tau = nn.Parameter(torch.full((value_heads,), float(tau))) if learn_tau else tau
        key_dim, value_dim = num_heads * head_dim, value_heads * self.head_v_dim
        self.widths = (key_dim, key_dim, value_dim)

        self.q_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, key_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, value_dim, bias=False)
        # Decay: exp(-A dt), dt = softplus(a_proj(x) + dt_bias), dt from 0.001 to 0.1 as Mamba-2 begins, but A = 1 where it begins with 1 to
        # 16: what has decayed no slot recalls (README, "Does it learn?").
        self.a_proj = nn.Linear(hidden_size, value_heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        dt = torch.exp(torch.rand(value_heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True
        if style != "mamba2":
            self.b_proj = nn.Linear(hidden_size, value_heads, bias=False)
        if use_short_conv:
            channels = sum(self.widths)
            bound = conv_size**-0.5
            self.conv_weight = nn.Parameter(torch.empty(channels, conv_size).uniform_(-bound, bound))
            self.conv_bias = nn.Parameter(torch.zeros(channels)) if conv_bias else None
        if read == "given":
            # softplus(0.5413) = 1: every state is read alike at the start.
            self.l_proj = nn.Linear(hidden_size, value_heads * capacity)
            nn.init.constant_(self.l_proj.bias, math.log(math.e - 1))
        else:
            # The start that OPERATOR.md, section 6, gives.
            self.route_slope = nn.Parameter(torch.full((value_heads,), 8.0))
            self.route_bias = nn.Parameter(torch.zeros(value_heads))
            if read == "routed_logits":
                self.l_proj = nn.Linear(hidden_size, value_heads * capacity)
        if use_gate:
            self.g_proj = nn.Linear(hidden_size, value_dim, bias=False)
        self.o_norm = nn.Parameter(torch.ones(self.head_v_dim))
        self.o_proj = nn.Linear(value_dim, hidden_size, bias=False)

    def mix(self, q, k, v, g, beta, lam, route, *, return_log=False, **keywords):
        """The operator on what `forward` made of the tokens: arguments and results of `dla.torch.dla`.

        A subclass that keeps the projections, gates and norms and mixes tokens otherwise overrides this.
        """
        keywords.update(self.options, tau=self.tau, soft=self.soft)
        best = self.read_best
        if best is None:
            return dla(q, k, v, g, beta, lam, route=route, return_log=return_log, **keywords)
        with torch.no_grad():
            log = dla(q, k, v, g, beta, lam, route=route, return_log=True, **keywords)[2]
            weights = lam if route is None else log.lam
            if route is None:
                # A weight of a state that is not there must not take the place of another.
                if keywords.get("initial_state") is not None or keywords.get("cu_seqlens") is not None:
                    raise ValueError("read_best: given reads are not limited with a cache or packed sequences")
                present = (log.events == 1).cumsum(1).unsqueeze(3)
                slots = torch.arange(weights.shape[3], device=weights.device)
                weights = weights.masked_fill(slots >= present, -1.0)
            kept = torch.zeros_like(weights).scatter(3, weights.topk(best, 3).indices, 1.0)
        if route is None:
            lam = lam * kept
        else:
            # A logit so low that the sigmoid and its derivative are 0.
            slope, bias, logits = route
            low = (kept - 1) * 1e6
            route = (slope, bias, low if logits is None else logits + low)
        if keywords.get("events") is None and self.soft is None:
            keywords["events"] = log.events  # the plan need not be made twice
        return dla(q, k, v, g, beta, lam, route=route, return_log=return_log, **keywords)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        past_key_values: Optional[Dict[Optional[int], LayerCache]] = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        cu_seqlens: Optional[torch.Tensor] = None,
        events: Optional[torch.Tensor] = None,
        **_,
    ):
        """hidden_states [B,T,hidden_size]. attention_mask: [B,T], 0 where a token is padding. past_key_values: a dictionary from
        layer_idx to `LayerCache`; with use_cache this layer's entry is set anew in it. events: the caller's own event log,
        [B,T,HV] uint8, without padding.

        Returns the output [B,T,hidden_size], None, and past_key_values.
        """
        x = hidden_states
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states: expected [B,T,{self.hidden_size}], got {tuple(x.shape)}")
        past = None if past_key_values is None else past_key_values.get(self.layer_idx)
        padded = None
        if attention_mask is not None and not bool(attention_mask.all()):
            if attention_mask.shape != x.shape[:2]:
                raise ValueError(f"attention_mask: expected [B,T] = {tuple(x.shape[:2])}, got {tuple(attention_mask.shape)}")
            if past is not None or use_cache or cu_seqlens is not None or events is not None:
                raise ValueError("attention_mask: not expected with a cache, cu_seqlens or events")
            # Packed without the padding.
            padded = (x.shape, attention_mask.bool().flatten().nonzero().squeeze(1))
            cu_seqlens = F.pad(attention_mask.bool().sum(1).cumsum(0), (1, 0)).to(torch.int64)
            x = x.flatten(0, 1)[padded[1]].unsqueeze(0)
        batch, time, _ = x.shape
        heads, value_heads, capacity = self.num_heads, self.num_v_heads, self.options["capacity"]

        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        history = None
        if self.use_short_conv:
            qkv = torch.cat([q, k, v], 2)
            before = None if past is None else past.conv
            if use_cache:
                if cu_seqlens is not None:
                    raise ValueError("cu_seqlens: not expected with use_cache")
                kept = qkv if before is None else torch.cat([before.to(qkv.dtype), qkv], 1)
                missing = self.conv_size - 1 - kept.shape[1]
                history = F.pad(kept, (0, 0, missing, 0)) if missing > 0 else kept[:, kept.shape[1] - self.conv_size + 1 :]
                history = history.detach()
            qkv = _short_convolution(qkv, self.conv_weight, self.conv_bias, before, cu_seqlens)
            q, k, v = qkv.split(self.widths, 2)
        q = q.unflatten(2, (heads, self.head_dim))
        k = k.unflatten(2, (heads, self.head_dim))
        v = v.unflatten(2, (value_heads, self.head_v_dim))

        dt = F.softplus(self.a_proj(x).float() + self.dt_bias)
        g = -self.A_log.float().exp() * dt
        beta = None
        if self.style == "delta":
            beta = self.b_proj(x).float().sigmoid()
            beta = 2 * beta if self.allow_neg_eigval else beta
        elif self.style == "gated":
            v = v * (2 * self.b_proj(x).float().sigmoid()).unsqueeze(3).to(v.dtype)
        else:
            v = v * dt.unsqueeze(3).to(v.dtype)
        lam = route = None
        if self.read == "given":
            lam = F.softplus(self.l_proj(x).float()).unflatten(2, (value_heads, capacity))
        else:
            logits = None
            if self.read == "routed_logits":
                logits = self.l_proj(x).float().unflatten(2, (value_heads, capacity))
            route = (self.route_slope.float(), self.route_bias.float(), logits)

        unit = self.style != "mamba2" or self.read != "given"
        state = None if past is None else past.state
        decoding = time == 1 and state is not None and cu_seqlens is None
        plain = self.read_best is None and events is None
        if decoding and plain and use_cache and not torch.is_grad_enabled():
            state = State(*(None if a is None else a.clone() for a in state))
            o, state = step(
                q, k, v, g, beta, lam, route=route, state=state, use_qk_l2norm_in_kernel=unit, tau=self.tau, **self.options
            )
        else:
            o, state = self.mix(
                q, k, v, g, beta, lam, route, initial_state=state, output_final_state=use_cache, cu_seqlens=cu_seqlens,
                use_qk_l2norm_in_kernel=unit, events=events,
            )

        o = F.rms_norm(o.float(), (self.head_v_dim,), self.o_norm.float(), self.norm_eps).flatten(2)
        if self.use_gate:
            o = o * F.silu(self.g_proj(x).float())
        o = self.o_proj(o.to(self.o_proj.weight.dtype if not torch.is_autocast_enabled(o.device.type) else o.dtype))
        if padded is not None:
            shape, places = padded
            o = o.new_zeros(shape[0] * shape[1], o.shape[2]).index_copy(0, places, o[0]).unflatten(0, shape[:2])
        if use_cache:
            past_key_values = {} if past_key_values is None else past_key_values
            past_key_values[self.layer_idx] = LayerCache(state, history)
        return o, None, past_key_values

"""`dla` and `step`: arguments checked by name, autocast, then the operator."""

from typing import NamedTuple, Optional, Tuple, Union

import torch

from .. import _call
from . import _op


class State(NamedTuple):
    """States of N sequences: slot 0 is the oldest, unused slots are zero. Counts are uint32 held in int32."""

    states: torch.Tensor
    """Slot states, [N,HV,M,dk,dv] float32."""
    len: torch.Tensor
    """Slots held, [N,HV] int32."""
    tokens: torch.Tensor
    """Tokens of every slot, [N,HV,M] int32."""
    drift: torch.Tensor
    """Summed drift of every slot in units of 2^-12, [N,HV,M] int32."""
    open: torch.Tensor
    """The open segment's plain decayed sum, [N,HV,dk,dv] float32."""
    keys: Optional[torch.Tensor] = None
    """Key sums of every slot, [N,HV,M,dk] float32; with routed reads."""


class Log(NamedTuple):
    """What the pipeline decided."""

    events: torch.Tensor
    """Event log, [B,T,HV] uint8."""
    drift: torch.Tensor
    """Drift of every token, [B,T,HV] float32."""
    lam: Optional[torch.Tensor]
    """Routed read weights, [B,T,HV,M] float32."""


def empty_state(
    sequences: int, value_heads: int, capacity: int, dk: int, dv: int, *, routed: bool = False, device=None
) -> State:
    """The state of sequences that have not begun."""
    rows = (sequences, value_heads)

    def zeros(shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=device)

    return State(
        zeros((*rows, capacity, dk, dv)),
        zeros(rows, torch.int32),
        zeros((*rows, capacity), torch.int32),
        zeros((*rows, capacity), torch.int32),
        zeros((*rows, dk, dv)),
        zeros((*rows, capacity, dk)) if routed else None,
    )


_STATE_DTYPES = (torch.float32, torch.int32, torch.int32, torch.int32, torch.float32, torch.float32)


_f32 = torch.float32


def _convert(q, k, v, g, beta, lam, route, tau, events, cu_seqlens, state, called="initial_state"):
    """The eighteen tensors in the dtypes that the operator takes, and the tau of every head. What is no tensor stays."""
    if not isinstance(q, torch.Tensor):
        raise TypeError(f"q: expected a tensor, got {type(q).__name__}")
    # The first question is the quicker one; a compiler knows the second.
    if (torch.compiler.is_compiling() or _any_autocast()) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(dtype) if isinstance(x, torch.Tensor) else x for x in (q, k, v))
    slope = bias = logits = per_head = None
    if route is not None:
        slope, bias, logits = _call.route(route)
        slope, bias, logits = _float(slope), _float(bias), _float(logits)
    if isinstance(tau, torch.Tensor):
        number = 0.0
        per_head = _float(tau.expand(v.shape[2]) if tau.ndim == 0 and isinstance(v, torch.Tensor) and v.ndim == 4 else tau)
    else:
        number = tau if type(tau) is float else _call.number("tau", tau)
    if cu_seqlens is not None and getattr(cu_seqlens, "dtype", None) is torch.int32:
        cu_seqlens = cu_seqlens.to(torch.int64)
    state = _NO_STATE if state is None else _call.state(called, state)
    return (
        q, k, v, _float(g), _float(beta), _float(lam), slope, bias, logits, per_head, events, cu_seqlens, *state
    ), number


_NO_STATE = (None,) * 6
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _float(x):
    return x if x is None or getattr(x, "dtype", _f32) is _f32 else x.to(_f32)


def _check(tensors, number, **options):
    """Checks the tensors by name; codes and numbers of the options."""
    q, arguments, state = tensors[0], tensors[:12], tensors[12:]
    names = (*_call.ARGUMENTS, *(f"state.{name}" for name in _call.STATE))
    dtypes = (q.dtype,) * 3 + (torch.float32,) * 7 + (torch.uint8, torch.int64) + _STATE_DTYPES
    if q.dtype not in _op._DTYPES:
        raise TypeError(f"q: expected dtype float32, bfloat16 or float16, got {q.dtype}")
    for name, x, dtype in zip(names, tensors, dtypes):
        if x is None and name in ("k", "v") or x is not None and not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x is not None and x.dtype != dtype:
            raise TypeError(f"{name}: expected dtype {dtype}{', as q' if name in ('k', 'v') else ''}, got {x.dtype}")
        if x is not None and x.device != q.device:
            raise ValueError(f"{name}: expected a tensor of {q.device}, as q, got one of {x.device}")
    slope, bias = tensors[6:8]
    if (slope is None) != (bias is None):
        raise ValueError(f"{_call.ARGUMENTS[6 if slope is None else 7]}: missing; reads are routed")
    settings = _call.options(
        q.shape[-1] if q.ndim else 1, delta=tensors[4] is not None, routed=slope is not None, tau=number, **options
    )
    _call.extents(
        [None if x is None else x.shape for x in arguments],
        None if state[0] is None else [None if x is None else x.shape for x in state],
        settings,
    )
    return list(settings.codes), list(settings.numbers)


def dla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Optional[torch.Tensor] = None,
    beta: Optional[torch.Tensor] = None,
    lam: Optional[torch.Tensor] = None,
    *,
    route: Optional[Tuple[torch.Tensor, ...]] = None,
    scale: Optional[float] = None,
    capacity: int = 30,
    tau: Union[float, torch.Tensor] = 0.6,
    merge: str = "density",
    initial_state: Optional[State] = None,
    output_final_state: bool = False,
    cu_seqlens: Optional[torch.Tensor] = None,
    use_qk_l2norm_in_kernel: bool = False,
    slot_order: str = "oldest_first",
    events: Optional[torch.Tensor] = None,
    soft: Optional[Tuple[float, bool]] = None,
    return_log: bool = False,
):
    """Dynamic Linear Attention.

    Args:
        q, k: [B,T,H,dk], float32, bfloat16 or float16; under autocast cast to its dtype.
        v: [B,T,HV,dv], dtype of q; HV a multiple of H.
        g: log decay, [B,T,HV], at most 0; absent is 0. This and what follows is computed with in float32.
        beta: write strength, [B,T,HV]; given, the recurrence is the gated delta rule, else the gated one.
        lam: read weights, [B,T,HV,M]; or
        route: (slope [HV], bias [HV], logits [B,T,HV,M] or absent): reads are routed by content.
        scale: factor of q; dk^-1/2.
        capacity: most states, M, 1 to 64.
        tau: drift (0 to 2) from which a token opens a state: a number, or a tensor [] or [HV].
        merge: the pair that merges when all states are held: "density" or "mass".
        initial_state: states to resume from, one per sequence.
        cu_seqlens: offsets of packed sequences, [N+1]; B = 1.
        use_qk_l2norm_in_kernel: q and k to unit norm first.
        slot_order: which state column 0 of lam and of the logits weighs: "oldest_first" or "newest_first".
        events: the caller's own event log, [B,T,HV] uint8.
        soft: (temperature, whether the drift's gradient goes on into k and v): gradients for tau, the forward staying hard.
        return_log: return a `Log` as well.

    Returns o [B,T,HV,dv], dtype of q, and the final `State`, or None where it is not wanted.
    """
    soft = tuple(soft) if isinstance(soft, list) else soft
    tensors, number = _convert(q, k, v, g, beta, lam, route, tau, events, cu_seqlens, initial_state)

    def options():
        return dict(
            merge=merge, slot_order=slot_order, capacity=capacity, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale, soft=soft
        )

    described = _op.plainly_described(tensors)
    if described is not None:
        enabled = torch.is_grad_enabled()
        key = (
            "eager forward", number, merge, slot_order, capacity, use_qk_l2norm_in_kernel, scale, soft, output_final_state,
            return_log, enabled, *described,
        )
        plan = _op.planned(key)
        if plan is None:
            checked = _check(tensors, number, **options())
            differentiated = enabled and any(x is not None and x.requires_grad for x in tensors)
            plan = _op.remember(key, _op.Plan(tensors, *checked, output_final_state, return_log, differentiated, True))
        if plan.differentiated:
            outputs = _op.direct(plan, *[x for x in tensors if x is not None])
        else:
            outputs = plan.run(tensors)
        if not output_final_state and not return_log:
            return outputs[0], None
        o, drift, log, weights, *last = plan.ten(outputs)
    else:
        codes, numbers = _check(tensors, number, **options())
        o, drift, log, weights, *last = torch.ops.dla.forward(*tensors, codes, numbers, output_final_state)
    routed = route is not None
    state = State(*last[:5], last[5] if routed else None) if output_final_state else None
    return (o, state, Log(log, drift, weights if routed else None)) if return_log else (o, state)


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: Optional[torch.Tensor] = None,
    beta: Optional[torch.Tensor] = None,
    lam: Optional[torch.Tensor] = None,
    *,
    state: State,
    route: Optional[Tuple[torch.Tensor, ...]] = None,
    scale: Optional[float] = None,
    capacity: int = 30,
    tau: Union[float, torch.Tensor] = 0.6,
    merge: str = "density",
    use_qk_l2norm_in_kernel: bool = False,
    slot_order: str = "oldest_first",
    events: Optional[torch.Tensor] = None,
):
    """One token per sequence, T = 1: arguments as `dla`'s. `state` is changed in place; there is no gradient.

    Returns o [B,1,HV,dv] and the state.
    """
    if isinstance(q, torch.Tensor) and q.ndim == 4 and q.shape[1] != 1:
        raise ValueError(f"q: expected shape [B,T,H,dk] with T = 1 for a step, got {tuple(q.shape)}")
    if state is None:
        raise TypeError("state: expected a State, got None")
    tensors, number = _convert(q, k, v, g, beta, lam, route, tau, events, None, state, "state")

    def options():
        return dict(
            merge=merge, slot_order=slot_order, capacity=capacity, qk_l2norm=use_qk_l2norm_in_kernel, scale=scale, soft=None
        )

    described = _op.plainly_described(tensors)
    if described is not None:
        key = ("eager step", number, merge, slot_order, capacity, use_qk_l2norm_in_kernel, scale, *described)
        plan = _op.planned(key)
        if plan is None:
            plan = _op.remember(key, _op.StepPlan(tensors, *_check(tensors, number, **options()), False, True))
        (o,) = plan.run(tensors)
    else:
        codes, numbers = _check(tensors, number, **options())
        with torch.no_grad():
            o, _, _ = torch.ops.dla.step(*tensors[:11], *tensors[12:], codes, numbers)
    return o, state

"""numpy: arrays of float32, float16 or ml_dtypes.bfloat16, on the CPU."""

from typing import NamedTuple, Optional, Tuple

import numpy as np

from . import _call

PLACE = (0, 0, 0, _call.ABSENT)


class State(NamedTuple):
    """States of N sequences: slot 0 is the oldest, unused slots are zero."""

    states: np.ndarray
    """Slot states, [N,HV,M,dk,dv] float32."""
    len: np.ndarray
    """Slots held, [N,HV] uint32."""
    tokens: np.ndarray
    """Tokens of every slot, [N,HV,M] uint32."""
    drift: np.ndarray
    """Summed drift of every slot in units of 2^-12, [N,HV,M] uint32."""
    open: np.ndarray
    """The open segment's plain decayed sum, [N,HV,dk,dv] float32."""
    keys: Optional[np.ndarray] = None
    """Key sums of every slot, [N,HV,M,dk] float32; with routed reads."""


class Forward(NamedTuple):
    """Results of a forward."""

    o: np.ndarray
    """Output, [B,T,HV,dv], dtype of q."""
    drift: np.ndarray
    """Drift of every token, [B,T,HV] float32."""
    events: np.ndarray
    """Event log, [B,T,HV] uint8: what the backward needs beside the arguments."""
    lam: Optional[np.ndarray]
    """Routed read weights, [B,T,HV,M] float32."""
    state: State
    """States after the last token of every sequence."""


class Gradients(NamedTuple):
    """Gradients of the arguments; None where there was none."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: Optional[np.ndarray]
    beta: Optional[np.ndarray]
    lam: Optional[np.ndarray]
    slope: Optional[np.ndarray]
    bias: Optional[np.ndarray]
    logits: Optional[np.ndarray]
    tau: Optional[np.ndarray]
    states: Optional[np.ndarray]
    """Of the initial state's states."""
    open: Optional[np.ndarray]
    """Of the initial state's open segments."""
    keys: Optional[np.ndarray]
    """Of the initial state's key sums."""


def _pair(x: Optional[np.ndarray]) -> Tuple[int, int]:
    if x is None:
        return _call.ABSENT
    # An array without elements is there all the same.
    return (x.__array_interface__["data"][0] if x.size else 64, x.nbytes)


def _array(name: str, x, dtype=None) -> Optional[np.ndarray]:
    if x is None:
        return None
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a numpy array, got {type(x).__name__}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {np.dtype(dtype).name}, got {x.dtype.name}")
    return np.ascontiguousarray(x)


class _Prepared(NamedTuple):
    options: _call.Options
    extents: _call.Extents
    dtype: np.dtype
    arguments: tuple
    state: Optional[tuple]

    def call(self):
        head = (self.options, PLACE, (_call.DTYPES[self.dtype.name], list(self.extents)))
        return (*head, [_pair(x) for x in self.arguments])

    def first(self):
        return None if self.state is None else [_pair(x) for x in self.state]


def _prepare(q, k, v, g, beta, lam, route, scale, capacity, tau, merge, state, cu_seqlens, l2norm, order, events, soft):
    q, k, v = _array("q", q), _array("k", k), _array("v", v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            raise TypeError(f"{name}: missing")
    if q.dtype.name not in _call.DTYPES:
        raise TypeError(f"q: expected dtype {', '.join(_call.DTYPES)}, got {q.dtype.name}")
    k, v = _array("k", k, q.dtype), _array("v", v, q.dtype)
    names = _call.ARGUMENTS[6:9]
    slope, bias, logits = (_array(name, x, np.float32) for name, x in zip(names, _call.route(route)))
    if (slope is None) != (bias is None):
        raise ValueError(f"{names[0] if slope is None else names[1]}: missing; reads are routed")
    per_head = None
    if isinstance(tau, np.ndarray) and tau.ndim > 0:
        per_head, tau = _array("tau", tau, np.float32), 0.0
    arguments = (
        q, k, v, _array("g", g, np.float32), _array("beta", beta, np.float32), _array("lam", lam, np.float32), slope, bias,
        logits, per_head, _array("events", events, np.uint8), _array("cu_seqlens", cu_seqlens, np.int64),
    )
    settings = _call.options(
        q.shape[-1] if q.ndim else 1, delta=beta is not None, routed=slope is not None, merge=merge, slot_order=order,
        capacity=capacity, qk_l2norm=l2norm, tau=tau, scale=scale, soft=soft,
    )
    if state is not None:
        dtypes = (np.float32, np.uint32, np.uint32, np.uint32, np.float32, np.float32)
        given = zip(_call.STATE, _call.state("initial_state", state), dtypes)
        state = tuple(_array(f"state.{name}", x, dtype) for name, x, dtype in given)
    shape = [None if x is None else x.shape for x in arguments]
    extents = _call.extents(shape, None if state is None else [None if x is None else x.shape for x in state], settings)
    return _Prepared(settings, extents, q.dtype, arguments, state)


def empty_state(sequences, value_heads, capacity, dk, dv, *, routed=False) -> State:
    """The state of sequences that have not begun."""
    rows = (sequences, value_heads)
    return State(
        np.zeros((*rows, capacity, dk, dv), np.float32),
        np.zeros(rows, np.uint32),
        np.zeros((*rows, capacity), np.uint32),
        np.zeros((*rows, capacity), np.uint32),
        np.zeros((*rows, dk, dv), np.float32),
        np.zeros((*rows, capacity, dk), np.float32) if routed else None,
    )


def forward(
    q, k, v, g=None, beta=None, lam=None, *, route=None, scale=None, capacity=30, tau=0.6, merge="density",
    initial_state=None, cu_seqlens=None, use_qk_l2norm_in_kernel=False, slot_order="oldest_first", events=None, soft=None,
) -> Forward:
    """All tokens of all sequences, with the event log; arguments as `dla`'s."""
    p = _prepare(
        q, k, v, g, beta, lam, route, scale, capacity, tau, merge, initial_state, cu_seqlens, use_qk_l2norm_in_kernel,
        slot_order, events, soft,
    )
    e, routed = p.extents, p.options.routed
    o = np.empty((*e.per_token(), e.dv), p.dtype)
    drift, log = np.empty(e.per_token(), np.float32), np.empty(e.per_token(), np.uint8)
    weights = np.empty((*e.per_token(), capacity), np.float32) if routed else None
    last = empty_state(e.sequences, e.value_heads, capacity, e.dk, e.dv, routed=routed)
    _call.forward(*p.call(), p.first(), [_pair(x) for x in (o, drift, log, weights)], [_pair(x) for x in last])
    return Forward(o, drift, log, weights, last)


def dla(
    q, k, v, g=None, beta=None, lam=None, *, route=None, scale=None, capacity=30, tau=0.6, merge="density",
    initial_state=None, output_final_state=False, cu_seqlens=None, use_qk_l2norm_in_kernel=False,
    slot_order="oldest_first", events=None, soft=None,
):
    """Dynamic Linear Attention of numpy arrays.

    q, k: [B,T,H,dk]; v: [B,T,HV,dv], dtype of q; HV a multiple of H. g: log decay, [B,T,HV] float32, at most 0. beta: write
    strength, [B,T,HV] float32; given, the recurrence is the gated delta rule, else the gated one. lam: read weights, [B,T,HV,M]
    float32; or route = (slope [HV], bias [HV], logits [B,T,HV,M] or absent), float32. capacity: most states, M, 1 to 64. tau:
    drift from which a token opens a state, a number or [HV]. merge: "density" or "mass". slot_order: which state column 0
    of lam weighs, "oldest_first" or "newest_first". events: the caller's own log, [B,T,HV] uint8. soft: None, or (temperature,
    whether the drift's gradient goes on into k and v).

    Returns o [B,T,HV,dv] and the final state, or None.
    """
    result = forward(
        q, k, v, g, beta, lam, route=route, scale=scale, capacity=capacity, tau=tau, merge=merge,
        initial_state=initial_state, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        slot_order=slot_order, events=events, soft=soft,
    )
    return result.o, (result.state if output_final_state else None)


def backward(
    do, events, q, k, v, g=None, beta=None, lam=None, *, d_state=None, route=None, scale=None, capacity=30, tau=0.6,
    merge="density", initial_state=None, cu_seqlens=None, use_qk_l2norm_in_kernel=False, slot_order="oldest_first",
    soft=None,
) -> Gradients:
    """Gradients of the arguments of a forward from do [B,T,HV,dv] and, where given, d_state = (states, open, keys) of its
    final state (None is 0). `events` is the forward's log."""
    if events is None:
        raise TypeError("events: missing; the backward replays the forward's log")
    p = _prepare(
        q, k, v, g, beta, lam, route, scale, capacity, tau, merge, initial_state, cu_seqlens, use_qk_l2norm_in_kernel,
        slot_order, events, soft,
    )
    e = p.extents
    do = _array("do", do, p.dtype)
    if do.shape != (*e.per_token(), e.dv):
        raise ValueError(f"do: expected shape [B,T,HV,dv] = {(*e.per_token(), e.dv)}, got {do.shape}")
    shapes = e.state(capacity)
    shapes = (shapes[0], shapes[4], shapes[5])
    # Held by name until the call returns: what is addressed must live.
    upstream = None
    if d_state is not None:
        upstream = [_array(f"d_state[{i}]", x, np.float32) for i, x in enumerate((*d_state, None, None)[:3])]
        for i, (x, shape) in enumerate(zip(upstream, shapes)):
            if x is not None and x.shape != shape:
                raise ValueError(f"d_state[{i}]: expected shape {shape}, got {x.shape}")
    wanted = [None if x is None else np.empty_like(x) for x in p.arguments[:9]]
    wanted.append(np.empty(e.value_heads, np.float32) if p.options.soft else None)
    first = None
    if p.state is not None:
        first = [np.empty(shape, np.float32) for shape in (shapes if p.options.routed else shapes[:2])]
        first += [None] * (3 - len(first))
    _call.backward(
        *p.call(), p.first(), _pair(do), None if upstream is None else [_pair(x) for x in upstream], [_call.ABSENT] * 2,
        [_pair(x) for x in wanted], None if first is None else [_pair(x) for x in first],
    )
    return Gradients(*wanted, *(first or (None, None, None)))


def step(
    q, k, v, g=None, beta=None, lam=None, *, state, route=None, scale=None, capacity=30, tau=0.6, merge="density",
    use_qk_l2norm_in_kernel=False, slot_order="oldest_first", events=None,
):
    """One token per sequence (T = 1); `state` is changed in place. Returns o [B,1,HV,dv] and the state."""
    p = _prepare(
        q, k, v, g, beta, lam, route, scale, capacity, tau, merge, state, None, use_qk_l2norm_in_kernel, slot_order,
        events, None,
    )
    e = p.extents
    if e.time != 1:
        raise ValueError(f"q: expected shape [B,T,H,dk] with T = 1 for a step, got {p.arguments[0].shape}")
    for name, mine, given in zip(_call.STATE, p.state, state):
        if mine is not None and not (given.flags.c_contiguous and given.flags.writeable):
            raise ValueError(f"state.{name}: expected a contiguous array that can be written")
    o = np.empty((*e.per_token(), e.dv), p.dtype)
    results = [_pair(x) for x in (o, None, None, None)]
    _call.step(*p.call(), [_pair(x) for x in p.state], results)
    return o, state

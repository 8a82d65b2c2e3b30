"""JAX: `dla` with jit, grad and vmap, on CPU and CUDA, through XLA's FFI."""

import ctypes
from functools import lru_cache, partial
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from . import _call, _native

_PLATFORMS = ("cpu", "cuda")
_HANDLER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
# Kept: a capsule does not own what it points to.
_handlers = {name: _HANDLER(address) for name, address in _native.xla_handlers()}
for _name, _handler in _handlers.items():
    _kind, _platform = _name.rsplit("_", 1)
    jax.ffi.register_ffi_target(
        f"dla_{_kind}", jax.ffi.pycapsule(_handler), platform="CUDA" if _platform == "cuda" else _platform
    )


class State(NamedTuple):
    """States of N sequences: slot 0 is the oldest, unused slots are zero."""

    states: jax.Array
    """Slot states, [N,HV,M,dk,dv] float32."""
    len: jax.Array
    """Slots held, [N,HV] uint32."""
    tokens: jax.Array
    """Tokens of every slot, [N,HV,M] uint32."""
    drift: jax.Array
    """Summed drift of every slot in units of 2^-12, [N,HV,M] uint32."""
    open: jax.Array
    """The open segment's plain decayed sum, [N,HV,dk,dv] float32."""
    keys: Optional[jax.Array] = None
    """Key sums of every slot, [N,HV,M,dk] float32; with routed reads."""


class Forward(NamedTuple):
    """Results of a call."""

    o: jax.Array
    """Output, [B,T,HV,dv], dtype of q."""
    state: State
    """States after the last token of every sequence."""
    events: jax.Array
    """Event log, [B,T,HV] uint8."""
    drift: jax.Array
    """Drift of every token, [B,T,HV] float32."""
    lam: Optional[jax.Array]
    """Routed read weights, [B,T,HV,M] float32."""


# Operands of a call: the twelve arguments, then the state's six.
_OPERANDS = 18
# Those whose first axis is B or N, and may take a batch axis beside it.
_BATCHED = (*range(6), 8, 10, *range(12, 18))


def _mask(present):
    return sum(1 << i for i, here in enumerate(present) if here)


def _attributes(options, extents, dtype, operands, results):
    codes = [*options.codes, dtype, *extents, _mask(operands), _mask(results)]
    return dict(codes=np.asarray(codes, np.int64), numbers=np.asarray(options.numbers, np.float32))


def _extents(options, operands):
    shapes = [None if x is None else x.shape for x in operands]
    if shapes[11] is not None:
        shapes[11] = shapes[11][:1]
    return _call.extents(shapes[:12], shapes[12:] if shapes[12] is not None else None, options)


def _call_forward(options, operands):
    """Twelve results: o, drift, events, lam, and the state's six; None where there is none."""
    e = _extents(options, operands)
    q, capacity, routed = operands[0], options.capacity, options.routed
    f32, u32 = jnp.float32, jnp.uint32
    per_token = e.per_token()
    state = e.state(capacity)
    shapes = [
        ((*per_token, e.dv), q.dtype), (per_token, f32), (per_token, jnp.uint8),
        ((*per_token, capacity), f32) if routed else None, (state[0], f32), (state[1], u32), (state[2], u32),
        (state[3], u32), (state[4], f32), (state[5], f32) if routed else None,
    ]
    results = _ffi("dla_forward", options, e, q.dtype, operands, shapes)
    return tuple(results)


def _call_backward(options, operands, upstream, wanted):
    """Thirteen gradients, None where not wanted; upstream is do and the gradients of states, open and keys, then what of the
    forward was kept: drift and routed read weights."""
    e = _extents(options, operands)
    of = (*operands[:10], operands[12], operands[16], operands[17])
    shapes = [(x.shape, x.dtype) if want and x is not None else None for x, want in zip(of, wanted)]
    return tuple(_ffi("dla_backward", options, e, operands[0].dtype, (*operands, *upstream), shapes))


def _ffi(target, options, extents, dtype, operands, shapes):
    given = [x for x in operands if x is not None]
    outputs = [jax.ShapeDtypeStruct(*x) for x in shapes if x is not None]
    attributes = _attributes(
        options, extents, _call.DTYPES[jnp.dtype(dtype).name], [x is not None for x in operands],
        [x is not None for x in shapes],
    )
    results = iter(jax.ffi.ffi_call(target, outputs)(*given, **attributes))
    return [None if x is None else next(results) for x in shapes]


@lru_cache(maxsize=None)
def _batchable(backward, options, present, wanted):
    """The call as a function of the operands that are there, with a rule for vmap: the new axis goes into B where it can."""

    def run(*given):
        rest = iter(given)
        operands = [next(rest) if here else None for here in present]
        if backward:
            results = _call_backward(options, operands[:_OPERANDS], operands[_OPERANDS:], wanted)
        else:
            results = _call_forward(options, operands)
        return tuple(x for x in results if x is not None)

    function = jax.custom_batching.custom_vmap(run)

    @function.def_vmap
    def rule(size, batched, *given):
        names = [i for i, here in enumerate(present) if here]
        whole = dict(zip(names, batched))
        # A gradient of what all batch entries share would be summed over the new axis too: those one at a time.
        shared = any(i < _OPERANDS and i not in _BATCHED and (backward or on) for i, on in whole.items())
        if shared or 11 in names:
            given = [x if on else jnp.broadcast_to(x, (size, *x.shape)) for x, on in zip(given, batched)]
            results = jax.lax.map(lambda row: function(*row), tuple(given))
            return results, (True,) * len(results)
        flat = []
        for i, x, on in zip(names, given, batched):
            if i not in _BATCHED and i < _OPERANDS:
                flat.append(x)
                continue
            x = x if on else jnp.broadcast_to(x, (size, *x.shape))
            flat.append(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
        results = function(*flat)
        results = tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results)
        return results, (True,) * len(results)

    return function


def _run(backward, options, operands, wanted=()):
    present = tuple(x is not None for x in operands)
    results = iter(_batchable(backward, options, present, wanted)(*(x for x in operands if x is not None)))
    if backward:
        of = (*operands[:10], operands[12], operands[16], operands[17])
        return [next(results) if want and x is not None else None for x, want in zip(of, wanted)]
    there = [True] * 3 + [options.routed] + [True] * 5 + [options.routed]
    return [next(results) if here else None for here in there]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dla(options, operands):
    return tuple(_run(False, options, operands))


def _dla_forward(options, operands):
    # What is not differentiated has no gradient to be computed. Said by structure, which stays static: () or None.
    wanted = tuple(() if x is not None and x.perturbed else None for x in operands)
    operands = tuple(None if x is None else x.value for x in operands)
    results = tuple(_run(False, options, operands))
    # The backward replays the log; that it was given or computed is all one. Of the rest a GPU keeps what is costly to
    # compute again.
    kept = (results[1] if options.soft else None, results[3])
    return results, ((*operands[:10], results[2], *operands[11:]), kept, wanted)


def _zero_of_integers(x):
    return None if x is None else np.zeros(x.shape, jax.dtypes.float0)


def _dla_backward(options, residuals, d):
    operands, kept, differentiated = residuals
    wanted = tuple(differentiated[i] is not None for i in (*range(9), 9, 12, 16, 17))
    wanted = (*wanted[:9], wanted[9] and options.soft, *wanted[10:])
    # The final state's gradient costs, even one of zeros.
    d = [None if x is None or type(x) is jax.custom_derivatives.SymbolicZero else x for x in d]
    d_o = d[0]
    if d_o is None:
        q, v = operands[0], operands[2]
        d_o = jnp.zeros((*q.shape[:2], *v.shape[2:]), q.dtype)
    upstream = (d_o, d[4], d[8], d[9])
    gradients = _run(True, options, (*operands, *upstream, *kept), wanted) if any(wanted) else [None] * 13
    of = (*operands[:10], operands[12], operands[16], operands[17])
    gradients = [
        jnp.zeros_like(x) if x is not None and found is None else found for x, found in zip(of, gradients)
    ]
    states, opened, keys = gradients[10:]
    integers = [_zero_of_integers(x) for x in (*operands[10:12], *operands[13:16])]
    return ((*gradients[:10], *integers[:2], states, *integers[2:], opened, keys),)


_dla.defvjp(_dla_forward, _dla_backward, symbolic_zeros=True)


def _words(offsets):
    """Offsets as the library's int64, which JAX may not have: two words each, the low one first."""
    if offsets.dtype == jnp.int64:
        return offsets
    return jnp.stack([offsets, offsets >> 31], 1)


def _as(name, x, dtype):
    if x is None:
        return None
    x = _array(name, x)
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected dtype {jnp.dtype(dtype).name}, got {x.dtype.name}")
    return x


def _array(name, x):
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected an array, got {type(x).__name__}") from None


def forward(
    q, k, v, g=None, beta=None, lam=None, *, route=None, scale=None, capacity=30, tau=0.6, merge="density",
    initial_state=None, cu_seqlens=None, use_qk_l2norm_in_kernel=False, slot_order="oldest_first", events=None, soft=None,
) -> Forward:
    """All tokens of all sequences, with the event log; arguments as `dla`'s."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            raise TypeError(f"{name}: missing")
    q, v = _array("q", q), _array("v", v)
    if q.dtype.name not in _call.DTYPES:
        raise TypeError(f"q: expected dtype {', '.join(_call.DTYPES)}, got {q.dtype.name}")
    f32 = jnp.float32
    route = _call.route(route)
    if (route[0] is None) != (route[1] is None):
        raise ValueError(f"{_call.ARGUMENTS[6 if route[0] is None else 7]}: missing; reads are routed")
    number, per_head = 0.0, None
    if isinstance(tau, (int, float)):
        number = float(tau)
    else:
        per_head = _array("tau", tau).astype(f32)
        if per_head.ndim == 0 and v.ndim == 4:
            per_head = jnp.broadcast_to(per_head, (v.shape[2],))
    if cu_seqlens is not None:
        cu_seqlens = _array("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (jnp.int32, jnp.int64):
            raise TypeError(f"cu_seqlens: expected dtype int32 or int64, got {cu_seqlens.dtype.name}")
    operands = [
        q, _as("k", k, q.dtype), _as("v", v, q.dtype), _as("g", g, f32), _as("beta", beta, f32), _as("lam", lam, f32),
        *(_as(name, x, f32) for name, x in zip(_call.ARGUMENTS[6:9], route)), per_head, _as("events", events, jnp.uint8),
        cu_seqlens,
    ]
    u32 = jnp.uint32
    state = (None,) * 6 if initial_state is None else _call.state("initial_state", initial_state)
    operands += [_as(f"state.{n}", x, t) for n, x, t in zip(_call.STATE, state, (f32, u32, u32, u32, f32, f32))]
    options = _call.options(
        q.shape[-1] if q.ndim else 1, delta=beta is not None, routed=route[0] is not None, merge=merge,
        slot_order=slot_order, capacity=capacity, qk_l2norm=use_qk_l2norm_in_kernel, tau=number, scale=scale, soft=soft,
    )
    _extents(options, operands)
    if cu_seqlens is not None:
        operands[11] = _words(cu_seqlens)
    o, drift, log, weights, *last = _dla(options, tuple(operands))
    return Forward(o, State(*last), log, drift, weights)


def dla(*args, output_final_state=False, **kwargs):
    """Dynamic Linear Attention of JAX arrays: `dla(q, k, v, g=None, beta=None, lam=None, *, route, scale, capacity, tau, merge,
    initial_state, output_final_state, cu_seqlens, use_qk_l2norm_in_kernel, slot_order, events, soft)`.

    q, k: [B,T,H,dk]; v: [B,T,HV,dv]; float32, bfloat16 or float16. g, beta: [B,T,HV]; lam: [B,T,HV,M], or route = (slope [HV],
    bias [HV], logits [B,T,HV,M] or absent); float32. What each means is said at `dla.dla`.

    Returns o [B,T,HV,dv] and the final `State`, or None.
    """
    result = forward(*args, **kwargs)
    return result.o, (result.state if output_final_state else None)

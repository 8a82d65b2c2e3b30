"""What every framework's function shares: options as numbers, extents checked by name, and the calls themselves.

Arrays come as (address, bytes): how a framework says that is its own affair.
"""

import math
from typing import NamedTuple, Optional, Sequence, Tuple

from . import _native

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
ARGUMENTS = (
    "q", "k", "v", "g", "beta", "lam", "route[0] (slope)", "route[1] (bias)", "route[2] (logits)", "tau", "events",
    "cu_seqlens",
)
STATE = ("states", "len", "tokens", "drift", "open", "keys")
ABSENT = (0, 0)


class Options(NamedTuple):
    """Options of a call, as the C ABI counts them."""

    codes: Tuple[int, int, int, int, int, int, int]
    numbers: Tuple[float, float, float]

    @property
    def delta(self) -> bool:
        return self.codes[0] == 1

    @property
    def routed(self) -> bool:
        return self.codes[2] == 1

    @property
    def capacity(self) -> int:
        return self.codes[4]

    @property
    def soft(self) -> bool:
        return self.numbers[2] != 0.0


def _several(x) -> str:
    return f"{len(x)} of them" if isinstance(x, (tuple, list)) else type(x).__name__


def route(given) -> tuple:
    """Slope, bias and logits, or None for each."""
    if given is None:
        return (None, None, None)
    if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
        raise TypeError(f"route: expected (slope, bias) or (slope, bias, logits), got {_several(given)}")
    return (*given, None)[:3]


def state(name: str, given) -> tuple:
    """The six arrays of a state that is given."""
    if not isinstance(given, (tuple, list)) or len(given) != len(STATE):
        raise TypeError(f"{name}: expected a State, got {_several(given)}")
    if given[0] is None:
        raise ValueError("state.states: missing")
    return tuple(given)


def number(name: str, x) -> float:
    if isinstance(x, str):
        raise TypeError(f"{name}: expected a number, got {x!r}")
    try:
        return float(x)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}") from None


def options(dk, *, delta, routed, merge, slot_order, capacity, qk_l2norm, tau, scale, soft) -> Options:
    """Options from what the frameworks' functions take. `tau` is a number; `soft` None or (temperature, through drift)."""
    merges = {"density": 0, "mass": 1}
    orders = {"oldest_first": 0, "newest_first": 1}
    for name, x in (("merge", merge), ("slot_order", slot_order)):
        if not isinstance(x, str):
            raise TypeError(f"{name}: expected a string, got {type(x).__name__}")
    if merge not in merges:
        raise ValueError(f"merge: expected one of {', '.join(merges)}, got {merge!r}")
    if slot_order not in orders:
        raise ValueError(f"slot_order: expected one of {', '.join(orders)}, got {slot_order!r}")
    if isinstance(capacity, bool) or not isinstance(capacity, int) or not 1 <= capacity <= 64:
        raise ValueError(f"capacity: expected 1 to 64 slots, got {capacity!r}")
    if soft is not None and not (isinstance(soft, (tuple, list)) and len(soft) == 2):
        raise TypeError(f"soft: expected (temperature, whether through the drift), got {soft!r}")
    temperature, through_drift = (0.0, False) if soft is None else (number("soft", soft[0]), bool(soft[1]))
    tau = number("tau", tau)
    if soft is not None and not (temperature > 0.0 and math.isfinite(temperature)):
        raise ValueError(f"soft: expected a finite temperature above 0, got {temperature!r}")
    if math.isnan(tau):
        raise ValueError("tau: expected a number, got nan")
    if scale is None:
        scale = 1.0 / math.sqrt(dk) if dk > 0 else 1.0
    elif not math.isfinite(number("scale", scale)):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    return Options(
        (int(delta), merges[merge], int(routed), orders[slot_order], capacity, int(bool(qk_l2norm)), int(through_drift)),
        (float(tau), float(scale), float(temperature)),
    )


class Extents(NamedTuple):
    """Extents of a call."""

    batch: int
    time: int
    heads: int
    value_heads: int
    dk: int
    dv: int
    sequences: int
    lambda_columns: int
    logit_columns: int

    def state(self, capacity: int) -> Tuple[Tuple[int, ...], ...]:
        """Shapes of a state's arrays."""
        rows = (self.sequences, self.value_heads)
        return (
            (*rows, capacity, self.dk, self.dv),
            rows,
            (*rows, capacity),
            (*rows, capacity),
            (*rows, self.dk, self.dv),
            (*rows, capacity, self.dk),
        )

    def per_token(self) -> Tuple[int, int, int]:
        return (self.batch, self.time, self.value_heads)


Shape = Optional[Sequence[int]]


def _wrong(name: str, expected: str, given) -> ValueError:
    return ValueError(f"{name}: expected shape {expected}, got {tuple(given)}")


def extents(shapes: Sequence[Shape], state: Optional[Sequence[Shape]], options: Options) -> Extents:
    """Checks the shapes of the arguments, in the order of `ARGUMENTS`, and those of a state."""
    q, k, v, g, beta, lam, slope, bias, logits, tau, events, cu_seqlens = shapes
    if len(q) != 4:
        raise _wrong("q", "[B,T,H,dk]", q)
    if len(v) != 4:
        raise _wrong("v", "[B,T,HV,dv]", v)
    batch, time, heads, dk = q
    value_heads, dv = v[2], v[3]
    if heads < 1 or dk < 1:
        raise _wrong("q", "[B,T,H,dk] with H and dk 1 or more", q)
    if value_heads < 1 or dv < 1 or value_heads % heads != 0 or v[0] != batch or v[1] != time:
        raise _wrong("v", f"[B,T,HV,dv] = ({batch}, {time}, a multiple of {heads}, 1 or more)", v)
    if tuple(k) != (batch, time, heads, dk):
        raise _wrong("k", f"[B,T,H,dk] = {(batch, time, heads, dk)}", k)
    per_token = (batch, time, value_heads)
    capacity = options.codes[4]
    for name, shape in (("g", g), ("beta", beta), ("events", events)):
        if shape is not None and tuple(shape) != per_token:
            raise _wrong(name, f"[B,T,HV] = {per_token}", shape)
    columns = []
    for name, shape in (("lam", lam), ("route[2] (logits)", logits)):
        if shape is not None and (len(shape) != 4 or tuple(shape[:3]) != per_token or shape[3] < capacity):
            raise _wrong(name, f"[B,T,HV,M] = {(*per_token, capacity)}, M or more", shape)
        columns.append(capacity if shape is None else shape[3])
    for name, shape in (("route[0] (slope)", slope), ("route[1] (bias)", bias), ("tau", tau)):
        if shape is not None and tuple(shape) != (value_heads,):
            raise _wrong(name, f"[HV] = ({value_heads},)", shape)
    sequences = batch
    if cu_seqlens is not None:
        if len(cu_seqlens) != 1 or cu_seqlens[0] < 1:
            raise _wrong("cu_seqlens", "[N+1]", cu_seqlens)
        if batch != 1:
            raise ValueError(f"cu_seqlens: not expected; packed sequences take B = 1, and B = {batch}")
        sequences = cu_seqlens[0] - 1
    if lam is None and slope is None:
        raise ValueError("lam: missing; read weights are given, with lam [B,T,HV,M], or routed, with route")
    if lam is not None and slope is not None:
        raise ValueError("lam: not expected; reads are routed")
    found = Extents(batch, time, heads, value_heads, dk, dv, sequences, columns[0], columns[1])
    if state is not None:
        for name, shape, expected in zip(STATE, state, found.state(capacity)):
            if name == "keys" and not options.routed:
                if shape is not None:
                    raise ValueError("state.keys: not expected; reads are given")
            elif shape is None:
                raise ValueError(f"state.{name}: missing")
            elif tuple(shape) != expected:
                raise _wrong(f"state.{name}", str(expected), shape)
    return found


forward_workspace = _native.forward_workspace
forward = _native.forward
backward_workspace = _native.backward_workspace
backward = _native.backward
step_workspace = _native.step_workspace
step = _native.step

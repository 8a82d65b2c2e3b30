"""A cache for decoding: many sequences in one allocation of the library, each in an entry of its own, stepped in place."""

import operator
from typing import Optional, Sequence, Tuple, Union

import torch

from .. import _call, _native
from . import _op
from ._functional import _STATE_DTYPES, State, _check, _convert

_STATES = {"float32": 0, "bfloat16": 1}


def _index(name, x):
    try:
        found = operator.index(x)
    except TypeError:
        raise TypeError(f"{name}: expected the index of an entry, got {type(x).__name__}") from None
    if found < 0:
        raise ValueError(f"{name}: expected the index of an entry, got {found}")
    return found


def _indices(name, given):
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of entries, got {type(given).__name__}")
    return [_index(name, x) for x in given]


class Entries:
    """Entries of a decoding cache. A step touches no more than the states that it reads and writes: nothing is moved in or out,
    as `step` does with its `State`, and sequences join and leave without copies.

    Args:
        count: entries.
        value_heads, dk, dv: extents of the calls.
        capacity: most states, M, 1 to 64.
        delta: the recurrence is the gated delta rule, and calls give `beta`.
        routed: reads are routed, and calls give `route`.
        states: "float32", or on a GPU "bfloat16": states are read rounded to bfloat16 once, and take 3 bytes for 4.
        device: where they are; PyTorch's default. On a GPU everything happens on the stream that is current when they are made,
            which must be current in every call too.

    Indices are numbers of the host; `take` gives them. There are no gradients, and no torch.compile. Calls of several threads
    take turns.
    """

    def __init__(
        self, count: int, *, value_heads: int, dk: int, dv: int, capacity: int = 30, delta: bool = False, routed: bool = False,
        states: str = "float32", device=None,
    ):
        sizes = dict(count=count, value_heads=value_heads, dk=dk, dv=dv)
        for name, x in sizes.items():
            try:
                sizes[name] = operator.index(x)
            except TypeError:
                raise TypeError(f"{name}: expected an integer, got {type(x).__name__}") from None
            if sizes[name] < (0 if name == "count" else 1):
                raise ValueError(f"{name}: expected 1 or more, got {x}")
        if states not in _STATES:
            raise ValueError(f"states: expected one of {', '.join(_STATES)}, got {states!r}")
        count, value_heads, dk, dv = sizes.values()
        options = _call.options(
            dk, delta=bool(delta), routed=bool(routed), merge="density", slot_order="oldest_first", capacity=capacity,
            qk_l2norm=False, tau=0.6, scale=None, soft=None,
        )
        extents = _call.Extents(0, 0, value_heads, value_heads, dk, dv, 0, capacity, capacity)
        self._extents, self._options = extents, options
        self.device, self._index, self._cuda = _op._site(torch.empty(0, device=device))
        self._stream = _op.stream_of(self.device, self._index) if self._cuda else 0
        place = (int(self._cuda), self._index or 0, self._stream, _call.ABSENT)
        self._held = self._on(_native.Entries, tuple(options), place, (0, tuple(extents)), count, _STATES[states])

    def _on(self, call, *arguments):
        """The library makes the GPU's context current; what was current is so again afterwards."""
        if self._cuda and torch._C._cuda_getDevice() != self._index:
            with torch.cuda.device(self.device):
                return call(*arguments)
        return call(*arguments)

    def _check_stream(self):
        given = _op.stream_of(self.device, self._index) if self._cuda else 0
        if given != self._stream:
            raise ValueError(f"stream: expected that of the entries, {self._stream:#x}, got {given:#x}")

    def take(self) -> int:
        """A free entry, for a sequence that has not begun."""
        return self._on(self._held.take)

    def release(self, entry: int) -> None:
        """Frees an entry."""
        self._on(self._held.release, _index("entry", entry))

    def reset(self, entry: int) -> None:
        """Forgets what an entry holds: its sequence has not begun."""
        self._on(self._held.reset, _index("entry", entry))

    def copy(self, source: int, to: int) -> None:
        """Makes entry `to` what entry `source` is."""
        self._on(self._held.copy, _index("source", source), _index("to", to))

    def set_rows(self, batch: int, entries: Sequence[int]) -> None:
        """Has a captured step of `batch` rows use these entries when its graph is replayed; rows past them rest. All steps of a
        batch size share their rows, and `step` sets them too."""
        batch, entries = _index("batch", batch), _indices("entries", entries)
        self._check_stream()
        self._on(self._held.set_rows, batch, entries)

    def _state_shapes(self, sequences):
        shapes = self._extents._replace(sequences=sequences).state(self._options.capacity)
        return shapes[: 6 if self._options.routed else 5]

    def export(self, entries: Sequence[int]) -> State:
        """Entries as a `State`, a sequence each. An entry may come twice. On a GPU it waits."""
        entries = _indices("entries", entries)
        self._check_stream()
        arrays = [
            _op._maker(dtype, self.device)(shape) for shape, dtype in zip(self._state_shapes(len(entries)), _STATE_DTYPES)
        ]
        self._on(self._held.export, entries, self._pairs(arrays))
        return State(*arrays)

    def import_(self, entries: Sequence[int], state: State) -> None:
        """Makes entries what the sequences of `state` are. On a GPU it waits."""
        entries, given = _indices("entries", entries), _call.state("state", state)
        self._check_stream()
        shapes = [*self._state_shapes(len(entries)), None][:6]
        for name, x, shape, dtype in zip(_call.STATE, given, shapes, _STATE_DTYPES):
            if shape is None and x is None:
                continue
            if shape is None:
                raise ValueError(f"state.{name}: not expected; reads are given")
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"state.{name}: expected a tensor, got {type(x).__name__}")
            if x.dtype != dtype:
                raise TypeError(f"state.{name}: expected dtype {dtype}, got {x.dtype}")
            if tuple(x.shape) != shape:
                raise ValueError(f"state.{name}: expected shape {shape}, got {tuple(x.shape)}")
            if x.device != self.device:
                raise ValueError(f"state.{name}: expected a tensor of {self.device}, got one of {x.device}")
        # Held by name until the call returns: what is addressed must live.
        arrays = [_op._ready(x) for x in given if x is not None]
        self._on(self._held.import_, entries, self._pairs(arrays))

    @staticmethod
    def _pairs(arrays):
        pairs = [(x.data_ptr(), x.nbytes) for x in arrays]
        return pairs + [_call.ABSENT] * (6 - len(pairs))

    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: Optional[torch.Tensor] = None,
        beta: Optional[torch.Tensor] = None,
        lam: Optional[torch.Tensor] = None,
        *,
        entries: Sequence[int],
        route: Optional[Tuple[torch.Tensor, ...]] = None,
        scale: Optional[float] = None,
        tau: Union[float, torch.Tensor] = 0.6,
        merge: str = "density",
        use_qk_l2norm_in_kernel: bool = False,
        slot_order: str = "oldest_first",
    ) -> torch.Tensor:
        """One to eight tokens a row, T = 1 to 8: row b goes on in `entries[b]`. Arguments as `dla`'s.

        On a GPU it does not wait, and after a call of the same shapes, options and entries it can be captured into a graph; then
        `set_rows` has the graph serve others.

        Returns o [B,T,HV,dv].
        """
        options = (merge, slot_order, use_qk_l2norm_in_kernel, scale)
        return self._run(_op.EntriesStepPlan, (q, k, v, g, beta, lam, route, tau, None, None, None), options, entries)

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: Optional[torch.Tensor] = None,
        beta: Optional[torch.Tensor] = None,
        lam: Optional[torch.Tensor] = None,
        *,
        entries: Sequence[int],
        route: Optional[Tuple[torch.Tensor, ...]] = None,
        scale: Optional[float] = None,
        tau: Union[float, torch.Tensor] = 0.6,
        merge: str = "density",
        use_qk_l2norm_in_kernel: bool = False,
        slot_order: str = "oldest_first",
        cu_seqlens: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """A forward over any number of tokens: sequence n goes on in `entries[n]`. Arguments as `dla`'s; it cannot be captured.

        Returns o [B,T,HV,dv].
        """
        options = (merge, slot_order, use_qk_l2norm_in_kernel, scale)
        given = (q, k, v, g, beta, lam, route, tau, None, cu_seqlens, None)
        return self._run(_op.EntriesPrefillPlan, given, options, entries)

    def _run(self, kind, given, options, entries):
        entries = _indices("entries", entries)
        tensors, number = _convert(*given)
        described = _op.plainly_described(tensors)
        if described is None:
            # Tensors that are no tensors have a better message.
            self._checked(tensors, number, options)
            raise NotImplementedError("entries: not expected in a compiler, a mode or a transform, or with a tensor's subclass")
        key = (kind, number, self._options.capacity, *options, *described)
        plan = _op.planned(key)
        if plan is None:
            plan = _op.remember(key, kind(tensors, *self._checked(tensors, number, options)))
        return plan.run(tensors, self._held, entries)

    def _checked(self, tensors, number, options):
        merge, slot_order, qk_l2norm, scale = options
        return _check(
            tensors, number, merge=merge, slot_order=slot_order, capacity=self._options.capacity, qk_l2norm=qk_l2norm,
            scale=scale, soft=None,
        )

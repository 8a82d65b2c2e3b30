"""The operators `dla::forward`, `dla::backward` and `dla::step` of torch.library, on CPU and CUDA tensors."""

import torch
from torch.autograd import forward_ad

from .. import _call
from .._native import Prepared

# Arguments in the order of _call.ARGUMENTS, then the state's arrays in that of _call.STATE.
_ARGUMENTS = """Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? lam, Tensor? slope, Tensor? bias,
    Tensor? logits, Tensor? tau, Tensor? events, Tensor? cu_seqlens"""
_STATE = "Tensor? states, Tensor? len, Tensor? tokens, Tensor? drift, Tensor? open, Tensor? keys"
_SETTINGS = "int[] codes, float[] numbers"

_library = torch.library.Library("dla", "DEF")
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
# o, drift, events, lam, and the state's six; without elements where it is not wanted or there is none.
_library.define(
    f"forward({_ARGUMENTS}, {_STATE}, {_SETTINGS}, bool final_state) -> ({', '.join(['Tensor'] * 10)})", tags=_tags
)
# Of q, k, v, g, beta, lam, slope, bias, logits, tau, states, open, keys; without elements where not wanted. The forward's
# drift and routed read weights, where they were kept, need not be computed again.
_library.define(
    "backward(Tensor d_o, Tensor? d_states, Tensor? d_open, Tensor? d_keys, Tensor? kept_drift, Tensor? kept_lam, "
    f"{_ARGUMENTS}, {_STATE}, {_SETTINGS}, bool[] wanted) -> ({', '.join(['Tensor'] * 13)})",
    tags=_tags,
)
# o, drift, events; the state is changed in place.
_library.define(
    f"step({_ARGUMENTS.replace(', Tensor? cu_seqlens', '')}, Tensor(a!) states, Tensor(b!) len, Tensor(c!) tokens, "
    f"Tensor(d!) drift, Tensor(e!) open, Tensor(f!)? keys, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    tags=_tags,
)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What the kernels read 16 bytes at a time must begin at such an address.
_ALIGNMENT = 16
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _ready(x):
    """`x` as the library reads it: contiguous, and aligned."""
    if x is None:
        return None
    x = x.detach() if x.requires_grad else x
    if not x.is_contiguous():
        x = x.contiguous()
    return x.clone() if x.data_ptr() % _ALIGNMENT else x


def _options(codes, numbers):
    return _call.Options(tuple(codes), tuple(numbers))


def _extents(q, v, lam, logits, cu_seqlens, capacity):
    batch, time, heads, dk = q.shape
    value_heads, dv = v.shape[2], v.shape[3]
    return _call.Extents(
        batch, time, heads, value_heads, dk, dv,
        batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        capacity if lam is None else lam.shape[3],
        capacity if logits is None else logits.shape[3],
    )


# Of o (None: that of q), drift, events, lam, states, len, tokens, drift sums, open, keys.
_OUTPUT_DTYPES = (
    None, torch.float32, torch.uint8, torch.float32, torch.float32, *(torch.int32,) * 3, torch.float32, torch.float32,
)


def _forward_outputs(q, e, options, final_state):
    """Outputs of a forward, not filled: of real tensors and of fake ones. None where there is none."""
    per_token = e.per_token()
    shapes = [(*per_token, e.dv), per_token, per_token, (*per_token, options.capacity) if options.routed else None]
    if final_state:
        shapes += e.state(options.capacity)
        if not options.routed:
            shapes[9] = None
    else:
        shapes += [None] * 6
    empty, device = torch.empty, q.device
    return [
        None if shape is None else empty(shape, dtype=dtype or q.dtype, device=device)
        for shape, dtype in zip(shapes, _OUTPUT_DTYPES)
    ]


def _whole(q, outputs):
    """Outputs as the operator returns them: an operator has no absent tensors, but has some without elements."""
    return tuple(
        torch.empty(0, dtype=dtype, device=q.device) if x is None else x for x, dtype in zip(outputs, _OUTPUT_DTYPES)
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_modes, _transform = torch._C._len_torch_dispatch_stack, torch._C._functorch.peek_interpreter_stack
# A tensor that outlived its transform is a plain one by its type.
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor

# Plans of calls. Where shapes are ever new, all are forgotten at once.
_plans = {}
_MOST_PLANS = 4096


def planned(key):
    """The plan of a call that is known by `key`, if there is one. An option that cannot be looked up has none: the check has its name."""
    try:
        return _plans.get(key)
    except TypeError:
        return None


def remember(key, plan):
    """Keeps the plan of a call that is known by `key`."""
    if len(_plans) >= _MOST_PLANS:
        _plans.clear()
    _plans[key] = plan
    return plan


def remembered(key, make):
    """The plan of a call that is known by `key`."""
    return planned(key) or remember(key, make())


def described(tensors):
    """What of the tensors a plan depends on."""
    found = []
    for x in tensors:
        if x is None:
            found.append(None)
        else:
            found += (x.shape, x.dtype, x.device)
    return found


def _refuse_tangents(tensors):
    """The dispatcher would drop them without a word."""
    names = (*_call.ARGUMENTS, *(f"state.{name}" for name in _call.STATE))
    for name, x in zip(names, tensors):
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{name}: not expected with a tangent; there are no forward-mode derivatives")


def plainly_described(tensors):
    """The same, and which want a gradient, where nothing but eager autograd looks at these tensors: no compiler, mode,
    transform or subclass; else None."""
    if torch.compiler.is_compiling() or _modes() > 0 or _transform() is not None:
        return None
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    found = []
    for x in tensors:
        if x is None:
            found.append(None)
        elif type(x) in _PLAIN and not _wrapped(x):
            found += (x.shape, x.dtype, x.device, x.requires_grad)
        else:
            return None
    return found


def _forward(*args):
    *tensors, codes, numbers, final_state = args
    plan = remembered(
        ("forward", *codes, *numbers, final_state, *described(tensors)),
        lambda: Plan(tensors, codes, numbers, final_state, True, True),
    )
    return _whole(tensors[0], plan.ten(plan.run(tuple(tensors))))


def _forward_fake(*args):
    *tensors, codes, numbers, final_state = args
    options = _options(codes, numbers)
    e = _extents(tensors[0], tensors[2], tensors[5], tensors[8], tensors[11], options.capacity)
    return _whole(tensors[0], _forward_outputs(tensors[0], e, options, final_state))


def _backward_outputs(tensors, wanted):
    """Gradients, not filled: of real tensors and of fake ones."""
    of = (*tensors[:10], tensors[12], tensors[16], tensors[17])
    none = tensors[0].new_empty
    return tuple(
        x.new_empty(x.shape) if want and x is not None else none(0, dtype=torch.float32) for x, want in zip(of, wanted)
    )


def _backward(d_o, d_states, d_open, d_keys, kept_drift, kept_lam, *args):
    *tensors, codes, numbers, wanted = args
    given = (d_o, d_states, d_open, d_keys, kept_drift, kept_lam)
    plan = remembered(
        ("backward", *codes, *numbers, *wanted, *[x is None for x in given], *described(tensors)),
        lambda: BackwardPlan(tensors, codes, numbers, wanted, given),
    )
    found = plan.run(tuple(tensors), given)
    none = tensors[0].new_empty
    return tuple(none(0, dtype=torch.float32) if x is None else x for x in found)


def _backward_fake(d_o, d_states, d_open, d_keys, kept_drift, kept_lam, *args):
    *tensors, _codes, _numbers, wanted = args
    return _backward_outputs(tensors, wanted)


def _step_outputs(q, v):
    per_token = (q.shape[0], q.shape[1], v.shape[2])
    return (
        q.new_empty((*per_token, v.shape[3])),
        q.new_empty(per_token, dtype=torch.float32),
        q.new_empty(per_token, dtype=torch.uint8),
    )


def _step(*args):
    *tensors, codes, numbers = args
    tensors = [*tensors[:11], None, *tensors[11:]]
    plan = remembered(
        ("step", *codes, *numbers, *described(tensors)), lambda: StepPlan(tensors, codes, numbers, True)
    )
    return plan.run(tuple(tensors))


def _step_fake(*args):
    return _step_outputs(args[0], args[2])


def _kept(outputs, numbers, final_state, routed):
    """Of a forward's results on a GPU what its backward would else compute again: drift, routed read weights."""
    return (outputs[1] if numbers[2] != 0.0 or final_state else None, outputs[3] if routed else None)


def _setup(ctx, inputs, output):
    *tensors, codes, numbers, final_state = inputs
    # The backward replays the log; that it was given or computed is all one.
    tensors[10] = output[2]
    kept = _kept(output, numbers, final_state, codes[2] == 1) if tensors[0].is_cuda else (None, None)
    ctx.save_for_backward(*tensors, *kept)
    ctx.settings = (codes, numbers)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[i] for i in (1, 2, 3, 5, 6, 7) if output[i] is not None))


def _autograd(ctx, *d):
    codes, numbers = ctx.settings
    needs = ctx.needs_input_grad[:18]
    *tensors, drift, lam = ctx.saved_tensors
    wanted, upstream = _asked(tensors, codes, numbers, needs, *d)
    found = torch.ops.dla.backward(*upstream, drift, lam, *tensors, codes, numbers, wanted)
    found = [x if want else None for x, want in zip(found, wanted)]
    return (*_of_tensors(found), None, None, None)


def _asked(tensors, codes, numbers, needs, d_o, _drift, _events, _lam, d_states, _len, _tokens, _sums, d_open, d_keys):
    """Which of the thirteen gradients are needed; the gradients of o and the state."""
    wanted = [*needs[:10], needs[12], needs[16], needs[17]]
    wanted[9] = wanted[9] and numbers[2] != 0.0
    if d_o is None:
        q, v = tensors[0], tensors[2]
        d_o = q.new_zeros((q.shape[0], q.shape[1], v.shape[2], v.shape[3]))
    return wanted, (d_o, d_states, d_open, d_keys if codes[2] == 1 else None)


def _of_tensors(found):
    """Thirteen gradients as those of the eighteen tensors."""
    return (*found[:10], None, None, found[10], None, None, None, found[11], found[12])


# Tau of every head on a GPU, by number, heads and device: filled once, not with every call. Graphs that were captured
# read them for ever, so none is given up, and there are only so many.
_taus = {}
_MOST_TAUS = 256


def _tau(number, heads, device, may_make):
    """A tensor of `heads` times the number, or None: the library fills its own. `may_make`: this is no compiled graph's call,
    whose memory is not ours to keep."""
    key = (number, heads, device)
    found = _taus.get(key)
    if found is not None or not may_make or len(_taus) >= _MOST_TAUS:
        return found
    with torch.cuda.device(device):
        # A capture would not fill it now.
        if torch.cuda.is_current_stream_capturing():
            return None
        found = _taus[key] = torch.full((heads,), number, dtype=torch.float32, device=device)
        # Other streams read it too.
        torch.cuda.current_stream().synchronize()
    return found


def stream_of(device, index):
    """PyTorch's current stream on a GPU."""
    return _raw_stream(index) if _raw_stream else torch.cuda.current_stream(device).cuda_stream


def _site(x):
    """Device of a tensor, its index, whether it is a GPU."""
    return x.device, x.device.index, x.is_cuda


def _maker(dtype, device):
    """Makes tensors not filled, by shape: of one without elements, sooner than torch.empty."""
    return torch.empty(0, dtype=dtype, device=device).new_empty


class _Prepared:
    """What calls of the same tensors' shapes and options share: where they run, and the library's own record of them.

    `present`: places of the tensors that there are, in the order in which calls give them (who gives all eighteen, None among
    them, gives them by place); `upstream`: what a backward takes beside them; `written`: place, shape and dtype of all that
    a call writes; `eager`: the direct path's.
    """

    def __init__(self, kind, tensors, codes, numbers, written, upstream=(), present=None, eager=False):
        q, v = tensors[0], tensors[2]
        self.codes, self.numbers = codes, numbers
        self.options = options = _options(codes, numbers)
        self.shape = e = _extents(q, v, tensors[5], tensors[8], tensors[11], options.capacity)
        self.present = present or tuple(i for i, x in enumerate(tensors) if x is not None)
        self.device, self.index, self.cuda = _site(q)
        with torch.no_grad():
            makers = {x: _maker(x, q.device) for x in {torch.uint8, *(dtype for _, _, dtype in written)}}
            self.tau = _tau(numbers[0], e.value_heads, q.device, eager) if self.cuda and tensors[9] is None else None
        self.room = makers[torch.uint8]
        self.outputs = [(makers[dtype], shape) for _, shape, dtype in written]
        self.places = tuple(i for i, _, _ in written)
        sizes = [(i, torch.Size(shape).numel() * dtype.itemsize) for i, shape, dtype in written]
        given = [(i, tensors[i].nbytes) for i in self.present]
        beside = [(i, x.nbytes) for i, x in enumerate(upstream) if x is not None]
        native = Prepared(
            (options.codes, options.numbers), (1, self.index) if self.cuda else (0, 0), (_DTYPES[q.dtype], tuple(e)),
            given, 0 if self.tau is None else self.tau.data_ptr(), beside, sizes,
        )
        self.call, self.query = getattr(native, kind), getattr(native, f"{kind}_workspace", None)
        self.bytes = None

    def launch(self, *arrays):
        """Whether it was; else a tensor must be copied first."""
        if not self.cuda:
            return self.call(0, (0, 0), *arrays)
        # The library makes the GPU's context current; what was current is so again afterwards.
        if torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.device):
                return self._launch(arrays)
        return self._launch(arrays)

    def _launch(self, arrays):
        stream = stream_of(self.device, self.index)
        size = self.bytes
        if size is None:
            size = self.bytes = self.query(stream)
        # Free for what comes later on this stream: the allocator keeps to the stream's order.
        workspace = self.room(size)
        return self.call(stream, (workspace.data_ptr(), size), *arrays)


class Plan(_Prepared):
    """A forward. `want_log`: the log, drift and routed read weights are results too; `differentiated`: a backward may take
    them."""

    def __init__(self, tensors, codes, numbers, final_state, want_log, differentiated, eager=False):
        options = _options(codes, numbers)
        e = _extents(tensors[0], tensors[2], tensors[5], tensors[8], tensors[11], options.capacity)
        # What the backward takes of the forward is there as well.
        keeps = differentiated and _site(tensors[0])[2]
        self.keeps = (keeps and (options.soft or final_state), keeps and options.routed)
        per_token = e.per_token()
        shapes = [
            (*per_token, e.dv),
            per_token if want_log or self.keeps[0] else None,
            per_token if want_log or differentiated else None,
            (*per_token, options.capacity) if options.routed and (want_log or self.keeps[1]) else None,
        ]
        shapes += e.state(options.capacity) if final_state else [None] * 6
        if not options.routed:
            shapes[9] = None
        dtype = tensors[0].dtype
        written = [(i, shape, _OUTPUT_DTYPES[i] or dtype) for i, shape in enumerate(shapes) if shape is not None]
        super().__init__("forward", tensors, codes, numbers, written, eager=eager)
        self.differentiated = differentiated
        # Among what is written: what has no gradient, the log and what else is kept, what may have one.
        self.silent = tuple(n for n, i in enumerate(self.places) if i in (1, 2, 3, 5, 6, 7))
        at = {i: n for n, i in enumerate(self.places)}
        # The backward replays the log. The caller's own is among the tensors.
        self.log = None if 10 in self.present or not differentiated else at[2]
        self.kept = tuple(at[i] if keep else None for i, keep in zip((1, 3), self.keeps))
        self.upstream = tuple(at.get(i) for i in (0, 4, 8, 9))
        self.backwards = {}

    def run(self, tensors):
        """`tensors`: those that are present, in order, or all. What is written."""
        outputs = tuple([empty(shape) for empty, shape in self.outputs])
        if not self.launch(tensors, outputs):
            self.launch(tuple([_ready(x) for x in tensors]), outputs)
        return outputs

    def ten(self, outputs):
        """Of what is written, the ten outputs, None where there is none."""
        found = [None] * 10
        for i, x in zip(self.places, outputs):
            found[i] = x
        return found


class BackwardPlan(_Prepared):
    """A backward that gives the gradients `wanted`; of what is given beside the tensors (the gradients of o and of the
    state, what was kept of the forward) only whether it is there matters here."""

    def __init__(self, tensors, codes, numbers, wanted, upstream, present=None):
        of = (*tensors[:10], tensors[12], tensors[16], tensors[17])
        written = [(i, x.shape, x.dtype) for i, (x, want) in enumerate(zip(of, wanted)) if want and x is not None]
        # Only the direct path has an order of its own.
        super().__init__("backward", tensors, codes, numbers, written, upstream, present, present is not None)

    def run(self, tensors, upstream):
        """`tensors`: those that are present, in order, or all; six `upstream`. Thirteen gradients, None where not wanted."""
        outputs = tuple([empty(shape) for empty, shape in self.outputs])
        if not self.launch(tensors, upstream, outputs):
            # Held by name until the call returns: what is addressed must live.
            tensors, upstream = (tuple([_ready(x) for x in some]) for some in (tensors, upstream))
            self.launch(tensors, upstream, outputs)
        found = [None] * 13
        for i, x in zip(self.places, outputs):
            found[i] = x
        return found


class StepPlan(_Prepared):
    """A step, which changes its state in place. `want_log`: drift and the log are results too."""

    def __init__(self, tensors, codes, numbers, want_log, eager=False):
        q, v = tensors[0], tensors[2]
        per_token = (q.shape[0], q.shape[1], v.shape[2])
        written = [(0, (*per_token, v.shape[3]), q.dtype)]
        if want_log:
            written += [(1, per_token, torch.float32), (2, per_token, torch.uint8)]
        super().__init__("step", tensors, codes, numbers, written, eager=eager)

    def run(self, tensors):
        """`tensors`: all eighteen. o, and with the log drift and events."""
        outputs = tuple([empty(shape) for empty, shape in self.outputs])
        if not self.launch(tensors, outputs):
            for name, x in zip(_call.STATE, tensors[12:]):
                if x is not None and (not x.is_contiguous() or x.data_ptr() % _ALIGNMENT):
                    raise ValueError(f"state.{name}: expected a contiguous tensor at a multiple of {_ALIGNMENT} bytes")
            self.launch(tuple([_ready(x) for x in tensors]), outputs)
        return outputs


class _EntriesPlan(_Prepared):
    """A call on entries, which has one result."""

    kind = None

    def __init__(self, tensors, codes, numbers):
        q, v = tensors[0], tensors[2]
        written = [(0, (*q.shape[:2], *v.shape[2:]), q.dtype)]
        super().__init__(self.kind, tensors, codes, numbers, written, eager=True)

    def run(self, tensors, held, entries):
        """`tensors`: all eighteen. o."""
        empty, shape = self.outputs[0]
        outputs = (empty(shape),)
        if not self.launch(tensors, outputs, held, entries):
            tensors = tuple([_ready(x) for x in tensors])
            self.launch(tensors, outputs, held, entries)
        return outputs[0]


class EntriesStepPlan(_EntriesPlan):
    """A step of entries."""

    kind = "entries_step"

    def launch(self, *arrays):
        if not self.cuda:
            return self.call(0, *arrays)
        return super().launch(*arrays)

    def _launch(self, arrays):
        return self.call(stream_of(self.device, self.index), *arrays)


class EntriesPrefillPlan(_EntriesPlan):
    """A forward from entries to themselves."""

    kind = "entries_prefill"

    def _launch(self, arrays):
        if self.bytes is None:
            self.bytes = self.query(stream_of(self.device, self.index), arrays[2])
        return super()._launch(arrays)


class Direct(torch.autograd.Function):
    """The operator for plain eager tensors, without the dispatcher: the same calls, sooner."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        outputs = plan.run(tensors)
        ctx.plan = plan
        log, (drift, weights) = plan.log, plan.kept
        ctx.save_for_backward(
            *tensors, *(() if log is None else (outputs[log],)), None if drift is None else outputs[drift],
            None if weights is None else outputs[weights],
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[outputs[i] for i in plan.silent])
        return outputs

    @staticmethod
    def backward(ctx, *d):
        # once_differentiable asks for a mode that is off already where nobody differentiates twice.
        return _twice_refused(ctx, *d) if torch.is_grad_enabled() else _direct_backward(ctx, *d)


def _direct_backward(ctx, *d):
    plan, (*tensors, drift, lam) = ctx.plan, ctx.saved_tensors
    d_o, d_states, d_open, d_keys = [None if i is None else d[i] for i in plan.upstream]
    needs = ctx.needs_input_grad
    own = None
    if not torch.compiler.is_compiling():
        key = (needs, d_states is None, d_open is None, d_keys is None)
        own = plan.backwards.get(key)
    if own is None or d_o is None:
        present = plan.present if plan.log is None else (*plan.present, 10)
        all_needs, whole = [False] * 18, [None] * 18
        for i, need in zip(plan.present, needs[1:]):
            all_needs[i] = need
        for i, x in zip(present, tensors):
            whole[i] = x
        none = (None,) * 3
        wanted, upstream = _asked(whole, plan.codes, plan.numbers, all_needs, d_o, *none, d_states, *none, d_open, d_keys)
        d_o = upstream[0]
        if torch.compiler.is_compiling():
            found = torch.ops.dla.backward(*upstream, drift, lam, *whole, plan.codes, plan.numbers, wanted)
            found = _of_tensors([x if want else None for x, want in zip(found, wanted)])
            return (None, *(found[i] for i in plan.present))
        if own is None:
            own = BackwardPlan(whole, plan.codes, plan.numbers, wanted, (*upstream, drift, lam), present)
            plan.backwards[key] = own
    found = _of_tensors(own.run(tuple(tensors), (d_o, d_states, d_open, d_keys, drift, lam)))
    return (None, *[found[i] for i in plan.present])


_twice_refused = torch.autograd.function.once_differentiable(_direct_backward)
# Function.apply without its questions of functorch, which are answered: there is none.
direct = super(torch.autograd.Function, Direct).apply


for _name, _kernel, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("step", _step, _step_fake),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"dla::{_name}", _fake, lib=_library)
torch.library.register_autograd("dla::forward", _autograd, setup_context=_setup, lib=_library)

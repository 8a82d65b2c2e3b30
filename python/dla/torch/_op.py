"""The operators `dla::forward`, `dla::backward` and `dla::step` of torch.library, on CPU and CUDA tensors."""

import torch

from .. import _call

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


def _pair(x):
    if x is None:
        return _call.ABSENT
    # A tensor without elements is there all the same.
    return (x.data_ptr() or 256, x.nbytes)


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


_HOST = (0, 0, 0, _call.ABSENT)


class _Site:
    """Where calls of the same shapes run: the host, or a GPU, with the workspace that each takes there."""

    def __init__(self, device):
        self.device, self.index, self.cuda = device, device.index, device.type == "cuda"
        self.bytes = None

    def _place(self, workspace=_call.ABSENT):
        index = self.index
        stream = _raw_stream(index) if _raw_stream else torch.cuda.current_stream(self.device).cuda_stream
        return (1, index, stream, workspace)

    def launch(self, options, extents, pairs, query, call, asked, given):
        """`query` with `asked` says the workspace, once; `call` takes `given`."""
        if not self.cuda:
            call(options, _HOST, extents, pairs, *given)
            return
        # The library makes the GPU's context current; what was current is so again afterwards.
        if torch._C._cuda_getDevice() != self.index:
            with torch.cuda.device(self.device):
                self._launch(options, extents, pairs, query, call, asked, given)
        else:
            self._launch(options, extents, pairs, query, call, asked, given)

    def _launch(self, options, extents, pairs, query, call, asked, given):
        if self.bytes is None:
            self.bytes = query(options, self._place(), extents, pairs, *asked)
        # Free for what comes later on this stream: the allocator keeps to the stream's order.
        workspace = torch.empty(self.bytes, dtype=torch.uint8, device=self.device)
        call(options, self._place((workspace.data_ptr(), self.bytes)), extents, pairs, *given)


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


# Plans of calls. Where shapes are ever new, all are forgotten at once.
_plans = {}
_MOST_PLANS = 4096


def remembered(key, make):
    """The plan of a call that is known by `key`."""
    plan = _plans.get(key)
    if plan is None:
        plan = make()
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def described(tensors):
    """What of the tensors a plan depends on."""
    return [x if x is None else (x.shape, x.dtype, x.device) for x in tensors]


def _forward(*args):
    *tensors, codes, numbers, final_state = args
    plan = remembered(
        ("forward", *codes, *numbers, final_state, *described(tensors)),
        lambda: Plan(tensors, codes, numbers, final_state, True, True),
    )
    return _whole(tensors[0], plan.run([x for x in tensors if x is not None]))


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
    given = (d_states, d_open, d_keys, kept_drift, kept_lam)
    plan = remembered(
        ("backward", *codes, *numbers, *wanted, *[x is None for x in given], *described(tensors)),
        lambda: BackwardPlan(tensors, codes, numbers, wanted, given),
    )
    found = plan.run([x for x in tensors if x is not None], d_o, *given)
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
        ("step", *codes, *numbers, *described(tensors)), lambda: StepPlan(tensors, codes, numbers)
    )
    return plan.run([x for x in tensors if x is not None])


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


class _Prepared:
    """What calls of the same tensors' shapes and options share."""

    def __init__(self, tensors, codes, numbers):
        q, v = tensors[0], tensors[2]
        self.codes, self.numbers = codes, numbers
        self.options = options = _options(codes, numbers)
        self.shape = e = _extents(q, v, tensors[5], tensors[8], tensors[11], options.capacity)
        self.extents = (_DTYPES[q.dtype], list(e))
        self.present = tuple(i for i, x in enumerate(tensors) if x is not None)
        self.resumed = tensors[12] is not None
        self.device = q.device
        self.site = _Site(q.device)

    def addresses(self, ready):
        """Addresses of the twelve arguments, and of the state's six arrays if there is one."""
        pairs, first = [_call.ABSENT] * 12, [_call.ABSENT] * 6 if self.resumed else None
        for i, x in zip(self.present, ready):
            if i < 12:
                pairs[i] = (x.data_ptr() or 256, x.nbytes)
            else:
                first[i - 12] = (x.data_ptr() or 256, x.nbytes)
        return pairs, first


class Plan(_Prepared):
    """A forward. `want_log`: drift and routed read weights are results too; `keep`: its backward may take them."""

    def __init__(self, tensors, codes, numbers, final_state, want_log, differentiated):
        super().__init__(tensors, codes, numbers)
        e, options = self.shape, self.options
        # What the backward takes of the forward is there as well.
        keeps = differentiated and self.site.cuda
        self.keeps = (keeps and (options.soft or final_state), keeps and options.routed)
        per_token = e.per_token()
        shapes = [(*per_token, e.dv), per_token if want_log or self.keeps[0] else None, per_token]
        shapes.append((*per_token, options.capacity) if options.routed and (want_log or self.keeps[1]) else None)
        shapes += e.state(options.capacity) if final_state else [None] * 6
        if not options.routed:
            shapes[9] = None
        dtype = tensors[0].dtype
        self.shapes = [(i, shape, _OUTPUT_DTYPES[i] or dtype) for i, shape in enumerate(shapes) if shape is not None]
        self.final_state = final_state
        self.silent = tuple(i for i in (1, 2, 3, 5, 6, 7) if shapes[i] is not None)
        self.backwards = {}

    def run(self, tensors):
        """`tensors`: those that are present, in order. Ten outputs, None where there is none."""
        ready = [_ready(x) for x in tensors]
        pairs, first = self.addresses(ready)
        outputs, results = [None] * 10, [_call.ABSENT] * 10
        empty, device = torch.empty, self.device
        for i, shape, dtype in self.shapes:
            x = outputs[i] = empty(shape, dtype=dtype, device=device)
            results[i] = (x.data_ptr() or 256, x.nbytes)
        last = results[4:] if self.final_state else None
        results = results[:4]
        self.site.launch(
            self.options, self.extents, pairs, _call.forward_workspace, _call.forward, (results, last),
            (first, results, last),
        )
        return outputs


class BackwardPlan(_Prepared):
    """A backward that gives the gradients `wanted`; of what is given beside d_o (the state's gradients, what was kept of the
    forward) only whether it is there matters here."""

    def __init__(self, tensors, codes, numbers, wanted, given):
        super().__init__(tensors, codes, numbers)
        of = (*tensors[:10], tensors[12], tensors[16], tensors[17])
        self.shapes = [
            (i, x.shape, x.dtype) for i, (x, want) in enumerate(zip(of, wanted)) if want and x is not None
        ]
        self.to_state = self.resumed and any(wanted[10:])
        self.from_state = any(x is not None for x in given[:3])

    def run(self, tensors, d_o, d_states, d_open, d_keys, kept_drift, kept_lam):
        """`tensors`: those that are present, in order. Thirteen gradients, None where not wanted."""
        # Held by name until the call returns: what is addressed must live.
        ready = [_ready(x) for x in tensors]
        d_o, d_states, d_open, d_keys = _ready(d_o), _ready(d_states), _ready(d_open), _ready(d_keys)
        pairs, first = self.addresses(ready)
        outputs, gradients = [None] * 13, [_call.ABSENT] * 13
        empty, device = torch.empty, self.device
        for i, shape, dtype in self.shapes:
            x = outputs[i] = empty(shape, dtype=dtype, device=device)
            gradients[i] = (x.data_ptr() or 256, x.nbytes)
        given = (
            first, _pair(d_o), [_pair(d_states), _pair(d_open), _pair(d_keys)] if self.from_state else None,
            [_pair(kept_drift), _pair(kept_lam)], gradients[:10], gradients[10:] if self.to_state else None,
        )
        self.site.launch(self.options, self.extents, pairs, _call.backward_workspace, _call.backward, given, given)
        return outputs


class StepPlan(_Prepared):
    """A step, which changes its state in place."""

    def __init__(self, tensors, codes, numbers):
        super().__init__(tensors, codes, numbers)
        e = self.shape
        per_token = (e.batch, e.time, e.value_heads)
        q = tensors[0]
        self.shapes = [((*per_token, e.dv), q.dtype), (per_token, torch.float32), (per_token, torch.uint8)]

    def run(self, tensors):
        """o, drift and events."""
        for i, x in zip(self.present, tensors):
            if i >= 12 and (not x.is_contiguous() or x.data_ptr() % _ALIGNMENT):
                name = _call.STATE[i - 12]
                raise ValueError(f"state.{name}: expected a contiguous tensor at a multiple of {_ALIGNMENT} bytes")
        ready = [_ready(x) for x in tensors]
        pairs, state = self.addresses(ready)
        outputs = tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in self.shapes)
        results = [*(_pair(x) for x in outputs), _call.ABSENT]
        self.site.launch(
            self.options, self.extents, pairs, _call.step_workspace, _call.step, (results,), (state, results)
        )
        return outputs


class Direct(torch.autograd.Function):
    """The operator for plain eager tensors, without the dispatcher: the same calls, sooner."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        outputs = plan.run(tensors)
        ctx.plan = plan
        # The backward replays the log; that it was given or computed is all one.
        kept = (x if keep else None for x, keep in zip((outputs[1], outputs[3]), plan.keeps))
        ctx.save_for_backward(outputs[2], *kept, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(outputs[i] for i in plan.silent))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d):
        plan, (log, drift, lam, *saved) = ctx.plan, ctx.saved_tensors
        tensors, needs = [None] * 18, [False] * 18
        for i, x, need in zip(plan.present, saved, ctx.needs_input_grad[1:]):
            tensors[i], needs[i] = x, need
        tensors[10] = log
        wanted, upstream = _asked(tensors, plan.codes, plan.numbers, needs, *d)
        if torch.compiler.is_compiling():
            found = torch.ops.dla.backward(*upstream, drift, lam, *tensors, plan.codes, plan.numbers, wanted)
            found = [x if want else None for x, want in zip(found, wanted)]
        else:
            key = (*wanted, *(x is None for x in upstream))
            own = plan.backwards.get(key)
            if own is None:
                own = BackwardPlan(tensors, plan.codes, plan.numbers, wanted, (*upstream[1:], drift, lam))
                plan.backwards[key] = own
            found = own.run([x for x in tensors if x is not None], *upstream, drift, lam)
        found = _of_tensors(found)
        return (None, *(found[i] for i in plan.present))


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensors):
    """Whether nothing but eager autograd looks at these tensors: no compiler, mode, transform or subclass."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):
        return False
    for x in tensors:
        if x is not None and type(x) not in _PLAIN:
            return False
    return True


for _name, _kernel, _fake in (
    ("forward", _forward, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("step", _step, _step_fake),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"dla::{_name}", _fake, lib=_library)
torch.library.register_autograd("dla::forward", _autograd, setup_context=_setup, lib=_library)

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
# Of q, k, v, g, beta, lam, slope, bias, logits, tau, states, open, keys; without elements where not wanted.
_library.define(
    "backward(Tensor d_o, Tensor? d_states, Tensor? d_open, Tensor? d_keys, "
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


class _Run:
    """A call on the device of q: its place, and the workspace where it is a GPU."""

    def __init__(self, q):
        self.device = q.device
        self.cuda = q.is_cuda
        self.workspace = None

    def place(self, workspace=None):
        if not self.cuda:
            return (0, 0, 0, _call.ABSENT)
        index = self.device.index
        if _raw_stream is not None:
            stream = _raw_stream(index)
        else:
            stream = torch.cuda.current_stream(self.device).cuda_stream
        return (1, index, stream, _call.ABSENT if workspace is None else _pair(workspace))

    def with_workspace(self, query, call):
        """Asks for the workspace, takes it from torch's allocator, and calls."""
        if not self.cuda:
            return call(self.place())
        # The library makes the GPU's context current; what was current is so again afterwards.
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return self._on_gpu(query, call)
        return self._on_gpu(query, call)

    def _on_gpu(self, query, call):
        workspace = torch.empty(query(self.place()), dtype=torch.uint8, device=self.device)
        # Free for what comes later on this stream: the allocator keeps to the stream's order.
        call(self.place(workspace))


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


def _forward_op(*args):
    return _whole(args[0], _forward(*args))


def _forward(*args):
    *tensors, codes, numbers, final_state = args
    arguments, state = [_ready(x) for x in tensors[:12]], [_ready(x) for x in tensors[12:]]
    options = _options(codes, numbers)
    q, v = arguments[0], arguments[2]
    e = _extents(q, v, arguments[5], arguments[8], arguments[11], options.capacity)
    outputs = _forward_outputs(q, e, options, final_state)
    results = [_pair(x) for x in outputs[:4]]
    last = [_pair(x) for x in outputs[4:]] if final_state else None
    first = None if state[0] is None else [_pair(x) for x in state]
    extents = (_DTYPES[q.dtype], list(e))
    pairs = [_pair(x) for x in arguments]
    _Run(q).with_workspace(
        lambda place: _call.forward_workspace(options, place, extents, pairs, results, last),
        lambda place: _call.forward(options, place, extents, pairs, first, results, last),
    )
    return outputs


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


def _backward(d_o, d_states, d_open, d_keys, *args):
    *tensors, codes, numbers, wanted = args
    arguments, state = [_ready(x) for x in tensors[:12]], [_ready(x) for x in tensors[12:]]
    # Held by name until the call returns: what is addressed must live.
    d_o, upstream = _ready(d_o), [_ready(x) for x in (d_states, d_open, d_keys)]
    options = _options(codes, numbers)
    q = arguments[0]
    e = _extents(q, arguments[2], arguments[5], arguments[8], arguments[11], options.capacity)
    outputs = _backward_outputs(tensors, wanted)
    of = (*tensors[:10], tensors[12], tensors[16], tensors[17])
    pairs = [
        _pair(x) if want and source is not None else _call.ABSENT for x, source, want in zip(outputs, of, wanted)
    ]
    first = None if state[0] is None else [_pair(x) for x in state]
    d_first = None if first is None or not any(wanted[10:]) else pairs[10:]
    d_last = None if all(x is None for x in upstream) else [_pair(x) for x in upstream]
    extents = (_DTYPES[q.dtype], list(e))
    inputs = [_pair(x) for x in arguments]
    _Run(q).with_workspace(
        lambda place: _call.backward_workspace(options, place, extents, inputs, first, pairs[:10], d_first),
        lambda place: _call.backward(
            options, place, extents, inputs, first, _pair(d_o), d_last, pairs[:10], d_first
        ),
    )
    return outputs


def _backward_fake(d_o, d_states, d_open, d_keys, *args):
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
    arguments, state = [_ready(x) for x in tensors[:11]] + [None], tensors[11:]
    options = _options(codes, numbers)
    q = arguments[0]
    for name, x in zip(_call.STATE, state):
        if x is not None and (not x.is_contiguous() or x.data_ptr() % _ALIGNMENT):
            raise ValueError(f"state.{name}: expected a contiguous tensor at a multiple of {_ALIGNMENT} bytes")
    e = _extents(q, arguments[2], arguments[5], arguments[8], None, options.capacity)
    outputs = _step_outputs(q, arguments[2])
    results = [*(_pair(x) for x in outputs), _call.ABSENT]
    extents = (_DTYPES[q.dtype], list(e))
    pairs, states = [_pair(x) for x in arguments], [_pair(x) for x in state]
    _Run(q).with_workspace(
        lambda place: _call.step_workspace(options, place, extents, pairs, results),
        lambda place: _call.step(options, place, extents, pairs, states, results),
    )
    return outputs


def _step_fake(*args):
    return _step_outputs(args[0], args[2])


def _setup(ctx, inputs, output):
    *tensors, codes, numbers, _final_state = inputs
    # The backward replays the log; that it was given or computed is all one.
    tensors[10] = output[2]
    ctx.save_for_backward(*tensors)
    ctx.settings = (codes, numbers)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(output[i] for i in (1, 2, 3, 5, 6, 7) if output[i] is not None))


def _autograd(ctx, *d):
    codes, numbers = ctx.settings
    needs = ctx.needs_input_grad[:18]
    found = _gradients(torch.ops.dla.backward, list(ctx.saved_tensors), codes, numbers, needs, *d)
    return (*found, None, None, None)


def _gradients(
    backward, tensors, codes, numbers, needs, d_o, _drift, _events, _lam, d_states, _len, _tokens, _sums, d_open, d_keys
):
    """Gradients of the eighteen tensors, None where there is none or it is not needed."""
    wanted = [*needs[:10], needs[12], needs[16], needs[17]]
    wanted[9] = wanted[9] and numbers[2] != 0.0
    if d_o is None:
        q, v = tensors[0], tensors[2]
        d_o = q.new_zeros((q.shape[0], q.shape[1], v.shape[2], v.shape[3]))
    if codes[2] == 0:
        d_keys = None
    d = backward(d_o, d_states, d_open, d_keys, *tensors, codes, numbers, wanted)
    d = [x if want else None for x, want in zip(d, wanted)]
    return (*d[:10], None, None, d[10], None, None, None, d[11], d[12])


class Plan:
    """What a call of plain eager tensors needs beside their addresses, kept for calls of the same shapes and options."""

    def __init__(self, tensors, codes, numbers, final_state, want_log):
        q, v = tensors[0], tensors[2]
        self.codes, self.numbers = codes, numbers
        self.options = options = _options(codes, numbers)
        e = _extents(q, v, tensors[5], tensors[8], tensors[11], options.capacity)
        self.extents = (_DTYPES[q.dtype], list(e))
        self.present = tuple(i for i, x in enumerate(tensors) if x is not None)
        self.arguments = tuple(i for i in self.present if i < 12)
        self.resumed = tensors[12] is not None
        self.cuda, self.device = q.is_cuda, q.device
        per_token = e.per_token()
        shapes = [(*per_token, e.dv), per_token if want_log else None, per_token]
        shapes.append((*per_token, options.capacity) if options.routed and want_log else None)
        shapes += e.state(options.capacity) if final_state else [None] * 6
        if not options.routed:
            shapes[9] = None
        self.shapes = [
            (i, shape, _OUTPUT_DTYPES[i] or q.dtype) for i, shape in enumerate(shapes) if shape is not None
        ]
        self.final_state = final_state
        self.silent = tuple(i for i in (1, 2, 3, 5, 6, 7) if shapes[i] is not None)
        self.workspace = None

    def run(self, tensors):
        """`tensors`: those that are present, in order. Ten outputs, None where there is none, and the tensors read."""
        ready = [_ready(x) for x in tensors]
        pairs, first = [_call.ABSENT] * 12, [_call.ABSENT] * 6 if self.resumed else None
        for i, x in zip(self.present, ready):
            if i < 12:
                pairs[i] = (x.data_ptr() or 256, x.nbytes)
            else:
                first[i - 12] = (x.data_ptr() or 256, x.nbytes)
        outputs, results = [None] * 10, [_call.ABSENT] * 10
        empty, device = torch.empty, self.device
        for i, shape, dtype in self.shapes:
            x = outputs[i] = empty(shape, dtype=dtype, device=device)
            results[i] = (x.data_ptr() or 256, x.nbytes)
        last = results[4:] if self.final_state else None
        results = results[:4]
        if not self.cuda:
            _call.forward(self.options, _HOST, self.extents, pairs, first, results, last)
        elif torch._C._cuda_getDevice() == device.index:
            self._launch(pairs, first, results, last)
        else:
            # The library makes the GPU's context current; what was current is so again afterwards.
            with torch.cuda.device(device):
                self._launch(pairs, first, results, last)
        return outputs

    def _launch(self, pairs, first, results, last):
        index = self.device.index
        stream = _raw_stream(index) if _raw_stream else torch.cuda.current_stream(self.device).cuda_stream
        if self.workspace is None:
            place = (1, index, stream, _call.ABSENT)
            self.workspace = _call.forward_workspace(self.options, place, self.extents, pairs, results, last)
        # Free for what comes later on this stream: the allocator keeps to the stream's order.
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
        place = (1, index, stream, (workspace.data_ptr(), self.workspace))
        _call.forward(self.options, place, self.extents, pairs, first, results, last)


_HOST = (0, 0, 0, _call.ABSENT)


class Direct(torch.autograd.Function):
    """The operator for plain eager tensors, without the dispatcher: the same calls, sooner."""

    @staticmethod
    def forward(ctx, plan, *tensors):
        outputs = plan.run(tensors)
        ctx.plan = plan
        # The backward replays the log; that it was given or computed is all one.
        ctx.save_for_backward(outputs[2], *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(outputs[i] for i in plan.silent))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d):
        plan, (log, *saved) = ctx.plan, ctx.saved_tensors
        tensors, needs = [None] * 18, [False] * 18
        for i, x, need in zip(plan.present, saved, ctx.needs_input_grad[1:]):
            tensors[i], needs[i] = x, need
        tensors[10] = log
        backward = torch.ops.dla.backward if torch.compiler.is_compiling() else _backward
        found = _gradients(backward, tensors, plan.codes, plan.numbers, needs, *d)
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
    ("forward", _forward_op, _forward_fake),
    ("backward", _backward, _backward_fake),
    ("step", _step, _step_fake),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"dla::{_name}", _fake, lib=_library)
torch.library.register_autograd("dla::forward", _autograd, setup_context=_setup, lib=_library)

"""The extension on a GPU's memory, without a framework between: what PyTorch's and JAX's bindings call, given addresses; XLA's
handlers by way of an XLA of three functions. Judged by the CPU engine along the GPU's log.

Skipped where there is no GPU; `DLA_CUDA=require` fails instead. `scripts/emulated` runs it without one.
"""

import ctypes
import os

import numpy as np
import pytest
from conftest import Case, assert_close, cases

import dla
from dla import _call, _native

try:
    dla.check_cuda()
except RuntimeError as reason:
    if os.environ.get("DLA_CUDA") == "require":
        raise
    pytest.skip(f"no GPU: {reason}", allow_module_level=True)

GRADIENTS = ("q", "k", "v", "g", "beta", "lam", "slope", "bias", "logits")


class Device:
    """Memory of the first GPU, in its primary context."""

    def __init__(self):
        self.driver = ctypes.CDLL("libcuda.so.1")
        device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), device)
        self.call("cuCtxSetCurrent", self.context)
        self.held = []

    def call(self, name, *arguments):
        code = getattr(self.driver, name)(*arguments)
        assert code == 0, f"{name}: {code}"

    def room(self, nbytes):
        """Address and bytes of poisoned memory."""
        at = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(at), ctypes.c_size_t(max(nbytes, 1)))
        self.call("cuMemsetD8_v2", at, ctypes.c_ubyte(0xFF), ctypes.c_size_t(max(nbytes, 1)))
        self.held.append(at)
        return (at.value, nbytes)

    def put(self, x):
        if x is None:
            return _call.ABSENT
        x = np.ascontiguousarray(x)
        pair = self.room(x.nbytes)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(pair[0]), x.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(x.nbytes))
        return pair

    def get(self, pair, shape, dtype=np.float32):
        x = np.empty(shape, dtype)
        assert x.nbytes == pair[1]
        self.call("cuMemcpyDtoH_v2", x.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(pair[0]), ctypes.c_size_t(x.nbytes))
        return x

    def close(self):
        self.call("cuCtxSynchronize")
        for at in self.held:
            self.call("cuMemFree_v2", at)
        self.held = []


@pytest.fixture
def device():
    device = Device()
    yield device
    device.close()


class Call:
    """A case's arguments on the GPU, with its options and extents."""

    def __init__(self, device, case):
        a, o = case.arguments, case.options
        self.options = _call.options(
            a["q"].shape[-1], delta=a["beta"] is not None, routed=a["slope"] is not None, merge=o["merge"],
            slot_order=o["slot_order"], capacity=o["capacity"], qk_l2norm=o["use_qk_l2norm_in_kernel"], tau=o["tau"],
            scale=None, soft=None,
        )
        self.given = [a[name] for name in GRADIENTS] + [None, None, a["cu_seqlens"]]
        self.e = _call.extents([None if x is None else x.shape for x in self.given], None, self.options)
        self.extents = (_call.DTYPES["float32"], list(self.e))
        self.pairs = [device.put(x) for x in self.given]
        e, m = self.e, self.options.capacity
        per_token = e.per_token()
        self.results = [((*per_token, e.dv), np.float32), (per_token, np.float32), (per_token, np.uint8)]
        self.results.append(((*per_token, m), np.float32) if self.options.routed else None)
        self.state = list(zip(e.state(m), (np.float32, *(np.uint32,) * 3, np.float32, np.float32)))
        if not self.options.routed:
            self.state[5] = None


def rooms(device, shapes):
    return [_call.ABSENT if x is None else device.room(int(np.prod(x[0])) * np.dtype(x[1]).itemsize) for x in shapes]


def place(device, query, *arguments):
    """The default stream of the first GPU, with as much workspace as is asked for."""
    options, extents, rest = arguments[0], arguments[1], arguments[2:]
    return (1, 0, 0, device.room(query(options, (1, 0, 0, _call.ABSENT), extents, *rest)))


def judge(case, log, o, gradients):
    """By the CPU engine, along the same log."""
    positional, keywords = case.call()
    expected = dla.forward(*positional, **keywords, events=log)
    assert_close("o", o, expected.o, 1e-3)
    expected = dla.backward(case.do, log, *positional, **keywords)
    for name, x in gradients.items():
        assert_close(f"d{name}", x, getattr(expected, name), 1e-3)


@pytest.mark.parametrize("kind", cases())
def test_addresses(kind, device):
    case = Case(51, **kind, time=70)
    c = Call(device, case)
    results, last = rooms(device, c.results), rooms(device, c.state)
    where = place(device, _call.forward_workspace, c.options, c.extents, c.pairs, results, last)
    _call.forward(c.options, where, c.extents, c.pairs, None, results, last)
    o, log = device.get(results[0], *c.results[0]), device.get(results[2], *c.results[2])
    c.pairs[10] = results[2]
    shapes = [None if x is None else (x.shape, x.dtype) for x in c.given[:9]]
    for kept in ([_call.ABSENT] * 2, [results[1], results[3]]):
        wanted = [*rooms(device, shapes), _call.ABSENT]
        rest = (None, device.put(case.do), None, kept, wanted, None)
        where = place(device, _call.backward_workspace, c.options, c.extents, c.pairs, *rest)
        _call.backward(c.options, where, c.extents, c.pairs, *rest)
        found = {n: device.get(p, x.shape) for n, p, x in zip(GRADIENTS, wanted, c.given) if x is not None}
        judge(case, log, o, found)


def test_steps(device):
    case = Case(52, delta=True, routed=True, time=6)
    positional, keywords = case.call()
    state = dla.empty_state(2, *case.shape, routed=True)
    arrays = [device.put(x) for x in state]
    for t in range(6):
        token = [np.ascontiguousarray(x[:, t : t + 1]) if x is not None else None for x in positional]
        slope, bias, logits = keywords["route"]
        cut = Case(52, delta=True, routed=True, time=1)
        cut.arguments |= dict(zip(GRADIENTS, token))
        cut.arguments |= dict(slope=slope, bias=bias, logits=np.ascontiguousarray(logits[:, t : t + 1]))
        c = Call(device, cut)
        results = rooms(device, c.results)
        where = place(device, _call.step_workspace, c.options, c.extents, c.pairs, results)
        _call.step(c.options, where, c.extents, c.pairs, arrays, results)
        log = device.get(results[2], *c.results[2])
        expected, _ = dla.step(*token, state=state, events=log, **dict(keywords, route=(slope, bias, cut.arguments["logits"])))
        assert_close("o", device.get(results[0], *c.results[0]), expected, 1e-3)
    for name, pair, x in zip(_call.STATE, arrays, state):
        found = device.get(pair, x.shape, x.dtype)
        if name == "drift":
            # Sums of drifts, each rounded to 2^-12.
            assert np.abs(found.astype(np.int64) - x.astype(np.int64)).max() <= 6 * 10
        else:
            assert_close(name, found, x, 1e-3)


def test_errors_name_the_argument(device):
    case = Case(53, delta=False, routed=False, time=5)
    c = Call(device, case)
    results = rooms(device, c.results)
    where = place(device, _call.forward_workspace, c.options, c.extents, c.pairs, results, None)
    pairs = list(c.pairs)
    pairs[1] = (case.arguments["k"].ctypes.data, case.arguments["k"].nbytes)
    with pytest.raises(ValueError, match="k: "):
        _call.forward(c.options, where, c.extents, pairs, None, results, None)
    small = (*where[:3], (where[3][0], where[3][1] - 1))
    with pytest.raises(ValueError, match="workspace: "):
        _call.forward(c.options, small, c.extents, c.pairs, None, results, None)
    c.pairs[10] = results[2]
    with pytest.raises(ValueError, match="dq: "):
        _call.backward(c.options, where, c.extents, c.pairs, None, device.put(case.do), None, [_call.ABSENT] * 2,
                       [(c.pairs[0][0], 4)] + [_call.ABSENT] * 9, None)


# XLA's FFI (xla/ffi/api/c_api.h), as far as a handler sees it.
P, I, Z = ctypes.c_void_p, ctypes.c_int32, ctypes.c_size_t


def struct(name, *fields):
    return type(name, (ctypes.Structure,), {"_fields_": [("size", Z), ("extension", P), *fields]})


Version = struct("Version", ("major", I), ("minor", I))
Get = struct("Get", ("context", P), ("found", P))
Ordinal = struct("Ordinal", ("context", P), ("ordinal", I))
Allocate = struct("Allocate", ("context", P), ("bytes", Z), ("alignment", Z), ("data", P))
Error = struct("Error", ("message", ctypes.c_char_p), ("code", I))
Function = ctypes.CFUNCTYPE(P, P)
Api = struct(
    "Api", ("version", Version), ("internal", P), ("error_create", Function), ("_1", P * 3), ("stream_get", Function),
    ("_2", P * 4), ("allocate", Function), ("_3", P * 7), ("ordinal_get", Function),
)
Arrays = struct("Arrays", ("count", ctypes.c_int64), ("types", P), ("items", P))
Attributes = struct("Attributes", ("count", ctypes.c_int64), ("types", P), ("names", P), ("items", P))
XlaBuffer = struct("XlaBuffer", ("dtype", I), ("data", P), ("rank", ctypes.c_int64), ("dims", P))
Frame = struct(
    "Frame", ("api", P), ("context", P), ("stage", I), ("arguments", Arrays), ("results", Arrays), ("attributes", Attributes)
)


class Span(ctypes.Structure):
    _fields_ = [("at", ctypes.c_char_p), ("len", Z)]


class AttributeArray(ctypes.Structure):
    _fields_ = [("dtype", I), ("count", Z), ("data", P)]


XLA_DTYPES = {"float32": 11, "uint8": 6, "uint32": 8, "int64": 5}


class Xla:
    """Gives a stream, an ordinal and memory, and keeps what a handler says is wrong."""

    def __init__(self, device):
        self.told, self.asked, self.device = None, [], device
        self.functions = [Function(f) for f in (self.error, self.stream, self.allocate, self.ordinal)]
        error, stream, allocate, ordinal = self.functions
        version = Version(ctypes.sizeof(Version), None, 0, 3)
        self.api = Api(ctypes.sizeof(Api), None, version, None, error, (P * 3)(), stream, (P * 4)(), allocate, (P * 7)(), ordinal)

    def error(self, at):
        self.told = Error.from_address(at).message.decode()
        return 1

    def stream(self, at):
        Get.from_address(at).found = None
        return None

    def ordinal(self, at):
        Ordinal.from_address(at).ordinal = 0
        return None

    def allocate(self, at):
        request = Allocate.from_address(at)
        # As XLA: no more than 16 is to be had, and no more is given.
        if request.alignment > 16:
            return 1
        address, _ = self.device.room(request.bytes + 16)
        self.asked.append(request.bytes)
        request.data = address + 16 if address % 256 == 0 else address
        return None

    def run(self, handler, options, extents, operands, results):
        """`operands` and `results`: pairs with shape and dtype, or None."""
        keep = []

        def buffers(given):
            items = []
            for x in (x for x in given if x is not None):
                (address, _), shape, dtype = x
                dims = (ctypes.c_int64 * len(shape))(*shape)
                buffer = XlaBuffer(
                    ctypes.sizeof(XlaBuffer), None, XLA_DTYPES[np.dtype(dtype).name], address, len(shape), ctypes.addressof(dims)
                )
                keep.extend((dims, buffer))
                items.append(ctypes.addressof(buffer))
            array = (P * len(items))(*items)
            keep.append(array)
            return Arrays(ctypes.sizeof(Arrays), None, len(items), None, ctypes.addressof(array))

        mask = lambda given: sum(1 << i for i, x in enumerate(given) if x is not None)  # noqa: E731
        codes = np.asarray([*options.codes, extents[0], *extents[1], mask(operands), mask(results)], np.int64)
        numbers = np.asarray(options.numbers, np.float32)
        names, items, types = (P * 2)(), (P * 2)(), (I * 2)(1, 1)
        for i, (name, x, dtype) in enumerate(((b"codes", codes, 5), (b"numbers", numbers, 11))):
            span, array = Span(name, len(name)), AttributeArray(dtype, x.size, x.ctypes.data)
            keep.extend((span, array))
            names[i], items[i] = ctypes.addressof(span), ctypes.addressof(array)
        attributes = Attributes(
            ctypes.sizeof(Attributes), None, 2, ctypes.addressof(types), ctypes.addressof(names), ctypes.addressof(items)
        )
        frame = Frame(
            ctypes.sizeof(Frame), None, ctypes.addressof(self.api), None, 3, buffers(operands), buffers(results), attributes
        )
        self.told = None
        Function(dict(_native.xla_handlers())[handler])(ctypes.addressof(frame))
        return self.told


@pytest.mark.parametrize("kind", cases()[1:3])
def test_handlers_of_xla(kind, device):
    case = Case(54, **kind, time=70)
    c, xla = Call(device, case), Xla(device)
    with_shape = lambda pairs, shapes: [None if x is None else (p, *x) for p, x in zip(pairs, shapes)]  # noqa: E731
    of = [None if x is None else (x.shape, x.dtype) for x in c.given]
    operands = with_shape(c.pairs, of) + [None] * 6
    shapes = c.results + c.state
    results = rooms(device, shapes)
    assert xla.run("forward_cuda", c.options, c.extents, operands, with_shape(results, shapes)) is None
    o, log = device.get(results[0], *c.results[0]), device.get(results[2], *c.results[2])
    operands[10] = (results[2], *c.results[2])
    upstream = [(device.put(case.do), *c.results[0]), None, None, None, None]
    upstream.append(None if c.results[3] is None else (results[3], *c.results[3]))
    wanted = rooms(device, of[:9])
    assert xla.run("backward_cuda", c.options, c.extents, operands + upstream, with_shape(wanted, of[:9]) + [None] * 4) is None
    judge(case, log, o, {n: device.get(p, x.shape) for n, p, x in zip(GRADIENTS, wanted, c.given) if x is not None})
    assert len(xla.asked) == 2
    # One that is wrong is told with its name.
    operands[1] = (c.pairs[1], (1, *of[1][0][1:3], 8), np.float32)
    assert "k: " in xla.run("forward_cuda", c.options, c.extents, operands[:10] + [None] + operands[11:], with_shape(results, shapes))


@pytest.fixture
def emulated_torch(device, monkeypatch):
    """PyTorch's plans take tensors of the emulated card for tensors of a GPU: its memory is the host's."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if "emulated" not in os.environ.get("LD_LIBRARY_PATH", ""):
        pytest.skip("not the emulated driver")
    import dla.torch
    from dla.torch import _op

    def memory(shape, dtype):
        count = int(np.prod(shape))
        address, _ = device.room(count * dtype.itemsize)
        raw = (ctypes.c_ubyte * max(count * dtype.itemsize, 1)).from_address(address)
        return torch.frombuffer(raw, dtype=dtype, count=count).view(shape) if count else torch.zeros(shape, dtype=dtype)

    def moved(x):
        x = torch.as_tensor(x)
        y = memory(tuple(x.shape), x.dtype)
        # Nothing of the card's is read or written by the host while work is pending.
        device.call("cuCtxSynchronize")
        y.copy_(x)
        return y

    monkeypatch.setattr(_op, "_site", lambda x: (x.device, 0, True))
    monkeypatch.setattr(_op, "_maker", lambda dtype, device: lambda shape: memory((shape,) if isinstance(shape, int) else shape, dtype))
    monkeypatch.setattr(_op, "_tau", lambda number, heads, device, may_make: moved(torch.full((heads,), number)))
    monkeypatch.setattr(_op, "_raw_stream", lambda index: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0)
    yield torch, dla.torch, moved
    _op._plans.clear()


@pytest.mark.parametrize("kind", cases())
def test_plans_of_pytorch(kind, device, emulated_torch):
    torch, D, moved = emulated_torch
    case = Case(55, **kind, time=70)
    given = {n: moved(case.arguments[n]).requires_grad_() for n in GRADIENTS if case.arguments[n] is not None}
    a = dict.fromkeys(GRADIENTS) | given
    route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
    offsets = case.arguments["cu_seqlens"]
    named = dict(case.options, route=route, cu_seqlens=None if offsets is None else moved(offsets))
    positional = [a[name] for name in GRADIENTS[:6]]
    for final in (False, True):
        o, state, *log = D.dla(*positional, **named, output_final_state=final, return_log=final)
        assert (state is None) == (not final)
        d = moved(case.do)
        found = torch.autograd.grad(o, list(given.values()), d)
        device.call("cuCtxSynchronize")
        if final:
            judge(case, log[0].events.numpy(), o.detach().numpy(), {n: x.numpy() for n, x in zip(given, found)})
        else:
            # Of one argument alone it is the same.
            o, _ = D.dla(*positional, **named)
            alone = torch.autograd.grad(o, given["k"], d)[0]
            device.call("cuCtxSynchronize")
            assert (alone == found[1]).all()
    with torch.no_grad():
        o, _, log = D.dla(*positional, **named, return_log=True)
        first = D.empty_state(case.sequences, *case.shape, routed=route is not None)
        first = D.State(*(x if x is None else moved(x) for x in first))
        if offsets is None:
            token = [x if x is None else moved(x[:, :1].detach()) for x in positional]
            at = None if route is None else (*(moved(x.detach()) for x in route[:2]), moved(route[2][:, :1].detach()))
            y, same = D.step(*token, state=first, route=at, **case.options)
            device.call("cuCtxSynchronize")
            assert same is first and (first.len.numpy() == 1).all()
            assert_close("o", y.numpy(), o[:, :1].numpy(), 1e-3)


@pytest.mark.parametrize("delta,routed,states", [(False, False, "bfloat16"), (True, True, "float32")])
def test_entries_of_pytorch(delta, routed, states, device, emulated_torch):
    torch, D, moved = emulated_torch
    case = Case(56, delta=delta, routed=routed, time=21)
    heads, capacity, dk, dv = case.shape
    held = D.Entries(4, value_heads=heads, dk=dk, dv=dv, capacity=capacity, delta=delta, routed=routed, states=states)
    taken = [held.take() for _ in range(4)]
    mine, options = [taken[2], taken[0]], {n: x for n, x in case.options.items() if n != "capacity"}

    def run(function, begin, end, entries):
        given = {n: x for n in GRADIENTS if (x := case.arguments[n]) is not None}
        given = {n: moved(x if n in ("slope", "bias") else x[:, begin:end]) for n, x in given.items()}
        a = dict.fromkeys(GRADIENTS) | given
        route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
        o = function(*(a[n] for n in GRADIENTS[:6]), route=route, entries=entries, **options)
        device.call("cuCtxSynchronize")
        return o.numpy()

    at = [0, 9, 10, 18, 19, 21]
    o = [run(held.step if begin else held.prefill, begin, end, mine) for begin, end in zip(at, at[1:])]
    # The decisions of the card, which are those of its forward.
    positional, keywords = case.call(moved)
    _, last, log = D.dla(*positional, **keywords, output_final_state=True, return_log=True)
    device.call("cuCtxSynchronize")
    positional, keywords = case.call()
    expected = dla.forward(*positional, **keywords, events=log.events.numpy())
    bound = 1e-3 if states == "float32" else 5e-3
    assert_close("o", np.concatenate(o, 1), expected.o, bound)
    state = held.export(mine)
    assert (state.len.numpy() == last.len.numpy()).all() and (state.tokens.numpy() == last.tokens.numpy()).all()
    assert_close("states", state.states.numpy(), expected.state.states, bound)
    other = [taken[1], taken[3]]
    held.import_(other, D.State(*(x if x is None else moved(x) for x in state)))
    again = held.export(other)
    assert (again.tokens.numpy() == state.tokens.numpy()).all()
    # bf16 and 8 bits beside it.
    assert_close("states", again.states.numpy(), state.states.numpy(), 0 if states == "float32" else 1e-4)
    held.set_rows(2, [taken[0]])
    with pytest.raises(ValueError, match="entries: .*no row before"):
        held.set_rows(2, [taken[0]] * 2)
    with pytest.raises(ValueError, match="entries: "):
        run(held.step, 0, 1, [taken[0], 9])
    assert (held.export(mine).states.numpy() == state.states.numpy()).all()


def test_entries_of_pytorch_prefill_packed_sequences(device, emulated_torch):
    torch, D, moved = emulated_torch
    case = Case(57, delta=True, routed=True, time=30, packed=True)
    heads, capacity, dk, dv = case.shape
    held = D.Entries(3, value_heads=heads, dk=dk, dv=dv, capacity=capacity, delta=True, routed=True)
    mine = [held.take() for _ in range(3)][::-1]
    positional, keywords = case.call(moved)
    whole, last = D.dla(*positional, **keywords, output_final_state=True)
    keywords.pop("capacity")
    o = held.prefill(*positional, **keywords, entries=mine)
    device.call("cuCtxSynchronize")
    assert (o.numpy() == whole.numpy()).all()
    state = held.export(mine)
    assert (state.len.numpy() == last.len.numpy()).all() and (state.states.numpy() == last.states.numpy()).all()
    # One too few, and nothing is written.
    with pytest.raises(ValueError, match="entries: .*one entry a row, 3"):
        held.prefill(*positional, **keywords, entries=mine[:2])
    assert (held.export(mine).states.numpy() == state.states.numpy()).all()

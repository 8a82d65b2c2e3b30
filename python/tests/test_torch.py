"""PyTorch against the f64 reference on the CPU and, where there is one, on a GPU; compile, graphs, streams, the layer.

`DLA_CUDA=require`: without a GPU that can be used nothing passes.
"""

import os
import time

import numpy as np
import pytest
from conftest import Case, assert_close, cases, error
from test_numpy import GRADIENTS, SPELLED

torch = pytest.importorskip("torch", reason="torch is not installed")
import torch.utils.checkpoint  # noqa: E402

import dla.torch as D  # noqa: E402
from dla.torch import _functional, _op  # noqa: E402

DEVICES = ["cpu"]
REQUIRED = os.environ.get("DLA_CUDA") == "require"
if torch.cuda.is_available() or REQUIRED:
    try:
        import dla

        torch.zeros(1, device="cuda")
        dla.check_cuda()
        DEVICES.append("cuda")
    except RuntimeError as reason:
        if REQUIRED:
            raise
        print(f"no tests on the GPU: {reason}")
cuda = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU, or no kernels in this build")
device = pytest.mark.parametrize("device", DEVICES)


def tensors(case, device, dtype=torch.float32, grad=False):
    """Arguments that have gradients, by name."""
    found = {}
    for name in GRADIENTS:
        x = case.arguments[name]
        if x is not None:
            x = torch.tensor(x, device=device, dtype=dtype if name in ("q", "k", "v") else None)
            found[name] = x.requires_grad_() if grad else x
    return found


def call(case, given, function=D.dla, **named):
    a = dict.fromkeys(GRADIENTS) | given
    route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
    offsets = case.arguments["cu_seqlens"]
    if offsets is not None:
        named["cu_seqlens"] = torch.tensor(offsets, device=given["q"].device)
    return function(*(a[name] for name in GRADIENTS[:6]), route=route, **{**case.options, **named})


@device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", cases())
def test_forward_and_every_gradient(kind, dtype, device, reference):
    case = Case(21, **kind)
    given = tensors(case, device, dtype, grad=True)
    for name in ("q", "k", "v"):
        case.arguments[name] = given[name].detach().float().cpu().numpy()
    o, state, log = call(case, given, output_final_state=True, return_log=True)
    assert o.dtype == dtype and o.device.type == device
    do = torch.tensor(case.do, device=device, dtype=dtype)
    expected = reference(case, log.events.cpu(), do.float().cpu().numpy())
    # On the CPU half a unit in the last place of bf16; on a GPU what its products of bf16 planes give.
    bound = 5e-3 if dtype == torch.bfloat16 else (1e-5 if device == "cpu" else 1e-4)
    assert_close("o", o.detach().float().cpu(), expected["o"], bound)
    states = 1e-5 if device == "cpu" else bound
    assert_close("states", state.states.detach().cpu(), expected["cache_states"], states)
    assert (state.tokens.cpu().numpy() == expected["cache_tokens"]).all()
    found = torch.autograd.grad((o * do).sum(), list(given.values()))
    for (name, x), gradient in zip(given.items(), found):
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        most = bound if dtype == torch.bfloat16 else 2 * bound
        assert_close(f"d{name}", gradient.float().cpu(), expected[SPELLED.get(name, f"d{name}")], most)


@device
def test_gradients_of_state_and_tau(device):
    case = Case(22, delta=True, routed=True, time=40)
    given = tensors(case, device, grad=True)
    first = D.empty_state(2, *case.shape, routed=True, device=device)
    first = D.State(first.states.requires_grad_(), *first[1:4], first.open.requires_grad_(), first.keys.requires_grad_())
    tau = torch.tensor(0.7, device=device, requires_grad=True)
    o, state = call(case, given, initial_state=first, output_final_state=True, tau=tau, soft=(0.1, True))
    loss = o.sum() + state.states.square().sum() + state.keys.sum()
    of = [tau, first.states, first.open, first.keys, given["k"]]
    found = torch.autograd.grad(loss, of, retain_graph=True)
    assert found[0].shape == () and found[0].abs() > 0
    assert all(x.isfinite().all() for x in found)
    # Of one alone, and with nothing kept of the forward, it is the same.
    assert (torch.autograd.grad(loss, of[1:2])[0] == found[1]).all()
    detached = {name: x.detach().cpu() for name, x in given.items()}
    if device == "cuda":
        # By the CPU, along the same log.
        log = call(case, given, initial_state=first, tau=tau, return_log=True)[2].events.cpu()
        mine = {name: x.requires_grad_() for name, x in detached.items()}
        start = D.State(*(x.detach().cpu() for x in first))
        start = D.State(start.states.requires_grad_(), *start[1:4], start.open.requires_grad_(), start.keys.requires_grad_())
        at = torch.tensor(0.7, requires_grad=True)
        o, state = call(case, mine, initial_state=start, output_final_state=True, tau=at, soft=(0.1, True), events=log)
        loss = o.sum() + state.states.square().sum() + state.keys.sum()
        expected = torch.autograd.grad(loss, [at, start.states, start.open, start.keys, mine["k"]])
        for name, x, y in zip(("tau", "states", "open", "keys", "k"), found, expected):
            assert_close(f"d{name}", x.cpu(), y, 1e-3)


@device
@pytest.mark.parametrize("routed", [False, True])
def test_opcheck(routed, device):
    case = Case(23, delta=True, routed=routed, time=20)
    for grad in (False, True):
        given = tensors(case, device, grad=grad)
        a = dict.fromkeys(GRADIENTS) | given
        route = (a["slope"], a["bias"], a["logits"]) if routed else None
        arguments, number = _functional._convert(*(a[name] for name in GRADIENTS[:6]), route, 0.6, None, None, None)
        codes, numbers = _functional._check(
            arguments, number, merge="mass", slot_order="newest_first", capacity=6, qk_l2norm=True, scale=None, soft=None
        )
        torch.library.opcheck(torch.ops.dla.forward, (*arguments, codes, numbers, True))
    detached = [x if x is None else x.detach() for x in arguments]
    o, drift, log, lam, *_ = torch.ops.dla.forward(*detached, codes, numbers, False)
    detached[10] = log
    wanted = [x is not None for x in detached[:10]] + [False] * 3
    for kept in ((None, None), (drift, lam if routed else None)):
        torch.library.opcheck(torch.ops.dla.backward, (o, None, None, None, *kept, *detached, codes, numbers, wanted))
    state = D.empty_state(2, *case.shape, routed=routed, device=device)
    token = [x if x is None or x.ndim < 2 else x[:, :1].contiguous() for x in detached[:9]] + [None] * 2
    torch.library.opcheck(torch.ops.dla.step, (*token, *state, codes, numbers))


@device
@pytest.mark.parametrize("routed", [False, True])
def test_compile_is_eager(routed, device):
    case = Case(24, delta=True, routed=routed)
    given = tensors(case, device, grad=True)
    backend = "aot_eager" if device == "cpu" else "inductor"
    torch._dynamo.reset()

    def function(given):
        o, state = call(case, given, output_final_state=True)
        return o, state.states

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    expected, found = function(given), compiled(given)
    assert all((x == y).all() for x, y in zip(expected, found))
    of = [given[name] for name in ("q", "k", "v", "g", *(["slope"] if routed else ["lam"]))]
    for x, y in zip(*(torch.autograd.grad(o.square().sum() + s.sum(), of) for o, s in (expected, found))):
        assert_close("gradient", y.cpu(), x.cpu(), 1e-6)


@device
def test_strides_and_offsets_are_taken(device):
    case = Case(25, delta=False, routed=False)
    given = tensors(case, device)
    o, _ = call(case, given)
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in given.items()}
    assert not strided["q"].is_contiguous()
    assert (call(case, strided)[0] == o).all()
    # Contiguous, and begins between two words.
    shifted = {name: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for name, x in given.items()}
    assert (call(case, shifted)[0] == o).all()


@device
def test_autocast(device):
    case = Case(26, delta=True, routed=True)
    given = tensors(case, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        o, _ = call(case, given)
    expected, _ = call(case, {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in given.items()})
    assert o.dtype == torch.bfloat16 and (o == expected).all()


def steps(case, given, device):
    state = D.empty_state(case.sequences, *case.shape, routed="slope" in given, device=device)
    outputs = []
    for t in range(given["q"].shape[1]):
        token = {n: x if n in ("slope", "bias") else x[:, t : t + 1] for n, x in given.items()}
        o, same = call(case, token, D.step, state=state)
        assert same is state
        outputs.append(o)
    return torch.cat(outputs, 1), state


@device
def test_steps_are_one_call(device):
    case = Case(27, delta=True, routed=True, time=30)
    given = tensors(case, device)
    whole, last = call(case, given, output_final_state=True)
    o, state = steps(case, given, device)
    bound = 1e-4 if device == "cpu" else 1e-3
    assert_close("o", o.cpu(), whole.cpu(), bound)
    assert_close("states", state.states.cpu(), last.states.cpu(), bound)


@device
def test_a_split_over_heads_is_the_same_bits(device):
    case = Case(28, delta=False, routed=False, time=200)
    given = tensors(case, device)
    whole, _ = call(case, given)
    for head in range(2):
        own, group = slice(head, head + 1), slice(2 * head, 2 * head + 2)
        part = {n: x[:, :, own] if n in ("q", "k") else x[:, :, group] for n, x in given.items()}
        assert (call(case, part)[0] == whole[:, :, group]).all()


@pytest.mark.parametrize("path", ["plain", "dispatched"])
def test_errors_name_the_argument(path, monkeypatch):
    if path == "dispatched":
        monkeypatch.setattr(_op, "plainly_described", lambda tensors: None)
    case = Case(29, delta=False, routed=False, time=5)
    given = tensors(case, "cpu")

    def refused(kind, text, change=None, **named):
        with pytest.raises(kind, match=text):
            call(case, {**given, **(change or {})}, **named)

    refused(TypeError, "q: expected a tensor", {"q": [1.0]})
    for name in ("k", "v", "g", "lam"):
        refused(TypeError, f"{name}: expected a tensor, got list", {name: [1.0]})
    refused(TypeError, "tau: expected a number", tau="0.6")
    refused(TypeError, "scale: expected a number", scale="1")
    refused(TypeError, "merge: expected a string", merge=["mass"])
    refused(TypeError, "soft: expected", soft=0.1)
    refused(TypeError, "initial_state: expected a State", initial_state=given["q"])
    refused(TypeError, "cu_seqlens: expected a tensor, got list", cu_seqlens=[0, 5])
    refused(TypeError, "events: expected a tensor, got list", events=[0])
    refused(TypeError, "q: expected dtype", {"q": given["q"].double()})
    refused(TypeError, "k: expected dtype torch.float32, as q", {"k": given["k"].half()})
    refused(ValueError, r"v: expected shape \[B,T,HV,dv\]", {"v": given["v"][:, :3]})
    refused(ValueError, "g: expected at most 0 everywhere", {"g": -given["g"]})
    refused(ValueError, "lam: missing", {"lam": None})
    refused(ValueError, "lam: expected a tensor of cpu, as q", {"lam": given["lam"].to("meta")})
    refused(ValueError, "capacity: expected 1 to 64", capacity=0)
    refused(ValueError, "slot_order: expected one of", slot_order="random")
    with pytest.raises(TypeError, match="route: expected"):
        D.dla(given["q"], given["k"], given["v"], route=given["q"])
    with pytest.raises(TypeError, match="state: expected a State"):
        D.step(*(given[n][:, :1] for n in ("q", "k", "v")), lam=given["lam"][:, :1], state=None)
    refused(TypeError, "cu_seqlens: expected dtype", cu_seqlens=torch.tensor([0.0, 5.0]))
    refused(TypeError, "events: expected dtype torch.uint8", events=torch.zeros(2, 5, 4))
    refused(TypeError, "state.len: expected dtype torch.int32",
            initial_state=D.empty_state(2, *case.shape)._replace(len=torch.zeros(2, 4)))


@device
@pytest.mark.parametrize("kind", cases())
def test_the_eager_path_is_the_operators(kind, device, monkeypatch):
    """What plain eager tensors take and what goes by the dispatcher: the same bits, gradients and states."""
    case = Case(41, **kind, time=70)
    found = {}
    for path in ("plain", "dispatched"):
        if path == "dispatched":
            monkeypatch.setattr(_op, "plainly_described", lambda tensors: None)
        given = tensors(case, device, grad=True)
        o, state, log = call(case, given, output_final_state=True, return_log=True)
        do = torch.tensor(case.do, device=device)
        loss = (o * do).sum() + state.states.sum()
        gradients = torch.autograd.grad(loss, list(given.values()), retain_graph=True)
        alone = torch.autograd.grad(loss, given["k"])
        # Without gradients, and without a log, nothing of it changes; nor on a second call, whose plan is known.
        with torch.no_grad():
            bare = [call(case, given)[0] for _ in range(2)]
        assert not bare[0].requires_grad and o.requires_grad and state.states.requires_grad
        assert not log.events.requires_grad and not state.len.requires_grad
        found[path] = [o, *(x for x in (*state, *log) if x is not None), *gradients, *alone, *bare]
        if not kind["packed"]:
            detached = {name: x.detach() for name, x in given.items()}
            found[path] += [x for x in (steps(case, detached, device)[0], *steps(case, detached, device)[1]) if x is not None]
    assert len(found["plain"]) == len(found["dispatched"])
    for i, (x, y) in enumerate(zip(found["plain"], found["dispatched"])):
        assert x.dtype == y.dtype and x.shape == y.shape and (x == y).all(), f"result {i}"
    assert all((x == found["plain"][0]).all() for x in bare)


def test_a_known_plan_is_of_the_same_call_alone():
    """A call that was good once is checked again where anything that a plan depends on is another."""
    case = Case(42, delta=False, routed=False, time=5)
    given = tensors(case, "cpu")
    call(case, given)
    for change, text in (
        ({"k": given["k"].half()}, "k: expected dtype"), ({"lam": given["lam"][:, :4]}, "lam: expected shape"),
        ({"g": given["g"].to("meta")}, "g: expected a tensor of cpu"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call(case, {**given, **change})
    assert (call(case, given, tau=np.float32(0.6))[0] == call(case, given, tau=float(np.float32(0.6)))[0]).all()
    # Whether it wants a gradient is no check's affair, and yet another plan.
    o, _ = call(case, {**given, "v": given["v"].clone().requires_grad_()})
    assert o.requires_grad and not call(case, given)[0].requires_grad
    with torch.inference_mode():
        first = call(case, given)[0]
    assert (first == o).all() and (call(case, given)[0] == o).all()


def test_tensors_that_outlived_their_transform():
    case = Case(43, delta=False, routed=False, time=5)
    given = tensors(case, "cpu")
    expected, kept = call(case, given)[0], []

    def keep(x):
        kept.append(x * 1)
        return kept[0].sum()

    torch.func.grad(keep)(given["v"])
    assert (call(case, {**given, "v": kept[0]})[0] == expected).all()
    q = given["q"].clone().requires_grad_()
    found = [torch.autograd.grad(call(case, {**given, "q": q, "v": v})[0].sum(), q)[0] for v in (kept[0], given["v"])]
    assert (found[0] == found[1]).all()


@device
def test_checkpointing_and_hooks_of_saved_tensors(device):
    """What the backward takes may come back as other tensors, laid out otherwise."""
    case = Case(45, delta=True, routed=True, time=40)
    given = tensors(case, device, grad=True)
    expected = torch.autograd.grad(call(case, given)[0].square().sum(), list(given.values()))

    def work(*values):
        return call(case, dict(zip(given, values)))[0]

    o = torch.utils.checkpoint.checkpoint(work, *given.values(), use_reentrant=False)
    found = torch.autograd.grad(o.square().sum(), list(given.values()))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.cpu(), lambda x: torch.stack([x, x], -1)[..., 0].to(device)):
        o = work(*given.values())
    hooked = torch.autograd.grad(o.square().sum(), list(given.values()))
    for name, x, y, z in zip(given, expected, found, hooked):
        assert (x == y).all() and (x == z).all(), f"d{name}"


def test_forward_mode_is_refused():
    case = Case(46, delta=False, routed=False, time=5)
    given = tensors(case, "cpu")
    with torch.autograd.forward_ad.dual_level():
        v = torch.autograd.forward_ad.make_dual(given["v"], torch.ones_like(given["v"]))
        with pytest.raises(NotImplementedError, match="v: not expected with a tangent"):
            call(case, {**given, "v": v})


def test_twice_is_refused():
    case = Case(44, delta=False, routed=False, time=5)
    given = tensors(case, "cpu", grad=True)
    (d,) = torch.autograd.grad(call(case, given)[0].square().sum(), given["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d.sum().backward()


STYLES = [("delta", "routed_logits", "mass"), ("mamba2", "given", "density"), ("delta", "routed", "mass")]


def layer(style, read, merge, device, dtype=torch.float32, **named):
    torch.manual_seed(0)
    named = {"num_v_heads": 4, "capacity": 6, **named}
    return D.DynamicLinearAttention(
        64, expand_v=1.5, head_dim=16, num_heads=2, layer_idx=3, style=style, read=read, merge=merge, **named
    ).to(device, dtype)


@device
@pytest.mark.parametrize("style, read, merge", STYLES)
def test_layer_caches_packs_and_pads(style, read, merge, device):
    module = layer(style, read, merge, device)
    x = torch.randn(2, 70, 64, device=device)
    bound = 1e-4 if device == "cpu" else 1e-2
    with torch.no_grad():
        whole, _, _ = module(x)
        assert whole.shape == x.shape
        # In pieces, then token by token.
        o, _, past = module(x[:, :50], use_cache=True)
        outputs = [o]
        for t in range(50, 70):
            o, _, past = module(x[:, t : t + 1], past_key_values=past, use_cache=True)
            outputs.append(o)
        assert list(past) == [3]
        assert_close("pieces", torch.cat(outputs, 1).cpu(), whole.cpu(), bound)
        # Packed: the two sequences one after the other.
        packed, _, _ = module(x.flatten(0, 1)[None], cu_seqlens=torch.tensor([0, 70, 140], device=device))
        assert_close("packed", packed.view_as(whole).cpu(), whole.cpu(), bound)
        # Padded on the left.
        mask = torch.ones(2, 90, device=device)
        mask[:, :20] = 0
        padded, _, _ = module(torch.cat([torch.randn(2, 20, 64, device=device), x], 1), attention_mask=mask)
        assert_close("padded", padded[:, 20:].cpu(), whole.cpu(), bound)
        assert (padded[:, :20] == 0).all()
    with pytest.raises(ValueError, match="hidden_states: expected"):
        module(x[..., :10])


@device
def test_training_through_the_layer(device):
    """200 steps: the second half of every sequence repeats the first, and the layer learns to copy."""
    torch.manual_seed(1)
    embedding = torch.nn.Embedding(16, 64).to(device)
    module = layer("delta", "routed", "mass", device)
    head = torch.nn.Linear(64, 16).to(device)
    parameters = [*embedding.parameters(), *module.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=5e-3)
    losses = []
    for _ in range(200):
        tokens = torch.randint(16, (16, 6), device=device).repeat(1, 2)
        optimiser.zero_grad()
        o, _, _ = module(embedding(tokens[:, :-1]))
        loss = torch.nn.functional.cross_entropy(head(o)[:, 5:].flatten(0, 1), tokens[:, 6:].flatten())
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    print(f"loss {np.mean(losses[:10]):.3f} to {np.mean(losses[-10:]):.3f}")
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < 0.3 * np.mean(losses[:10])
    assert all(x.grad is not None and x.grad.isfinite().all() for x in parameters)


@cuda
def test_graph_replays():
    case = Case(31, delta=True, routed=True, dk=64, dv=64)
    given = tensors(case, "cuda", torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(case, given, output_final_state=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        o, state = call(case, given, output_final_state=True)
    for seed in (32, 33):
        fresh = tensors(Case(seed, delta=True, routed=True, dk=64, dv=64), "cuda", torch.bfloat16)
        for name, x in given.items():
            x.copy_(fresh[name])
        graph.replay()
        expected, last = call(case, fresh, output_final_state=True)
        torch.cuda.synchronize()
        assert (o == expected).all() and (state.states == last.states).all()


@cuda
def test_a_training_step_replays():
    """Forward and backward in one graph, on fresh numbers."""
    kind = dict(delta=True, routed=True, dk=64, dv=64)
    case = Case(37, **kind)
    given = tensors(case, "cuda", torch.bfloat16, grad=True)
    do = torch.tensor(case.do, device="cuda", dtype=torch.bfloat16)

    def work(given):
        o, _ = call(case, given)
        return torch.autograd.grad(o, list(given.values()), do)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = work(given)
    for seed in (38, 39):
        fresh = tensors(Case(seed, **kind), "cuda", torch.bfloat16, grad=True)
        with torch.no_grad():
            for name, x in given.items():
                x.copy_(fresh[name])
        graph.replay()
        expected = work(fresh)
        torch.cuda.synchronize()
        for name, x, y in zip(given, found, expected):
            assert (x == y).all(), f"d{name}"


@cuda
@pytest.mark.parametrize("delta, routed", [(False, False), (True, True)])
def test_a_step_replays(delta, routed):
    case = Case(40, delta=delta, routed=routed, time=12, dk=64, dv=64)
    given = tensors(case, "cuda", torch.bfloat16)
    _, expected = steps(case, given, "cuda")
    state = D.empty_state(case.sequences, *case.shape, routed=routed, device="cuda")
    token = {n: (x if n in ("slope", "bias") else x[:, :1].clone()) for n, x in given.items()}
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Makes the plan; its state is thrown away.
        call(case, token, D.step, state=D.State(*(x if x is None else x.clone() for x in state)))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call(case, token, D.step, state=state)
    for t in range(12):
        for name, x in token.items():
            if name not in ("slope", "bias"):
                x.copy_(given[name][:, t : t + 1])
        graph.replay()
    torch.cuda.synchronize()
    assert (state.states == expected.states).all() and (state.tokens == expected.tokens).all()


def entries_of(case, device="cpu", count=5, **named):
    heads, capacity, dk, dv = case.shape
    a = case.arguments
    named = dict(delta=a["beta"] is not None, routed=a["slope"] is not None) | named
    return D.Entries(count, value_heads=heads, dk=dk, dv=dv, capacity=capacity, device=device, **named)


def on_entries(case, function, given, begin, end, entries, **named):
    """`function` over tokens `begin` to `end`."""
    a = dict.fromkeys(GRADIENTS) | {n: x if n in ("slope", "bias") else x[:, begin:end] for n, x in given.items()}
    route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
    options = {n: x for n, x in case.options.items() if n != "capacity"}
    return function(*(a[name] for name in GRADIENTS[:6]), route=route, entries=entries, **options, **named)


@device
@pytest.mark.parametrize("delta,routed", [(False, False), (True, True)])
def test_entries_are_one_call(delta, routed, device):
    case = Case(41, delta=delta, routed=routed, time=40)
    given = tensors(case, device)
    whole, last = call(case, given, output_final_state=True)
    held = entries_of(case, device)
    taken = [held.take() for _ in range(4)]
    mine = [taken[3], taken[1]]
    o, at = [on_entries(case, held.prefill, given, 0, 21, mine)], 21
    for tokens in (1, 8, 1, 1, 3, 2, 1, 2):
        o.append(on_entries(case, held.step, given, at, at + tokens, mine))
        at += tokens
    assert at == 40
    bound = 1e-4 if device == "cpu" else 1e-3
    assert_close("o", torch.cat(o, 1).cpu(), whole.cpu(), bound)
    state = held.export(mine)
    assert_close("states", state.states.cpu(), last.states.cpu(), bound)
    assert (state.len == last.len).all() and (state.keys is None) == (not routed)

    # In again by other entries, and copied, they go on alike.
    held.import_([taken[0], taken[2]], state)
    held.copy(taken[0], mine[1])
    held.copy(mine[1], taken[2])
    one = {n: x if n in ("slope", "bias") else x[:1] for n, x in given.items()}
    ys = [on_entries(case, held.step, one, 0, 1, [entry]) for entry in (mine[0], taken[0], taken[2], mine[1])]
    assert_close("o", ys[1].cpu(), ys[0].cpu(), bound)
    assert (ys[2] == ys[1]).all() and (ys[3] == ys[1]).all()
    held.reset(taken[0])
    assert (held.export([taken[0]]).len == 0).all()
    first = on_entries(case, held.step, one, 0, 1, [taken[0]])
    assert_close("o", first.cpu(), whole[:1, :1].cpu(), bound)


@device
def test_entries_prefill_packed_sequences(device):
    case = Case(42, delta=True, routed=False, time=30, packed=True)
    given = tensors(case, device)
    whole, last = call(case, given, output_final_state=True)
    held = entries_of(case, device, count=3)
    mine = [held.take() for _ in range(3)][::-1]
    offsets = torch.tensor(case.arguments["cu_seqlens"], device=device)
    o = on_entries(case, held.prefill, given, 0, 30, mine, cu_seqlens=offsets)
    assert_close("o", o.cpu(), whole.cpu(), 1e-4 if device == "cpu" else 1e-3)
    assert (held.export(mine).len == last.len).all()


def test_entries_say_what_is_wrong():
    case = Case(43, delta=False, routed=False, time=9)
    given = tensors(case, "cpu")
    held = entries_of(case, count=3)
    mine = [held.take(), held.take()]
    on_entries(case, held.step, given, 0, 1, mine)
    before = held.export(mine)

    def refused(kind, match, function, *arguments, **named):
        with pytest.raises(kind, match=match):
            function(*arguments, **named)
        for x, y in zip(before, held.export(mine)):
            assert x is y or (x == y).all()

    def step(entries, begin=1, end=2, **changed):
        return on_entries(case, held.step, {**given, **changed}, begin, end, entries)

    refused(ValueError, "entries: .*entry 7", step, [0, 7])
    refused(ValueError, "entries: .*no row before", step, [0, 0])
    refused(ValueError, "entries: .*taken", step, [0, 2])
    refused(ValueError, "entries: .*one entry a row, 2", step, [0])
    refused(ValueError, "entries: .*-1", step, [0, -1])
    refused(TypeError, "entries: ", step, 0)
    refused(TypeError, "entries: ", step, [0, "1"])
    refused(ValueError, "q: .*1 to 8", step, mine, 0, 9)
    refused(ValueError, "entries: .*one entry a row, 2", on_entries, case, held.prefill, given, 1, 9, [0])
    refused(ValueError, "recurrence: ", step, mine, beta=given["g"].abs())
    refused(ValueError, "v: .*dv", step, mine, v=given["v"][..., :8])
    refused(TypeError, "k: ", step, mine, k=given["k"].double())
    refused(ValueError, "entry: ", held.release, 2)
    refused(TypeError, "entry: ", held.release, None)
    refused(ValueError, "to: ", held.copy, 0, 2)
    assert held.take() == 2
    with pytest.raises(ValueError, match="all 3 are taken"):
        held.take()
    refused(ValueError, "state.states: ", held.import_, [2], before)
    refused(TypeError, "state.len: ", held.import_, mine, before._replace(len=before.len.float()))
    refused(ValueError, "cache_len|len", held.import_, mine, before._replace(len=before.len + 99))
    with pytest.raises(ValueError, match="states: "):
        entries_of(case, states="float16")
    with pytest.raises(ValueError, match="states: .*CPU"):
        entries_of(case, states="bfloat16")
    with pytest.raises(ValueError, match="capacity: "):
        D.Entries(1, value_heads=1, dk=8, dv=8, capacity=65)
    with pytest.raises(TypeError, match="count: "):
        D.Entries(1.5, value_heads=1, dk=8, dv=8)
    with pytest.raises(ValueError, match="dk: "):
        D.Entries(1, value_heads=1, dk=0, dv=8)


@cuda
@pytest.mark.parametrize("states", ["float32", "bfloat16"])
def test_a_step_of_entries_replays_for_others(states):
    case = Case(44, delta=True, routed=True, time=12, dk=64, dv=64)
    given = tensors(case, "cuda", torch.bfloat16)
    token = {n: (x if n in ("slope", "bias") else x[:, :1].clone()) for n, x in given.items()}
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        held, same = (entries_of(case, "cuda", states=states) for _ in range(2))
        taken = [held.take() for _ in range(4)]
        assert [same.take() for _ in range(4)] == taken
        on_entries(case, held.step, token, 0, 1, taken[:2])
        held.reset(taken[0])
        held.reset(taken[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        o = on_entries(case, held.step, token, 0, 1, taken[:2])
    with torch.cuda.stream(side):
        for t in range(12):
            mine = taken[:2] if t % 3 else taken[2:]
            for name, x in token.items():
                if name not in ("slope", "bias"):
                    x.copy_(given[name][:, t : t + 1])
            held.set_rows(2, mine)
            graph.replay()
            assert (o == on_entries(case, same.step, given, t, t + 1, mine)).all()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="stream: "):
        on_entries(case, held.step, token, 0, 1, taken[:2])


@cuda
def test_two_streams():
    one, other = (Case(seed, delta=False, routed=False, time=3000, dk=64, dv=64) for seed in (34, 35))
    given = [tensors(case, "cuda", torch.bfloat16) for case in (one, other)]
    expected = [call(case, x)[0] for case, x in zip((one, other), given)]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in given], [[], []]
    for _ in range(5):
        for case, x, stream, results in zip((one, other), given, streams, found):
            with torch.cuda.stream(stream):
                results.append(call(case, x)[0])
    torch.cuda.synchronize()
    for results, o in zip(found, expected):
        assert all((x == o).all() for x in results)


@cuda
def test_the_calls_own_time():
    """What Python adds to a call, beyond what the library takes to launch it."""
    given = {n: torch.randn(1, 64, 1, 64, device="cuda", dtype=torch.bfloat16) for n in ("q", "k", "v")}
    lam = torch.ones(1, 64, 1, 30, device="cuda")
    arguments, number = _functional._convert(*given.values(), None, None, lam, None, 0.6, None, None, None)
    codes, numbers = _functional._check(
        arguments, number, merge="density", slot_order="oldest_first", capacity=30, qk_l2norm=False, scale=None, soft=None
    )
    q, plan = given["q"], _op.Plan(arguments, codes, numbers, False, False, False, True)
    outputs = tuple(empty(shape) for empty, shape in plan.outputs)
    stream = torch.cuda.current_stream().cuda_stream
    workspace = torch.empty(plan.query(stream), dtype=torch.uint8, device="cuda")
    place = (workspace.data_ptr(), workspace.nbytes)

    def microseconds(function):
        """Least mean of a batch of calls, with the GPU never behind: it is waited for before each batch."""
        best = float("inf")
        for _ in range(40):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                function()
            best = min(best, (time.perf_counter() - begin) / 20 * 1e6)
        return best

    native = microseconds(lambda: plan.call(stream, place, arguments, outputs))
    plain = microseconds(lambda: D.dla(*given.values(), lam=lam))
    state = D.empty_state(1, 1, 30, 64, 64, device="cuda")
    token = [x[:, :1] for x in given.values()]
    step = microseconds(lambda: D.step(*token, lam=lam[:, :1], state=state))
    q.requires_grad_()
    grad = microseconds(lambda: D.dla(*given.values(), lam=lam))
    o, _ = D.dla(*given.values(), lam=lam)
    do = torch.zeros_like(o)
    backward = microseconds(lambda: torch.autograd.grad(o, q, do, retain_graph=True))
    print(f"launch {native:.1f} us; through dla.torch.dla {plain:.1f} us, with gradients wanted {grad:.1f} us; "
          f"backward, whole {backward:.1f} us; step, whole {step:.1f} us")
    assert plain - native <= 40


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_gpu_than_the_current():
    case = Case(36, delta=False, routed=False, dk=64, dv=64)
    first, second = (call(case, tensors(case, f"cuda:{i}", torch.bfloat16))[0] for i in (0, 1))
    assert torch.cuda.current_device() == 0
    assert error(second.float().cpu(), first.float().cpu()) == 0

"""JAX against the f64 reference; jit, grad, vmap."""

import os

import numpy as np
import pytest
from conftest import Case, assert_close, cases
from test_numpy import GRADIENTS, SPELLED

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import dla  # noqa: E402
import dla.jax  # noqa: E402

if os.environ.get("DLA_CUDA") == "require":
    # A GPU that cannot be used is no reason to test the CPU in its place.
    assert jax.default_backend() == "gpu", jax.default_backend()
    dla.check_cuda()


def of(case, convert=jnp.asarray):
    """A function of the arguments that have gradients, and those."""
    names = [name for name in GRADIENTS if case.arguments[name] is not None]
    offsets = case.arguments["cu_seqlens"]

    def forward(*given):
        a = dict.fromkeys(GRADIENTS) | dict(zip(names, given))
        route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
        return dla.jax.forward(
            *(a[name] for name in GRADIENTS[:6]), route=route, cu_seqlens=offsets, **case.options
        )

    return names, forward, [convert(case.arguments[name]) for name in names]


@pytest.mark.parametrize("kind", cases())
def test_jit_and_grad(kind, reference):
    case = Case(11, **kind)
    names, forward, given = of(case)

    def loss(*given):
        result = forward(*given)
        return (result.o * case.do).sum(), result

    result = jax.jit(forward)(*given)
    expected = reference(case, result.events, case.do)
    # A GPU's products are of bf16 planes.
    bound = 1e-5 if jax.default_backend() == "cpu" else 1e-4
    assert_close("o", result.o, expected["o"], bound)
    assert_close("states", result.state.states, expected["cache_states"], bound)
    every = tuple(range(len(names)))
    (_, same), gradients = jax.jit(jax.value_and_grad(loss, argnums=every, has_aux=True))(*given)
    jax.block_until_ready(gradients)
    assert (same.o == result.o).all()
    for name, x in zip(names, gradients):
        assert_close(f"d{name}", x, expected[SPELLED.get(name, f"d{name}")], 2 * bound)


def test_gradient_of_the_state():
    case = Case(12, delta=True, routed=True, time=30)
    names, forward, given = of(case)
    upstream = np.random.default_rng(3).standard_normal((2, *case.shape[:1], 6, 16, 24)).astype(np.float32)
    gradients = jax.grad(lambda *given: (forward(*given).state.states * upstream).sum(), argnums=(1, 2))(*given)
    jax.block_until_ready(gradients)
    positional, keywords = case.call()
    log = np.asarray(forward(*given).events)
    expected = dla.backward(np.zeros_like(case.do), log, *positional, d_state=(upstream,), **keywords)
    bound = 1e-6 if jax.default_backend() == "cpu" else 2e-4
    assert_close("dk", gradients[0], expected.k, bound)
    assert_close("dv", gradients[1], expected.v, bound)


def test_what_is_not_differentiated_is_left_alone():
    """Gradients of some arguments are those of all; tau without soft boundaries has one of zeros."""
    case = Case(16, delta=True, routed=True, time=30)
    names, forward, given = of(case)
    loss = lambda *given: (forward(*given).o * case.do).sum()  # noqa: E731
    every = jax.grad(loss, tuple(range(len(names))))(*given)
    for i, name in enumerate(names):
        assert (jax.jit(jax.grad(loss, i))(*given) == every[i]).all(), name
    a = dict(zip(names, given))
    route = (a["slope"], a["bias"], a["logits"])
    at = lambda tau: dla.jax.dla(  # noqa: E731
        *(a[name] for name in GRADIENTS[:5]), route=route, **{**case.options, "tau": tau}
    )[0].sum()
    assert (jax.grad(at)(jnp.full(4, 0.6)) == 0).all()


@pytest.mark.parametrize("routed", [False, True])
def test_vmap_is_a_loop(routed):
    case = Case(13, delta=True, routed=routed, time=40)
    names, forward, given = of(case)
    loss = lambda *given: (forward(*given).o * case.do).sum()  # noqa: E731
    # Queries and values have the new axis; keys, gates and the route's parameters are shared.
    axes = tuple(0 if name in ("q", "v") else None for name in names)
    many = [jnp.stack([x, 0.5 * x, -x]) if axis == 0 else x for x, axis in zip(given, axes)]
    row = lambda i: [x[i] if axis == 0 else x for x, axis in zip(many, axes)]  # noqa: E731
    every = tuple(range(len(names)))
    o = jax.jit(jax.vmap(lambda *given: forward(*given).o, axes))(*many)
    for i in range(3):
        assert (o[i] == forward(*row(i)).o).all()
    gradients = jax.vmap(jax.grad(loss, every), axes)(*many)
    jax.block_until_ready(gradients)
    for i in range(3):
        for name, x, expected in zip(names, gradients, jax.grad(loss, every)(*row(i))):
            # On a GPU the sums over tokens are grouped by how many sequences there are.
            assert_close(f"d{name}", x[i], expected, 1e-6 if jax.default_backend() == "cpu" else 1e-5)


def test_pieces_are_one_call():
    case = Case(14, delta=False, routed=False, time=40)
    positional, keywords = case.call(jnp.asarray)
    whole = dla.jax.forward(*positional, **keywords)
    state, outputs = None, []
    for at in (slice(0, 25), slice(25, 39), slice(39, 40)):
        cut = [x if x is None else x[:, at] for x in positional]
        o, state = dla.jax.dla(*cut, **keywords, initial_state=state, output_final_state=True)
        outputs.append(o)
    bound = 1e-5 if jax.default_backend() == "cpu" else 1e-4
    assert_close("o", jnp.concatenate(outputs, 1), whole.o, bound)
    assert_close("states", state.states, whole.state.states, bound)


def test_errors_name_the_argument():
    case = Case(15, delta=False, routed=False, time=5)
    positional, keywords = case.call(jnp.asarray)
    with pytest.raises(ValueError, match=r"k: expected shape \[B,T,H,dk\]"):
        dla.jax.dla(positional[0], positional[1][:, :3], *positional[2:], **keywords)
    with pytest.raises(TypeError, match="g: expected dtype float32"):
        dla.jax.dla(*positional[:3], positional[3].astype(jnp.bfloat16), *positional[4:], **keywords)
    for name, wrong in (
        ("q", "x"), ("k", None), ("v", "x"), ("lam", "x"), ("route", 3), ("tau", "x"), ("scale", "1"), ("soft", 0.1),
        ("initial_state", 3), ("cu_seqlens", "x"), ("events", "x"),
    ):
        named = dict(zip(("q", "k", "v", "g", "beta", "lam"), positional)) | keywords | {name: wrong}
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            dla.jax.dla(**named)
    if jax.default_backend() == "cpu":
        with pytest.raises(Exception, match="g: expected at most 0"):
            jax.block_until_ready(dla.jax.dla(*positional[:3], -positional[3], *positional[4:], **keywords))

"""numpy against the f64 reference: outputs, state, every gradient; decoding; errors."""

import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from conftest import Case, assert_close, cases

import dla

GRADIENTS = ("q", "k", "v", "g", "beta", "lam", "slope", "bias", "logits")
SPELLED = {"lam": "dlambda", "slope": "droute_slope", "bias": "droute_bias", "logits": "droute_logits"}


@pytest.mark.parametrize("kind", cases())
def test_forward_and_every_gradient(kind, reference):
    case = Case(1, **kind)
    positional, keywords = case.call()
    result = dla.forward(*positional, **keywords)
    d_state = [np.random.default_rng(2).standard_normal(x.shape).astype(np.float32) for x in
               (result.state.states, result.state.open, *([result.state.keys] if kind["routed"] else []))]
    gradients = dla.backward(case.do, result.events, *positional, d_state=d_state, **keywords)
    named = dict(zip(("states", "open", "keys"), d_state))
    expected = reference(case, result.events, case.do, d_state=named)
    assert_close("o", result.o, expected["o"], 1e-5)
    np.testing.assert_allclose(result.drift, expected["drift"], atol=3e-3)
    for name, x in zip(dla.State._fields, result.state):
        if x is None:
            continue
        if name == "drift":
            # Sums of drifts, each rounded to 2^-12: judged by the mean of a slot's tokens.
            off = np.abs(x.astype(np.int64) - expected["cache_drift"].astype(np.int64)) / np.maximum(result.state.tokens, 1)
            assert off.max() / 4096 < 3e-3
        else:
            assert_close(name, x, expected[f"cache_{name}"], 1e-5)
    for name in GRADIENTS:
        x = getattr(gradients, name)
        assert (x is None) == (case.arguments[name] is None)
        if x is not None:
            assert_close(f"d{name}", x, expected[SPELLED.get(name, f"d{name}")], 2e-5)


def test_pieces_and_steps_are_one_call():
    case = Case(3, delta=True, routed=True, time=40)
    positional, keywords = case.call()
    whole = dla.forward(*positional, **keywords)

    def piece(at):
        cut = [x if x is None else np.ascontiguousarray(x[:, at]) for x in positional]
        slope, bias, logits = keywords["route"]
        return cut, dict(keywords, route=(slope, bias, np.ascontiguousarray(logits[:, at])))

    cut, named = piece(slice(0, 25))
    first, state = dla.dla(*cut, **named, output_final_state=True)
    cut, named = piece(slice(25, 40))
    rest, last = dla.dla(*cut, **named, initial_state=state, output_final_state=True)
    assert_close("o", np.concatenate([first, rest], 1), whole.o, 1e-5)
    assert_close("states", last.states, whole.state.states, 1e-5)
    state = dla.empty_state(2, *case.shape, routed=True)
    for t in range(40):
        cut, named = piece(slice(t, t + 1))
        o, same = dla.step(*cut, **named, state=state)
        assert same is state
        assert_close("o", o[:, 0], whole.o[:, t], 1e-4)
    assert (state.len == whole.state.len).all() and (state.tokens == whole.state.tokens).all()


def _piece(initial, positional, keywords, queue):
    queue.put(dla.dla(*positional, **keywords, initial_state=initial, output_final_state=True))


def pieces(method):
    case = Case(4, delta=False, routed=False, time=90)
    positional, keywords = case.call()
    whole, end = dla.dla(*positional, **keywords, output_final_state=True)
    context = multiprocessing.get_context(method)
    state, outputs = None, []
    for begin in range(0, 90, 30):
        queue = context.Queue()
        cut = [x if x is None else np.ascontiguousarray(x[:, begin : begin + 30]) for x in positional]
        process = context.Process(target=_piece, args=(state, cut, keywords, queue))
        process.start()
        o, state = queue.get(timeout=60)
        process.join(60)
        outputs.append(o)
    assert_close("o", np.concatenate(outputs, 1), whole, 1e-5)
    assert_close("states", state.states, end.states, 1e-5)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_pieces_by_one_process_each(method):
    """A long sequence in pieces, each by a process of its own, the state handed on. A forked process has no threads of its
    parent's pool. In an interpreter without the other frameworks, whose threads do not outlive a fork."""
    done = subprocess.run([sys.executable, __file__, method], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_a_split_over_heads_is_the_same_bits():
    case = Case(5, delta=True, routed=False)
    positional, keywords = case.call()
    whole = dla.forward(*positional, **keywords)
    for head in range(2):
        q, k, v, g, beta, lam = positional
        own, group = slice(head, head + 1), slice(2 * head, 2 * head + 2)
        part = dla.forward(q[:, :, own], k[:, :, own], v[:, :, group], g[:, :, group], beta[:, :, group],
                           lam[:, :, group], **keywords)
        assert (part.o == whole.o[:, :, group]).all()
        assert (part.events == whole.events[:, :, group]).all()
        assert (part.state.states == whole.state.states[:, group]).all()


def test_half_precision():
    case = Case(6, delta=False, routed=False)
    positional, keywords = case.call()
    whole, _ = dla.dla(*positional, **keywords)
    half = [x.astype(np.float16) for x in positional[:3]] + positional[3:]
    o, _ = dla.dla(*half, **keywords)
    assert o.dtype == np.float16
    # The drift of rounded keys may take another decision: what is compared is the size alone.
    assert np.isfinite(o).all() and o.shape == whole.shape


def test_errors_name_the_argument():
    case = Case(7, delta=False, routed=False, time=5)
    positional, keywords = case.call()

    def refused(kind, text, change=None, **named):
        arguments = list(positional)
        for index, x in (change or {}).items():
            arguments[index] = x
        with pytest.raises(kind, match=text):
            dla.dla(*arguments, **{**keywords, **named})

    refused(TypeError, "q: expected a numpy array", {0: [1.0]})
    refused(TypeError, "q: expected dtype", {0: positional[0].astype(np.float64)})
    refused(TypeError, "v: expected dtype", {2: positional[2].astype(np.float16)})
    refused(ValueError, r"k: expected shape \[B,T,H,dk\]", {1: positional[1][:, :4]})
    refused(ValueError, "g: expected at most 0 everywhere", {3: -positional[3]})
    refused(ValueError, "lam: missing", {5: None})
    refused(ValueError, r"lam: expected shape \[B,T,HV,M\]", {5: positional[5][..., :3]})
    refused(ValueError, "capacity: expected 1 to 64", capacity=65)
    refused(TypeError, "route: expected", {5: None}, route=3)
    refused(TypeError, "scale: expected a number", scale="1")
    refused(TypeError, "tau: expected a number", tau="0.6")
    refused(TypeError, "soft: expected", soft=0.1)
    refused(TypeError, "merge: expected a string", merge=["mass"])
    refused(TypeError, "initial_state: expected a State", initial_state=3)
    refused(ValueError, "merge: expected one of", merge="median")
    refused(ValueError, "tau: expected a number", tau=float("nan"))
    refused(ValueError, "events: expected 1 for batch entry 0", events=np.zeros((2, 5, 4), np.uint8))
    refused(ValueError, "cu_seqlens: not expected", cu_seqlens=np.array([0, 5]))
    refused(ValueError, "state.len: expected shape",
            initial_state=dla.empty_state(2, *case.shape)._replace(len=np.zeros((3, 4), np.uint32)))


if __name__ == "__main__":
    pieces(sys.argv[1])

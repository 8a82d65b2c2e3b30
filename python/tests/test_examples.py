"""The tasks of python/examples, and what its models are made of."""

import pathlib
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples"))

import models  # noqa: E402
import recall  # noqa: E402
import tasks  # noqa: E402
import train  # noqa: E402


def drawn():
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def test_recall_asks_for_what_it_showed():
    tokens, targets = tasks.recall(drawn(), 5, 60, 12, 400)
    assert tokens.shape == targets.shape == (5, 60) and tokens.dtype == targets.dtype == torch.int64
    for row, target in zip(tokens.tolist(), targets.tolist()):
        shown = dict(zip(row[0:24:2], row[1:24:2]))
        assert len(shown) == 12 and max(shown) < 200 <= min(shown.values()) and len(set(shown.values())) == 12
        asked = {row[t]: value for t, value in enumerate(target) if value != tasks.IGNORED}
        assert asked == shown and all(value == tasks.IGNORED for value in target[:24])
    with pytest.raises(ValueError, match="pairs: expected at most 20"):
        tasks.recall(drawn(), 1, 60, 21, 400)


def test_needles_are_strewn_and_asked_for_at_the_end():
    tokens, targets = tasks.needles(drawn(), 4, 100, 6, phrase=7)
    for row, target in zip(tokens.tolist(), targets.tolist()):
        at = [t for t in range(94) if row[t] < tasks.NEEDLE_KEYS]
        shown = {row[t]: row[t + 1] for t in at}
        assert len(shown) == 6 and all(256 <= value < 512 for value in shown.values())
        assert {row[t]: target[t] for t in range(94, 100)} == shown
        assert all(value == tasks.IGNORED for value in target[:94])
        filler = {t for t in range(94)} - set(at) - {t + 1 for t in at}
        words = {}
        for t in filler:
            assert row[t] >= 512 and words.setdefault(t % 7, row[t]) == row[t]


def test_windows_go_on_by_a_byte():
    learn, test = tasks.standard_library(most_bytes=2_000_000)
    assert learn.dtype == torch.uint8 and len(learn) > len(test) > 0
    tokens, targets = tasks.windows(drawn(), learn, 3, 50)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert bytes(tokens[0].tolist()) in bytes(learn.tolist())


def test_a_target_to_come_is_not_seen():
    """Every mixer is causal: a later token changes nothing before it."""
    for name in recall.EXPERIMENTS:
        if not name.startswith("recall64/") or "M = " in name:
            continue
        torch.manual_seed(1)
        _, spec = recall.as_listed(name, "float32")
        spec = {**spec, **{key: 3 for key in ("capacity", "segments") if spec.get(key, 0) > 3}}
        spec = {**spec, "read_best": 2} if spec.get("read_best") else spec
        model = models.Model(spec, vocabulary=16, hidden=32, heads=2, layers=1, time=24)
        a = torch.randint(16, (1, 24), generator=drawn())
        b = a.clone()
        b[0, 17] = (b[0, 17] + 1) % 16
        with torch.no_grad():
            x, y = model.hidden(a), model.hidden(b)
        assert torch.equal(x[:, :17], y[:, :17]) or torch.allclose(x[:, :17], y[:, :17], atol=1e-6), name
        assert not torch.allclose(x[:, 17], y[:, 17], atol=1e-4), name


def test_log_linear_is_what_it_says():
    """Token by token: s is weighed by the level of its bucket, the binary parts of t from the newest."""
    generator, time, width = drawn(), 21, 16
    levels = models.levels(time)
    q, k, v = (torch.randn(1, time, 1, width, generator=generator) for _ in range(3))
    g = -torch.rand(1, time, 1, generator=generator) * 0.3
    lam = torch.rand(1, time, 1, levels, generator=generator)
    layer = models.LogLinear(hidden_size=width, head_dim=width, num_heads=1, style="gated", read="given", capacity=levels)
    o, _ = layer.mix(q, k, v, g, None, lam, None)
    unit = torch.nn.functional.normalize
    for t in range(time):
        expected, end, rest = lam[0, t, 0, 0] * (unit(q[0, t, 0], dim=0) @ unit(k[0, t, 0], dim=0)) * v[0, t, 0], t, t
        while rest:
            bit = rest & -rest  # the newest bucket is the smallest
            for s in range(end - bit, end):
                decay = g[0, s + 1 : t + 1, 0].sum().exp()
                weight = lam[0, t, 0, bit.bit_length()] * decay
                expected = expected + weight * (unit(q[0, t, 0], dim=0) @ unit(k[0, s, 0], dim=0)) * v[0, s, 0]
            end, rest = end - bit, rest - bit
        assert torch.allclose(o[0, t, 0], expected * width**-0.5, atol=1e-5), t


@pytest.mark.parametrize("style", ["gated", "delta"])
def test_equal_segments_are_equal(style):
    layer = models.Dla(hidden_size=32, head_dim=16, num_heads=2, style=style, read="routed", capacity=5, segments=5)
    layer.record = True
    with torch.no_grad():
        layer(torch.randn(2, 50, 32, generator=drawn()))
    assert torch.equal(layer.seen["tokens"], torch.full((2, 2, 5), 10, dtype=torch.int32))
    assert (layer.seen["events"] <= 1).all()


@pytest.mark.parametrize("read", ["given", "routed", "routed_logits"])
@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
def test_the_best_slots_are_read(read, order):
    """Against the operator with the other weights set to 0, outputs and gradients of what does not make the weights."""
    torch.manual_seed(torch.initial_seed() % 2**31)
    print(f"seed {torch.initial_seed()}")
    named = dict(hidden_size=32, head_dim=16, num_heads=2, style="gated", read=read, capacity=6, slot_order=order)
    layer = models.Dla(**named, read_best=2)
    x = torch.randn(2, 40, 32)
    layer.record = True
    layer(x)
    seen = layer.seen
    weights = seen["lam"]
    if read == "given":
        return_weights = weights  # as the layer made them: all slots
        present = (seen["events"] == 1).cumsum(1).unsqueeze(3)
        weights = weights.masked_fill(torch.arange(6) >= present, 0.0)
        least = weights.topk(2, 3).values[..., -1:]
        weights = weights * (weights >= least)
        assert return_weights.shape == weights.shape
    assert (weights > 0).sum(3).max() == 2
    from dla.torch import dla

    again = [seen[name].detach().requires_grad_() for name in ("q", "k", "v")]
    o, _ = dla(*again, seen["g"], None, weights.detach(), capacity=6, merge="mass", slot_order=order, use_qk_l2norm_in_kernel=True)
    assert torch.allclose(o, seen["o"], rtol=1e-4, atol=1e-5)
    do = torch.randn_like(o)
    o.backward(do)
    dv = torch.autograd.grad(seen["o"], seen["v"], do)[0]
    assert torch.allclose(again[2].grad, dv, rtol=1e-3, atol=1e-4)


def test_a_length_that_a_mixer_cannot_take_is_left_out(monkeypatch):
    monkeypatch.setattr(models.LogLinear, "MASKED_TIME", 48)
    settings = {**recall.SETTINGS["needles"], **recall.TINY["needles"], "dtype": "float32"}
    settings.update(time=32, test_times=[32, 64], steps=3, warm_up=1, test_batches=1)
    result, _ = train.train(settings, recall.OTHERS["Log-Linear"], 0)
    assert list(result["accuracy"]) == ["32"]


def test_mixers_begin_alike():
    drawn_of = []
    for name in ("gated, mass, routed with logits", "gated, one state", "gated, density, given (the paper)"):
        torch.manual_seed(len(name))
        spec = recall.EXPERIMENTS[f"recall64/{name}"][1]
        model = models.Model(spec, vocabulary=24, hidden=32, heads=2, layers=1, time=40).draw(5)
        drawn_of.append(dict(model.named_parameters()))
    common = set.intersection(*map(set, drawn_of))
    assert any("A_log" in name for name in common) and any("q_proj" in name for name in common)
    for name in common:
        if "l_proj" not in name:  # of as many columns as there are slots
            assert all(torch.equal(drawn_of[0][name], other[name]) for other in drawn_of[1:]), name


def test_everything_learned_has_a_gradient():
    for name in ("gated, mass, routed with logits", "delta, mass, routed with logits", "gated, mass, routed, soft into k and v"):
        spec = dict(recall.EXPERIMENTS[f"recall64/{name}"][1], capacity=3)
        torch.manual_seed(3)
        model = models.Model(spec, vocabulary=24, hidden=32, heads=2, layers=1, time=40)
        model.loss(*tasks.recall(drawn(), 4, 40, 6, 24))[0].backward()
        for parameter, x in model.named_parameters():
            assert x.grad is not None and x.grad.abs().max() > 0, (name, parameter)


def test_training_lowers_the_loss():
    settings = dict(
        recall.SETTINGS["recall64"], **{**recall.TINY["recall64"], "vocabulary": 8, "train_pairs": [2], "test_pairs": [2], "time": 12},
        dtype="float32",
    )
    settings.update(layers=1, steps=60, warm_up=6, test_batches=1, test_read_best=[2])
    result, _ = train.train(settings, recall.ours(capacity=4), 0)
    print(result["loss"], result["accuracy"])
    assert result["loss"][-1][1] < 0.75 * result["loss"][0][1]
    assert len(result["memory"]) == 1 and len(result["memory"][0]["slot_tokens_sorted"]) == 4
    assert sum(result["memory"][0]["slot_tokens_sorted"]) == pytest.approx(12, abs=0.5)
    assert set(result["read_best"]) == {"2"}


def made_up(name, seed, accuracy=None, bits=None, **settings):
    """A run as recall.py keeps it."""
    setting, (own, spec) = recall.EXPERIMENTS[name][0], recall.as_listed(name, "bfloat16")
    found = {"accuracy": {str(n): accuracy for n in recall.SETTINGS[setting].get("test_pairs", ["test"])}}
    if bits:
        found.update(bits_per_byte=bits, bits_by_quarter=[bits] * 4)
    settings = {**own, **settings}
    machine = {"card": "a card", "torch": "2", "date": "2026-01-01"}
    run = {"name": name, "seed": seed, "settings": settings, "mixer": spec, "machine": machine, "tokens_per_s": 5, **found}
    return recall.json.loads(recall.json.dumps(run))


def test_the_summary_says_what_was_run_and_what_was_not():
    ours, one, fixed = (f"recall64/gated, {name}" for name in ("mass, routed", "one state", recall.FIXED))
    runs = [made_up(ours, seed, accuracy) for seed, accuracy in enumerate((0.8, 0.9, 0.91))]
    runs += [made_up(one, 0, 0.25), made_up(fixed, 0, 0.85), made_up(fixed, 1, 0.6)]
    runs += [made_up("bytes/gated, mass, routed", 0, 1.0, 1.6), made_up("bytes/gated, one state", 0, 1.0, 1.5)]
    runs.append(made_up("recall64/softmax attention", 0, 0.9, steps=3))  # --steps: not of the set
    text = recall.summary({"runs": runs, "left_out": [{"name": one, "seed": 1, "why": "it fell over"}]})
    for line in (
        "- gated, mass, routed, M = 30: 0.870 (0.800 to 0.910); 0.85 was aimed at: reached",
        "- gated, many states and one: gated, mass, routed 0.870 (0.800 to 0.910), gated, one state 0.250: ahead (seeds: 3 and 1)",
        "- gated, fixed segments at M = 30: gated, mass, routed 0.870 (0.800 to 0.910), gated, fixed segments, routed with logits"
        " 0.725 (0.600 to 0.850): ahead in the mean, but the seeds overlap (seeds: 3 and 2)",
        "- gated, fixed segments at M = 8: not run (gated, mass, routed, M = 8, gated, fixed segments, routed with logits, M = 8)",
        "- bits a byte: gated, mass, routed 1.600, gated, one state 1.500: not ahead (seeds: 1)",
        f"- failed: {one}, seed 1: it fell over",
    ):
        assert line in text.splitlines(), (line, text)
    short = next(line for line in text.splitlines() if line.startswith("- recall64, not run"))
    assert "one state (1)" in short and "softmax attention;" in short and "gated, mass, routed;" not in short
    assert "Nothing has been run" in recall.summary({"runs": runs[-1:], "left_out": []})


def test_what_is_put_into_a_file_replaces_what_was_there(tmp_path):
    path = tmp_path / "a.md"
    path.write_text("one\n<!-- recall: begin -->\nold\n<!-- recall: end -->\ntwo\n")
    for text in ("new\n", "newer\n"):
        recall.put(path, "recall", text)
    assert path.read_text() == "one\n<!-- recall: begin -->\n\nnewer\n\n<!-- recall: end -->\ntwo\n"
    with pytest.raises(SystemExit, match="peers: begin"):
        recall.put(path, "peers", "x")


def test_what_decides_the_claims_is_taken_first():
    names = list(recall.EXPERIMENTS)
    first = names[: len(recall.claims("gated"))]
    for name in ("mass, routed", "one state", "density, given (the paper)", recall.FIXED, f"{recall.FIXED}, M = 16", f"{recall.FIXED}, M = 8"):
        assert f"recall64/gated, {name}" in first
    assert "recall64/softmax attention" in first
    assert {spec["segments"] for _, spec in map(recall.EXPERIMENTS.get, first) if "segments" in spec} == {8, 16, 30}
    after = [name.split("/")[0] for name in names[len(first):]]
    assert all(name.startswith("recall64/delta") for name in names[len(first): len(first) + len(recall.claims("delta"))])
    assert after.index("needles") < after.index("bytes") < after.index("recall128")

"""The report of benches/peers; nothing is timed."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PEERS = ROOT / "benches" / "peers" / "peers.py"
sys.path.insert(0, str(PEERS.parent))

import peers  # noqa: E402


def report(device="cuda"):
    times = {"dla gated": 2.0, "simple GLA": 1.0, "Log-Linear Attention": 20.0, "softmax attention": 1.5}
    rows = [{"peer": peer, "size": "S1", "pass": "forward", "ms": ms, "peak_mb": 7.0} for peer, ms in times.items()]
    rows.append({"peer": "softmax attention", "size": "S3", "pass": "forward", "ms": 8.0})
    rows.append({"peer": "dla gated", "size": "S3", "pass": "forward", "ms": 4.0})
    left_out = [{"peer": "Gated DeltaNet", "size": "S1", "pass": "forward", "why": "not installed"}]
    return {"card": "a card", "versions": {"torch": "2"}, "device": device, "date": "2026-01-01", "rows": rows, "left_out": left_out}


def test_the_verdict_is_of_what_was_run():
    lines = peers.verdict(report()).splitlines()
    rest = " | not run" * 4
    assert f"| simple GLA / dla gated | 0.50 | not run | not run{' | not run' * 3} |" in lines
    assert f"| softmax attention / dla gated | 0.75 | not run | 2.00{' | not run' * 3} |" in lines
    assert f"| Gated DeltaNet / dla delta | not run | not run{rest} |" in lines
    assert "- softmax attention is faster than dla gated at S1" in lines
    assert "- simple GLA is faster than dla gated at S1" in lines
    # 20 over 2 is ten times: no aim missed.
    assert not any("Log-Linear Attention is" in line for line in lines)
    slower = report()
    slower["rows"][0]["ms"] = 4.0
    assert "- Log-Linear Attention is not 8 times as slow as dla gated at S1" in peers.verdict(slower).splitlines()


def test_a_reason_has_the_cause_too():
    assert peers.said(ValueError("at 1:2:\n  some code\n  ^\ntypes differ\n")) == "at 1:2: ... types differ"
    assert peers.said(ValueError("short")) == "short" and peers.said(ValueError()) == ""


def test_log_linear_is_called_as_its_reference_computes():
    """By a stand-in for its kernel that takes what the kernel takes."""
    torch = pytest.importorskip("torch")
    low = peers.draw((1, 48, 2, 16), 3, "cpu")

    def op(q, k, v, g, scales, scale=1.0):
        assert scales.dtype == q.dtype == v.dtype == torch.bfloat16
        exact = {name: x.double() for name, x in low.items()}
        return (recurrence(dict(exact, level_scales=scales.double())) * scale * q.shape[3] ** 0.5,)

    def recurrence(x):
        return peers.LogLinear.exact(None, x, low)

    peer = peers.LogLinear.__new__(peers.LogLinear)
    peer.op = op
    expected = recurrence({name: x.double() for name, x in low.items()})
    error = (peer.call(low) - expected).norm() / expected.norm()
    assert error < 4e-3, error


def test_it_is_put_between_the_marks(tmp_path):
    readme = tmp_path / "README.md"
    before = "one\n<!-- peers: begin -->\nold\n<!-- peers: end -->\ntwo\n"
    for device, status in (("cpu", 1), ("cuda", 0)):
        readme.write_text(before)
        (tmp_path / "peers.json").write_text(json.dumps(report(device)))
        done = subprocess.run(
            [sys.executable, PEERS, "--out", tmp_path, "--readme", readme], capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        text = readme.read_text()
        assert (text == before) == (device == "cpu")
    assert text.startswith("one\n") and text.endswith("two\n") and "old" not in text
    assert "a card, 2026-01-01, torch 2" in text and "left out: Gated DeltaNet, S1, forward: not installed" in text

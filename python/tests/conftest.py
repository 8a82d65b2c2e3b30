"""Cases, and the definition that judges them: `dla run --device reference`, the crate's own f64."""

import json
import os
import pathlib
import struct
import subprocess

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8", "uint32": "U32", "int64": "I64",
}


def _command():
    given = os.environ.get("DLA_CLI")
    found = [given] if given else [ROOT / "target" / kind / "dla" for kind in ("release", "debug")]
    found = [str(path) for path in found if pathlib.Path(path).exists()]
    # A test that is told to run does not pass by being skipped.
    if not found and os.environ.get("DLA_PYTHON") == "require":
        raise RuntimeError("no dla executable: cargo build, or DLA_CLI=path")
    return found[0] if found else None


def _write(path, tensors):
    header, data, end = {}, [], 0
    for name, x in tensors.items():
        x = np.ascontiguousarray(x)
        header[name] = {"dtype": NAMES[x.dtype.name], "shape": list(x.shape), "data_offsets": [end, end + x.nbytes]}
        data.append(x.tobytes())
        end += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def _read(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    kinds = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "U32": np.uint32, "I64": np.int64, "F64": np.float64}
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + at for at in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            x = (np.frombuffer(raw[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            x = np.frombuffer(raw[begin:end], kinds[entry["dtype"]])
        found[name] = x.reshape(entry["shape"])
    return found


@pytest.fixture
def reference(tmp_path):
    """The definition's results of a case, by the names of `dla run`."""
    command = _command()
    if command is None:
        pytest.skip("no dla executable: cargo build --release, or DLA_CLI=path")

    def run(case, events=None, do=None, state=None, d_state=None):
        tensors = {n: x for n, x in case.arguments.items() if x is not None}
        names = {"lam": "lambda", "slope": "route_slope", "bias": "route_bias", "logits": "route_logits"}
        tensors = {names.get(n, n): np.asarray(x) for n, x in tensors.items()}
        if events is not None:
            tensors["events"] = np.asarray(events)
        if do is not None:
            tensors["do"] = np.asarray(do)
        for prefix, arrays in (("cache_", state), ("dcache_", d_state)):
            for name, x in (arrays or {}).items():
                if x is not None:
                    tensors[prefix + name] = np.asarray(x)
        _write(tmp_path / "in.safetensors", tensors)
        o = case.options
        arguments = [
            "--device", "reference", "--quiet", "--recurrence", "delta" if case.arguments["beta"] is not None else "gated",
            "--read", "routed" if case.arguments["slope"] is not None else "given", "--capacity", str(o["capacity"]),
            "--merge", o["merge"], "--tau", str(o["tau"]),
        ]
        arguments += ["--qk-l2norm"] if o["use_qk_l2norm_in_kernel"] else []
        arguments += ["--slot-order", o["slot_order"].split("_")[0]] if o["slot_order"] != "oldest_first" else []
        out = tmp_path / "out.safetensors"
        done = subprocess.run(
            [command, "run", str(tmp_path / "in.safetensors"), "-o", str(out), *arguments], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return _read(out)

    return run


class Case:
    """Arguments of a call, drawn from a printed seed."""

    def __init__(self, seed, *, delta, routed, merge="mass", order="oldest_first", batch=2, time=150, heads=2, group=2,
                 dk=16, dv=24, capacity=6, packed=False):
        print(f"seed {seed}")
        rng = np.random.default_rng(seed)

        def normal(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        batch = 1 if packed else batch
        values = heads * group
        per_token = (batch, time, values)
        # Content that stays for some tokens, so that slots are extended too.
        stay = np.repeat(rng.random((batch, time)) < 0.5, 1, 1)
        k, v = normal(batch, time, heads, dk), normal(*per_token, dv)
        for b in range(batch):
            for t in range(1, time):
                if stay[b, t]:
                    k[b, t], v[b, t] = k[b, t - 1], v[b, t - 1]
        k += 0.1 * normal(*k.shape)
        self.arguments = dict(
            q=normal(batch, time, heads, dk), k=k, v=v, g=-0.2 * rng.random(per_token).astype(np.float32),
            beta=rng.random(per_token).astype(np.float32) if delta else None,
            lam=None if routed else rng.uniform(0.05, 1.5, (*per_token, capacity)).astype(np.float32),
            slope=rng.uniform(2, 8, values).astype(np.float32) if routed else None,
            bias=normal(values) if routed else None,
            logits=normal(*per_token, capacity) if routed else None,
            cu_seqlens=np.array([0, time // 3, time // 3, time], np.int64) if packed else None,
        )
        self.options = dict(
            capacity=capacity, merge=merge, tau=0.6, slot_order=order, use_qk_l2norm_in_kernel=True,
        )
        self.do = normal(*per_token, dv)
        self.sequences, self.shape = (3 if packed else batch), (values, capacity, dk, dv)

    def call(self, convert=lambda x: x):
        """Positional and keyword arguments of a framework's function."""
        a = {name: None if x is None else convert(x) for name, x in self.arguments.items()}
        route = None if a["slope"] is None else (a["slope"], a["bias"], a["logits"])
        positional = [a[name] for name in ("q", "k", "v", "g", "beta", "lam")]
        keywords = dict(self.options, route=route)
        if a["cu_seqlens"] is not None:
            keywords["cu_seqlens"] = a["cu_seqlens"]
        return positional, keywords


def cases():
    """Recurrences, reads, merges, orders, and packed sequences."""
    return [
        dict(delta=delta, routed=routed, merge=merge, order=order, packed=packed)
        for delta, routed, merge, order, packed in (
            (False, False, "density", "oldest_first", False), (True, False, "mass", "newest_first", True),
            (False, True, "mass", "oldest_first", True), (True, True, "density", "newest_first", False),
        )
    ]


def error(x, expected):
    """Relative error in the 2-norm; infinite where a value is not finite."""
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    assert x.shape == expected.shape, (x.shape, expected.shape)
    off, norm = np.linalg.norm(x - expected), np.linalg.norm(expected)
    return 0.0 if off == 0 else (off / norm if np.isfinite(off) and norm > 0 else np.inf)


def assert_close(name, x, expected, bound):
    off = error(x, expected)
    assert off <= bound, f"{name}: relative error {off:.2e}, bound {bound:.0e}"

#!/usr/bin/env python3
"""This crate beside what a user would take instead, in one process on one GPU.

    python benches/peers/peers.py --out FOLDER [--sizes S1,S3] [--passes forward,forward_backward]

Times `dla.torch.dla` (gated and gated delta rule, given and routed reads) and, of those that are installed,
flash-linear-attention's log_linear_attn, chunk_gated_delta_rule and chunk_simple_gla, and PyTorch's causal attention. bf16, median
of CUDA events, L2 flushed before every call, inputs rotated. Writes peers.json, peers.md and, with matplotlib, peers.svg.
A peer that is not installed, or that fails, is named with its reason and left out.

Sizes are B, T, heads, head size as in evidence/. Every token opens a slot (tau = 0), so that a merge happens at every token.
"""
import argparse
import datetime
import importlib
import json
import pathlib
import statistics
import sys

import torch
import torch.nn.functional as F

SIZES = {
    "S1": (4, 4096, 16, 128),
    "S2": (2, 8192, 16, 128),
    "S3": (1, 32768, 16, 128),
    "S4": (1, 131072, 8, 128),
    "S5": (8, 2048, 32, 64),
    "S6": (32, 1024, 16, 128),
}
PASSES = ("forward", "forward_backward")
CAPACITY = 30
SETS = 2  # inputs, taken in turn
WARM_UP, REPEATS = 3, 11
FLUSH_BYTES = 256 << 20


def draw(size, seed):
    """Arguments of every peer, bf16: keys of unit norm, log decays in [-0.1, 0], write strengths in [0, 1]."""
    batch, time, heads, width = SIZES[size]
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, device="cuda", dtype=torch.float32)

    def bf16(x):
        return x.to(torch.bfloat16)

    rows = (batch, time, heads, width)
    levels = max(time - 1, 1).bit_length() + 1
    return {
        "q": bf16(normal(*rows)),
        "k": bf16(F.normalize(normal(*rows), dim=-1)),
        "v": bf16(normal(*rows)),
        "g": uniform(-0.1, 0.0, batch, time, heads),
        "beta": uniform(0.0, 1.0, batch, time, heads),
        "lam": uniform(0.05, 1.5, batch, time, heads, CAPACITY),
        "level_scales": uniform(0.05, 1.5, batch, time, heads, levels),
        "slope": torch.full((heads,), 8.0, device="cuda"),
        "bias": torch.zeros(heads, device="cuda"),
        "do": bf16(normal(*rows)),
    }


def ours(recurrence, read):
    dla = importlib.import_module("dla.torch").dla

    def call(x):
        reads = {"lam": x["lam"]} if read == "given" else {"route": (x["slope"], x["bias"], None)}
        beta = x["beta"] if recurrence == "delta" else None
        return dla(x["q"], x["k"], x["v"], x["g"], beta, capacity=CAPACITY, tau=0.0, merge="density", **reads)[0]

    names = ["q", "k", "v", "g"] + (["beta"] if recurrence == "delta" else [])
    return call, names + (["lam"] if read == "given" else ["slope", "bias"])


def log_linear():
    op = importlib.import_module("fla.ops.log_linear_attn").chunk_log_linear_attn
    return lambda x: op(x["q"], x["k"], x["v"], x["g"], x["level_scales"])[0], ["q", "k", "v", "g", "level_scales"]


def gated_deltanet():
    op = importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    return lambda x: op(x["q"], x["k"], x["v"], x["g"], x["beta"])[0], ["q", "k", "v", "g", "beta"]


def simple_gla():
    op = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    return lambda x: op(x["q"], x["k"], x["v"], x["g"])[0], ["q", "k", "v", "g"]


def softmax():
    def call(x):
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        backends = [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, torch.nn.attention.SDPBackend.FLASH_ATTENTION]
        with torch.nn.attention.sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return call, ["q", "k", "v"]


PEERS = {
    "dla gated": lambda: ours("gated", "given"),
    "dla gated, routed": lambda: ours("gated", "routed"),
    "dla delta": lambda: ours("delta", "given"),
    "dla delta, routed": lambda: ours("delta", "routed"),
    "Log-Linear Attention": log_linear,
    "Gated DeltaNet": gated_deltanet,
    "simple GLA": simple_gla,
    "softmax attention": softmax,
}


def measure(make, size, name, flush):
    """Median milliseconds of a pass, and the most memory it held beside its arguments, in MB."""
    call, differentiated = make()
    sets = [draw(size, seed) for seed in range(SETS)]
    backward = name == "forward_backward"
    if backward:
        for x in sets:
            for argument in differentiated:
                x[argument].requires_grad_()
    times = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    for repeat in range(WARM_UP + REPEATS):
        x = sets[repeat % SETS]
        for argument in differentiated:
            x[argument].grad = None
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.set_grad_enabled(backward):
            start.record()
            o = call(x)
            if backward:
                o.backward(x["do"])
            end.record()
        torch.cuda.synchronize()
        if repeat >= WARM_UP:
            times.append(start.elapsed_time(end))
        del o
    return statistics.median(times), (torch.cuda.max_memory_allocated() - held) / 1e6


def versions():
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("dla", "fla", "triton"):
        try:
            module = importlib.import_module(name)
            found[name] = getattr(module, "__version__", "unknown")
        except ImportError:
            continue
    return found


def table(report):
    lines = [f"{report['card']}, {report['date']}, " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()), ""]
    for name in PASSES:
        rows = [row for row in report["rows"] if row["pass"] == name]
        sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
        if not sizes:
            continue
        lines += [f"{name}, ms", "", "| | " + " | ".join(sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
        for peer in PEERS:
            times = {row["size"]: row["ms"] for row in rows if row["peer"] == peer}
            if times:
                cells = [f"{times[size]:.2f}" if size in times else "" for size in sizes]
                lines.append(f"| {peer} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [f"{row['peer']}, {row['size']}, {row['pass']}: {row['why']}" for row in report["left_out"]]
    return "\n".join(lines) + "\n"


def plot(report, path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: no plot")
        return
    figure, axes = pyplot.subplots(1, len(PASSES), figsize=(12, 4.5), squeeze=False)
    # Nanoseconds a token and head at head size 128: the sizes differ in tokens as well as in T.
    for axis, name in zip(axes[0], PASSES):
        for peer in PEERS:
            points = sorted(
                (SIZES[row["size"]][1], 1e6 * row["ms"] / (SIZES[row["size"]][0] * SIZES[row["size"]][1] * SIZES[row["size"]][2]))
                for row in report["rows"]
                if row["pass"] == name and row["peer"] == peer and SIZES[row["size"]][3] == 128
            )
            if points:
                axis.loglog(*zip(*points), marker="o", label=peer, linewidth=2 if peer.startswith("dla") else 1)
        axis.set_title(name.replace("_", " + "))
        axis.set_xlabel("T")
        axis.set_ylabel("ns a token and head")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{report['card']}, head size 128, bf16", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for peers.json, peers.md and peers.svg")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--peers", default=",".join(PEERS).replace(", ", ";"), help="names, a comma between; ; stands for their own comma")
    options = parser.parse_args()
    sizes, passes = options.sizes.split(","), options.passes.split(",")
    peers = [name.replace(";", ", ") for name in options.peers.split(",")]
    for given, known in ((sizes, SIZES), (passes, PASSES), (peers, PEERS)):
        for name in given:
            if name not in known:
                sys.exit(f"{name}: expected one of {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit("no GPU: PyTorch finds no CUDA device")

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    rows, left_out = [], []
    for size in sizes:
        for peer in peers:
            for name in passes:
                torch.cuda.empty_cache()
                try:
                    ms, peak_mb = measure(PEERS[peer], size, name, flush)
                except Exception as error:  # whatever a peer raises is a reason to leave it out, not to stop
                    why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    left_out.append({"peer": peer, "size": size, "pass": name, "why": why})
                    print(f"{size} {peer} {name}: left out: {why}", flush=True)
                    continue
                rows.append({"peer": peer, "size": size, "pass": name, "ms": ms, "peak_mb": peak_mb})
                print(f"{size} {peer} {name}: {ms:.3f} ms, {peak_mb:.0f} MB", flush=True)
    report = {
        "card": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "dtype": "bf16",
        "capacity": CAPACITY,
        "rows": rows,
        "left_out": left_out,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "peers.md").write_text(table(report))
    plot(report, options.out / "peers.svg")
    print(table(report))


if __name__ == "__main__":
    main()

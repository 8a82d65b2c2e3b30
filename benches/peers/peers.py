#!/usr/bin/env python3
"""This crate beside what a user would take instead, on one GPU, in one run.

    python benches/peers/peers.py --out FOLDER [--sizes S1,S3] [--passes forward,forward_backward] [--minutes 9]
    python benches/peers/peers.py --out FOLDER --more                go on from what FOLDER holds of the same card and versions
    python benches/peers/peers.py --out FOLDER --device cpu          small sizes, to see that all of this runs: no measure of speed
    python benches/peers/peers.py --out FOLDER --report              table and plot of what is there
    python benches/peers/peers.py --out FOLDER --readme README.md    verdict and table, put into that file

Times `dla.torch.dla` (gated and gated delta rule, given and routed reads) and, of those that are installed,
flash-linear-attention's log_linear_attn, chunk_gated_delta_rule and chunk_simple_gla, and PyTorch's causal attention. bf16, median
of CUDA events, L2 flushed before every call, inputs rotated. Passes: forward; forward_backward; error, the relative error of the
output and of the gradients of q, k, v against float64 at 256 tokens; decode, one token on states (or a softmax cache of 8,192 keys),
a graph replayed where one can be captured. Writes peers.json, peers.md and, with matplotlib, peers.svg.

Every peer is a process of its own. What fails, or takes more than --seconds (compiling included), is named with its reason and left
out. Results are written as they come.

Sizes are B, T, heads, head size as in evidence/. Every token opens a slot (tau = 0), so that a merge happens at every token.
"""
import argparse
import datetime
import importlib
import json
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time as clock

SIZES = {
    "S1": (4, 4096, 16, 128),
    "S2": (2, 8192, 16, 128),
    "S3": (1, 32768, 16, 128),
    "S4": (1, 131072, 8, 128),
    "S5": (8, 2048, 32, 64),
    "S6": (32, 1024, 16, 128),
}
DECODE_SIZES = {"B1": (1, 1, 16, 128), "B32": (32, 1, 16, 128), "B256": (256, 1, 16, 128)}
ERROR_SIZE = {"E": (1, 256, 2, 64), "E128": (1, 256, 2, 128)}
# On a CPU.
SMALL = {"C1": (1, 192, 2, 16), "C2": (2, 96, 2, 32)}
SMALL_DECODE = {"B1": (1, 1, 2, 16), "B3": (3, 1, 2, 16)}
SMALL_ERROR = {"E": (1, 80, 2, 16)}
PASSES = ("forward", "forward_backward", "error", "decode")
CAPACITY = 30
SOFTMAX_CACHE = 8192
NO_TIME = "no time left"
SETS = 2  # inputs, taken in turn
WARM_UP, REPEATS = 3, 11
FLUSH_BYTES = 256 << 20


def sizes_of(name, device):
    """Of a pass."""
    if name == "decode":
        return SMALL_DECODE if device == "cpu" else DECODE_SIZES
    if name == "error":
        return SMALL_ERROR if device == "cpu" else ERROR_SIZE
    return SMALL if device == "cpu" else SIZES


def levels(time):
    return max(time - 1, 1).bit_length() + 1


def draw(shape, seed, device):
    """Arguments of every peer, bf16: keys of unit norm, log decays in [-0.1, 0], write strengths in [0, 1]."""
    import torch
    import torch.nn.functional as F

    batch, time, heads, width = shape
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator, device=device, dtype=torch.float32)

    def bf16(x):
        return x.to(torch.bfloat16)

    rows = (batch, time, heads, width)
    return {
        "q": bf16(normal(*rows)),
        "k": bf16(F.normalize(normal(*rows), dim=-1)),
        "v": bf16(normal(*rows)),
        "g": uniform(-0.1, 0.0, batch, time, heads),
        "beta": uniform(0.0, 1.0, batch, time, heads),
        "lam": uniform(0.05, 1.5, batch, time, heads, CAPACITY),
        "level_scales": uniform(0.05, 1.5, batch, time, heads, levels(time)),
        "slope": torch.full((heads,), 8.0, device=device),
        "bias": torch.zeros(heads, device=device),
        "do": bf16(normal(*rows)),
    }


class Ours:
    def __init__(self, recurrence, read):
        self.op = importlib.import_module("dla.torch")
        self.delta, self.read = recurrence == "delta", read
        self.differentiated = ["q", "k", "v", "g"] + (["beta"] if self.delta else [])
        self.differentiated += ["lam"] if read == "given" else ["slope", "bias"]

    def arguments(self, x):
        reads = {"lam": x["lam"]} if self.read == "given" else {"route": (x["slope"], x["bias"], None)}
        given = (x["q"], x["k"], x["v"], x["g"], x["beta"] if self.delta else None)
        return given, dict(reads, capacity=CAPACITY, tau=0.0, merge="density")

    def call(self, x, **more):
        given, named = self.arguments(x)
        return self.op.dla(*given, **named, **more)[0]

    def decode(self, x, device):
        """One token on full states."""
        batch, _, heads, width = x["v"].shape
        full = draw((batch, 2 * CAPACITY, heads, width), 7, device)
        given, named = self.arguments(full)
        state = self.op.dla(*given, **named, output_final_state=True)[1]
        given, named = self.arguments(x)
        return lambda: self.op.step(*given, **named, state=state)[0]

    def exact(self, x, low):
        """In float64; the log as the operator decided it."""
        given, named = self.arguments(low)
        log = self.op.dla(*given, **named, return_log=True)[2]
        return recurrence(x, slots(log.events), x["beta"] if self.delta else None, x["lam"] if self.read == "given" else None)


def slots(events):
    """The slot of every earlier token at every token, [B,H,T,T] (-1: not there yet), by replay of the log."""
    import torch

    events = events.cpu()
    batch, time, heads = events.shape
    found = torch.full((batch, heads, time, time), -1)
    for b in range(batch):
        for h in range(heads):
            place, held = [], 0
            for t in range(time):
                event = int(events[b, t, h])
                if event >= 2:
                    place = [slot - (slot > event - 2) for slot in place]
                    held -= 1
                held += event > 0
                place.append(held - 1)
                found[b, h, t, : t + 1] = torch.tensor(place)
    return found


def recurrence(x, slot=None, beta=None, lam=None):
    """o in float64, token by token over what every token's write has become; lam [B,T,H,L] by `slot` [B,H,T,T]; without lam but
    with slots, routed reads; without slots, one state."""
    import torch

    q, k, v, g = (x[name].transpose(1, 2) for name in ("q", "k", "v", "g"))
    time, scale = q.shape[2], q.shape[3] ** -0.5
    slot = None if slot is None else slot.to(q.device)
    writes, outputs = k[:, :, :0], []
    for t in range(time):
        writes = g[:, :, t, None, None].exp() * writes
        written = k[:, :, t]
        if beta is not None:
            strength = beta.transpose(1, 2)[:, :, t, None, None]
            writes = writes - strength * (writes @ written.unsqueeze(3)) * written.unsqueeze(2)
            written = strength[..., 0] * written
        writes = torch.cat([writes, written.unsqueeze(2)], 2)
        weights = (writes @ q[:, :, t].unsqueeze(3)).squeeze(3)
        if slot is not None:
            at = slot[:, :, t, : t + 1]
            if lam is not None:
                read = lam[:, t]
            else:
                member = torch.nn.functional.one_hot(at, CAPACITY).to(q.dtype)
                kappa = (member.transpose(2, 3) @ k[:, :, : t + 1]) / member.sum(2).clamp(min=1).unsqueeze(3)
                score = (kappa @ q[:, :, t].unsqueeze(3)).squeeze(3)
                read = torch.sigmoid(x["slope"][:, None] * score + x["bias"][:, None])
            weights = weights * read.gather(2, at)
        outputs.append(scale * (weights.unsqueeze(2) @ v[:, :, : t + 1]).squeeze(2))
    return torch.stack(outputs, 1)


class LogLinear:
    differentiated = ["q", "k", "v", "g", "level_scales"]

    def __init__(self):
        self.op = importlib.import_module("fla.ops.log_linear_attn").chunk_log_linear_attn

    def call(self, x):
        # Its kernel multiplies the scales into scores of q's dtype and does not compile with others; its own scale is 1.
        scales = x["level_scales"].to(x["q"].dtype)
        return self.op(x["q"], x["k"], x["v"], x["g"], scales, scale=x["q"].shape[3] ** -0.5)[0]

    def exact(self, x, low):
        import torch

        at = torch.arange(low["q"].shape[1])
        level = torch.frexp((at[:, None] ^ at).float()).exponent.long()
        return recurrence(x, level.expand(*low["v"].shape[:1], low["v"].shape[2], -1, -1), None, x["level_scales"])


def triton_check_off():
    """flash-linear-attention refuses its gated backward on Hopper with Triton 3.6 (its issue 640); its gradients are looked at here,
    by the error pass."""
    common = importlib.import_module("fla.ops.common.chunk_o")
    if hasattr(common, "TRITON_ABOVE_3_7_1"):
        common.TRITON_ABOVE_3_7_1 = True


class GatedDeltaNet:
    differentiated = ["q", "k", "v", "g", "beta"]

    def __init__(self):
        self.op = importlib.import_module("fla.ops.gated_delta_rule")
        triton_check_off()

    def call(self, x):
        return self.op.chunk_gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"])[0]

    def decode(self, x, device):
        import torch

        batch, _, heads, width = x["v"].shape
        state = torch.randn(batch, heads, width, width, device=device)
        named = dict(g=x["g"], beta=x["beta"], initial_state=state, output_final_state=True)
        return lambda: self.op.fused_recurrent_gated_delta_rule(x["q"], x["k"], x["v"], **named)[0]

    def exact(self, x, low):
        return recurrence(x, None, x["beta"])


class SimpleGla:
    differentiated = ["q", "k", "v", "g"]

    def __init__(self):
        self.op = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        triton_check_off()

    def call(self, x):
        return self.op(x["q"], x["k"], x["v"], x["g"])[0]

    def exact(self, x, low):
        return recurrence(x)


class Softmax:
    differentiated = ["q", "k", "v"]

    def attend(self, q, k, v, causal):
        import torch
        import torch.nn.functional as F

        backend = torch.nn.attention.SDPBackend
        backends = [backend.CUDNN_ATTENTION, backend.FLASH_ATTENTION] if q.is_cuda else [backend.FLASH_ATTENTION, backend.MATH]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(backends, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    def call(self, x):
        return self.attend(x["q"], x["k"], x["v"], True)

    def decode(self, x, device):
        batch, _, heads, width = x["v"].shape
        cache = draw((batch, SOFTMAX_CACHE, heads, width), 7, device)
        return lambda: self.attend(x["q"], cache["k"], cache["v"], False)

    def exact(self, x, low):
        import torch

        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        return (scores.masked_fill(later, -torch.inf).softmax(3) @ v).transpose(1, 2)


PEERS = {
    "dla gated": lambda: Ours("gated", "given"),
    "dla gated, routed": lambda: Ours("gated", "routed"),
    "dla delta": lambda: Ours("delta", "given"),
    "dla delta, routed": lambda: Ours("delta", "routed"),
    "Log-Linear Attention": LogLinear,
    "Gated DeltaNet": GatedDeltaNet,
    "simple GLA": SimpleGla,
    "softmax attention": Softmax,
}


class Clock:
    """Milliseconds of a call: by the GPU's events after a flush of L2, or by the wall."""

    def __init__(self, device):
        import torch

        self.torch, self.gpu = torch, device == "cuda"
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if self.gpu else None

    def ms(self, call):
        if not self.gpu:
            start = clock.perf_counter()
            call()
            return 1e3 * (clock.perf_counter() - start)
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        call()
        end.record()
        self.torch.cuda.synchronize()
        return start.elapsed_time(end)


def measure(peer, shape, name, timer, device):
    """Milliseconds of a pass, and the most memory it held beside its arguments, in MB."""
    import torch

    sets = [draw(shape, seed, device) for seed in range(SETS)]
    backward = name == "forward_backward"
    if backward:
        for x in sets:
            for argument in peer.differentiated:
                x[argument].requires_grad_()
    times, held = [], 0
    if timer.gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    for repeat in range(WARM_UP + REPEATS):
        x = sets[repeat % SETS]
        for argument in peer.differentiated:
            x[argument].grad = None

        def call():
            with torch.set_grad_enabled(backward):
                o = peer.call(x)
                if backward:
                    o.backward(x["do"])

        ms = timer.ms(call)
        if repeat >= WARM_UP:
            times.append(ms)
    peak = torch.cuda.max_memory_allocated() - held if timer.gpu else 0
    return {"ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times), "peak_mb": peak / 1e6}


def decode(peer, shape, timer, device):
    import torch

    if not hasattr(peer, "decode"):
        raise NotImplementedError("no decode here")
    with torch.no_grad():
        call, how = peer.decode(draw(shape, 1, device), device), "eager"
        for _ in range(WARM_UP):
            call()
        if timer.gpu:
            stream = torch.cuda.Stream()
            try:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP):
                        call()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    call()
                call, how = graph.replay, "graph"
            except Exception as error:
                torch.cuda.synchronize()
                how = f"eager ({str(error).splitlines()[0][:80]})"
        times = [timer.ms(call) for _ in range(3 * REPEATS)]
    return {"ms": statistics.median(times), "least_ms": min(times), "most_ms": max(times), "how": how}


def error(peer, shape, device):
    """Relative errors in the 2-norm, against float64 of the same bf16 arguments."""
    import torch

    low = draw(shape, 3, device)
    exact = {name: x.double() for name, x in low.items()}
    names = [name for name in ("q", "k", "v") if name in peer.differentiated]
    results = []
    for x, call in ((low, peer.call), (exact, lambda x: peer.exact(x, {n: y.detach() for n, y in low.items()}))):
        for name in names:
            x[name].requires_grad_()
        o = call(x)
        o.backward(x["do"].to(o.dtype))
        results.append({"o": o.detach(), **{f"d{name}": x[name].grad for name in names}})

    def off(x, expected):
        return ((x.double() - expected).norm() / expected.norm()).item()

    return {"relative_error": {name: off(x, results[1][name]) for name, x in results[0].items()}}


def said(reason):
    """An error's first line, and its last: compilers begin with the place and end with the cause."""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()] or [""]
    return " ... ".join(dict.fromkeys((lines[0][:200], lines[-1][:200])))


def child(options):
    """One peer: every size and pass that stdin names, a line of JSON each; a line back as each is done."""
    import torch

    torch.manual_seed(0)
    timer, peer = Clock(options.device), None
    for line in sys.stdin:
        size, name = json.loads(line)
        shape = sizes_of(name, options.device)[size]
        try:
            peer = peer or PEERS[options.child]()
            if name == "decode":
                found = decode(peer, shape, timer, options.device)
            elif name == "error":
                found = error(peer, shape, options.device)
            else:
                found = measure(peer, shape, name, timer, options.device)
        except Exception as reason:  # whatever a peer raises is a reason to leave it out, not to stop
            found = {"why": f"{type(reason).__name__}: {said(reason)}"}
        if options.device == "cuda":
            torch.cuda.empty_cache()  # the other peers need it
        print("\n" + MARK + json.dumps(found), flush=True)


MARK = "peers:"


class Child:
    """A process that measures one peer, and its answers."""

    def __init__(self, peer, device):
        command = [sys.executable, __file__, "--child", peer, "--device", device]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.answers, self.last = queue.Queue(), ""
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.answers.put(json.loads(line[len(MARK):]))
            elif line.strip():
                self.last = line.strip()[:200]
        self.answers.put(None)

    def ask(self, size, name, seconds):
        """What was found, and whether the process is still of use."""
        try:
            self.process.stdin.write(json.dumps([size, name]) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=seconds)
        except queue.Empty:
            self.end()
            return {"why": f"more than {seconds:.0f} s"}, False
        except OSError:
            answer = None
        if answer is None:
            self.end()
            return {"why": f"the process ended: {self.last}"}, False
        return answer, not any(word in answer.get("why", "") for word in ("CUDA error", "illegal memory", "AcceleratorError"))

    def end(self):
        self.process.kill()
        self.process.wait()


def facts(device):
    """Card and versions, asked of a process that ends: this one holds no GPU memory."""
    text = (
        "import importlib, json, torch\n"
        f"card = torch.cuda.get_device_name() if {device!r} == 'cuda' else 'CPU'\n"
        "found = {'torch': torch.__version__, 'cuda': torch.version.cuda}\n"
        "for name in ('dla', 'fla', 'triton'):\n"
        "    try: found[name] = getattr(importlib.import_module(name), '__version__', 'unknown')\n"
        "    except ImportError: pass\n"
        "print(json.dumps({'card': card, 'versions': found}))"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"PyTorch finds no {device} device: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cell(row, name):
    if name == "error":
        return " ".join(f"{key} {value:.1e}" for key, value in row["relative_error"].items())
    if name == "decode":
        return f"{1e3 * row['ms']:.1f}"
    return f"{row['ms']:.2f}"


TITLES = {
    "forward": "Forward, ms", "forward_backward": "Forward + backward, ms", "error": "Relative error against float64",
    "decode": "Decode, one token, microseconds",
}


def table(report):
    lines = [f"{report['card']}, {report['date']}, " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()), ""]
    for name in PASSES:
        rows = [row for row in report["rows"] if row["pass"] == name]
        sizes = [size for size in sizes_of(name, report["device"]) if any(row["size"] == size for row in rows)]
        if not sizes:
            continue
        lines += [TITLES[name], "", "| | " + " | ".join(sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
        for peer in PEERS:
            cells = {row["size"]: cell(row, name) for row in rows if row["peer"] == peer}
            if cells:
                lines.append(f"| {peer} | " + " | ".join(cells.get(size, "") for size in sizes) + " |")
        lines.append("")
    peaks = [row for row in report["rows"] if row.get("peak_mb")]
    if peaks:
        sizes = [size for size in SIZES if any(row["size"] == size for row in peaks)]
        lines += ["Most memory beside the arguments, forward + backward, MB", "", "| | " + " | ".join(sizes) + " |",
                  "| --- " * (len(sizes) + 1) + "|"]
        for peer in PEERS:
            cells = {r["size"]: f"{r['peak_mb']:.0f}" for r in peaks if r["peer"] == peer and r["pass"] == "forward_backward"}
            if cells:
                lines.append(f"| {peer} | " + " | ".join(cells.get(size, "") for size in sizes) + " |")
        lines.append("")
    late = [row for row in report["left_out"] if row["why"] == NO_TIME]
    lines += [f"left out: {row['peer']}, {row['size']}, {row['pass']}: {row['why']}" for row in report["left_out"] if row not in late]
    if late:
        lines.append(f"left out: {len(late)} more, for which no time was left (`--more` goes on)")
    return "\n".join(lines) + "\n"


# Ours beside a peer of the same recurrence, and how it is asked for: at most so many times the peer's time.
BESIDE = (
    ("dla gated", "simple GLA", 1), ("dla delta", "Gated DeltaNet", 1), ("dla gated", "Gated DeltaNet", 1),
    ("dla gated", "Log-Linear Attention", 1 / 8), ("dla gated", "softmax attention", 1),
)


def verdict(report):
    """Markdown: ratios of times of this one run, and the sizes where each aim is missed."""
    ms = {(row["peer"], row["size"], row["pass"]): row["ms"] for row in report["rows"] if "ms" in row}
    lines = []
    for name in PASSES[:2]:
        sizes = sizes_of(name, report["device"])
        lines += [f"{TITLES[name].split(',')[0]}, the peer's time over ours (above 1: ours is faster)", "",
                  "| | " + " | ".join(sizes) + " |", "| --- " * (len(sizes) + 1) + "|"]
        missed = []
        for ours, peer, most in BESIDE:
            cells = []
            for size in sizes:
                pair = [ms.get((which, size, name)) for which in (ours, peer)]
                cells.append("not run" if None in pair else f"{pair[1] / pair[0]:.2f}")
                if None not in pair and pair[0] > most * pair[1]:
                    missed.append((peer, ours, size))
            lines.append(f"| {peer} / {ours} | {' | '.join(cells)} |")
        lines.append("")
        for ours, peer, most in BESIDE:
            at = [size for of, by, size in missed if (of, by) == (peer, ours)]
            if at:
                aim = "is faster than" if most == 1 else f"is not {1 / most:.0f} times as slow as"
                lines.append(f"- {peer} {aim} {ours} at {', '.join(at)}")
        if missed:
            lines.append("")
    return "\n".join(lines)


def plot(report, path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: no plot")
        return
    timed = PASSES[:2]
    figure, axes = pyplot.subplots(1, len(timed), figsize=(12, 4.5), squeeze=False)
    # Nanoseconds a token and head at the first size's head size: the sizes differ in tokens as well as in T.
    for axis, name in zip(axes[0], timed):
        sizes = sizes_of(name, report["device"])
        width = next(iter(sizes.values()))[3]
        for peer in PEERS:
            points = sorted(
                (sizes[row["size"]][1], 1e6 * row["ms"] / (sizes[row["size"]][0] * sizes[row["size"]][1] * sizes[row["size"]][2]))
                for row in report["rows"]
                if row["pass"] == name and row["peer"] == peer and sizes[row["size"]][3] == width
            )
            if points:
                axis.loglog(*zip(*points), marker="o", label=peer, linewidth=2 if peer.startswith("dla") else 1)
        axis.set(title=TITLES[name].split(",")[0], xlabel="T", ylabel="ns a token and head")
        axis.grid(True, which="both", alpha=0.3)
    if axes[0][0].get_legend_handles_labels()[0]:
        axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{report['card']}, head size {width}, bf16", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def save(report, out):
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "peers.partial"
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out / "peers.json")
    (out / "peers.md").write_text(table(report))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder for peers.json, peers.md and peers.svg")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", help="of the forward and backward; all")
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--peers", default=",".join(PEERS).replace(", ", ";"), help="names, a comma between; ; stands for their own comma")
    parser.add_argument("--seconds", type=float, default=150, help="most for one peer, size and pass")
    parser.add_argument("--minutes", type=float, default=1e6, help="most for all")
    parser.add_argument("--more", action="store_true", help="keep what --out holds and do what is missing")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--readme", type=pathlib.Path, help="measure nothing; put verdict and table between this file's marks")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    if options.out is None:
        parser.error("--out: missing")
    kept = options.out / "peers.json"
    if options.readme:
        sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "python" / "examples"))
        from recall import put

        report = json.loads(kept.read_text())
        if report["device"] != "cuda":
            sys.exit(f"{kept}: of a CPU: no measure of speed")
        put(options.readme, "peers", f"{table(report)}\n{verdict(report)}")
        return
    if options.report:
        report = json.loads(kept.read_text())
        save(report, options.out)
        plot(report, options.out / "peers.svg")
        print(table(report))
        return
    every = sizes_of("forward", options.device)
    sizes, passes = (options.sizes or ",".join(every)).split(","), options.passes.split(",")
    peers = [name.replace(";", ", ") for name in options.peers.split(",")]
    for given, known in ((sizes, every), (passes, PASSES), (peers, PEERS)):
        for name in given:
            if name not in known:
                sys.exit(f"{name}: expected one of {', '.join(known)}")
    end = clock.monotonic() + 60 * options.minutes
    report = {
        **facts(options.device), "device": options.device, "date": datetime.date.today().isoformat(), "dtype": "bf16",
        "capacity": CAPACITY, "rows": [], "left_out": [],
    }
    if options.more and kept.exists():
        before = json.loads(kept.read_text())
        if all(before[key] == report[key] for key in ("card", "versions", "device", "capacity")):
            report["rows"] = before["rows"]
        else:
            sys.exit(f"{kept}: of another card or other versions: it is not gone on from")
    done = {(row["peer"], row["size"], row["pass"]) for row in report["rows"]}
    # Size by size, all peers of one beside one another in time; their processes stay.
    tasks = [(size, name, peer) for name in ("error", "decode") if name in passes for size in sizes_of(name, options.device) for peer in peers]
    timed = [(size, name, peer) for size in sizes for name in PASSES[:2] if name in passes for peer in peers]
    children = {}
    try:
        for size, name, peer in timed + tasks:
            if (peer, size, name) in done:
                continue
            entry = {"peer": peer, "size": size, "pass": name}
            seconds = min(options.seconds, end - clock.monotonic())
            if seconds <= 0:
                found = {"why": NO_TIME}
            else:
                if peer not in children:
                    children[peer] = Child(peer, options.device)
                found, usable = children[peer].ask(size, name, seconds)
                if not usable:
                    children.pop(peer).end()
            if "why" in found:
                report["left_out"].append({**entry, **found})
                print(f"{size} {peer} {name}: left out: {found['why']}", flush=True)
            else:
                report["rows"].append({**entry, **found})
                print(f"{size} {peer} {name}: {cell(found, name)}", flush=True)
            save(report, options.out)
    finally:
        for process in children.values():
            process.end()
    save(report, options.out)
    plot(report, options.out / "peers.svg")
    print(table(report))


if __name__ == "__main__":
    main()

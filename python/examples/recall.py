#!/usr/bin/env python3
"""Does a bounded memory of many states recall what one state blurs? Trains models alike but for the mixer and writes what came of it.

    python python/examples/recall.py                                 all of it, three seeds
    python python/examples/recall.py --minutes 9 --jobs 4            what fits; the next call goes on from there
    python python/examples/recall.py --only 'recall64/.*gated' --seeds 0
    python python/examples/recall.py --report                        table and plots of what there is
    python python/examples/recall.py --readme README.md              what of it the claims rest on, put into that file
    python python/examples/recall.py --list

Results accumulate in --out (evidence/recall.json), one entry per experiment and seed; beside it recall.md and, with matplotlib, plots.
A run that fails is named with its reason, and tried again by the next call, after the others.
Needs PyTorch and dla; flash-linear-attention for its kernel, safetensors for --activations. Small models leave most of a GPU idle: with
--jobs 9 and NVIDIA's MPS nine take about as long as four of them one after the other.
"""
import argparse
import datetime
import importlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time as clock

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]

# How parameters are drawn, the same for every mixer (models.py): a slow decay, and, where tokens are random, an embedding wide enough
# that their keys differ from the first step.
SLOW = dict(embedding=0.5, A=(1, 1), dt=(0.001, 0.02))
COMMON = dict(layers=2, heads=4, rate=5e-3, test_batches=8, draw=SLOW)
SETTINGS = {
    "recall64": dict(
        COMMON, task="recall", time=256, vocabulary=8192, hidden=64, train_pairs=[64, 32, 16, 8], test_pairs=[8, 16, 32, 64],
        batch=64, steps=2000, warm_up=200, test_read_best=[4, 8, 16],
    ),
    "recall128": dict(
        COMMON, task="recall", time=512, vocabulary=8192, hidden=128, train_pairs=[128, 64, 32, 16],
        test_pairs=[16, 32, 64, 128], batch=64, steps=1500, warm_up=150,
    ),
    "needles": dict(
        COMMON, task="needles", time=1024, needles=64, train_texts=[1, 4, 16, 32], hidden=64, test_times=[1024, 2048, 4096, 8192],
        batch=32, steps=2000, warm_up=200,
    ),
    "bytes": dict(
        COMMON, task="bytes", time=4096, hidden=128, batch=8, steps=1500, warm_up=150, test_batches=16, rate=3e-3,
        draw=dict(embedding=0.02, A=(1, 1), dt=(0.001, 0.1)),
    ),
}
# For looking whether it runs and learns at all, on a CPU in a minute or so each; --tiny.
TINY = {
    "recall64": dict(time=24, vocabulary=16, train_pairs=[3, 2], test_pairs=[2, 3], hidden=32, heads=2, batch=32,
                     test_read_best=[2], steps=1500, rate=5e-3),
    "recall128": dict(time=32, vocabulary=32, train_pairs=[8, 4], test_pairs=[4, 8], hidden=32, heads=2, batch=32, steps=400,
                      rate=1e-2),
    "needles": dict(time=64, needles=4, train_texts=[1, 2], test_times=[64, 128], hidden=32, heads=2, layers=1, batch=32, steps=50),
    "bytes": dict(time=128, hidden=32, heads=2, layers=1, batch=8, test_batches=2, steps=50),
}


def ours(style="gated", merge="mass", read="routed", capacity=30, **more):
    return dict(kind="dla", style=style, merge=merge, read=read, capacity=capacity, **more)


def mixers(style):
    """The mixers of a recurrence, by name."""
    return {
        f"{style}, mass, routed": ours(style),
        f"{style}, mass, routed with logits": ours(style, read="routed_logits"),
        f"{style}, one state": ours(style, read="given", capacity=1),
        f"{style}, density, given (the paper)": ours(style, merge="density", read="given"),
        f"{style}, fixed segments, routed with logits": ours(style, read="routed_logits", segments=30),
        f"{style}, density, routed": ours(style, merge="density"),
        f"{style}, mass, given": ours(style, read="given"),
        f"{style}, fixed segments, given": ours(style, read="given", segments=30),
        f"{style}, fixed segments, routed": ours(style, segments=30),
        f"{style}, density, routed with logits": ours(style, merge="density", read="routed_logits"),
    }


OTHERS = {"softmax attention": dict(kind="softmax"), "Log-Linear": dict(kind="log_linear")}
GATED, DELTA = mixers("gated"), mixers("delta")


def with_capacity(style, m):
    """The mixers whose accuracy over M is asked for, by name."""
    names = ("mass, routed", "fixed segments, routed with logits", "mass, routed with logits", "density, given (the paper)",
             "fixed segments, routed")
    found = {}
    for name in names:
        spec = dict(mixers(style)[f"{style}, {name}"], capacity=m)
        found[f"{style}, {name}, M = {m}"] = dict(spec, segments=m) if spec.get("segments") else spec
    return found


CAPACITIES = {
    name: spec for style in ("gated", "delta") for m in (8, 16) for name, spec in with_capacity(style, m).items()
}
WHAT_MATTERS = {
    "gated, mass, routed, tau 0": ours(tau=0.0),
    "gated, mass, routed, tau 1.0": ours(tau=1.0),
    "gated, mass, routed, soft": ours(soft=(0.1, False), learn_tau=True),
    "gated, mass, routed, soft into k and v": ours(soft=(0.1, True), learn_tau=True),
    "gated, mass, routed, newest first": ours(slot_order="newest_first"),
    "gated, mass, routed with logits, newest first": ours(read="routed_logits", slot_order="newest_first"),
    "gated, density, given, newest first": ours(merge="density", read="given", slot_order="newest_first"),
    "gated, mass, routed, best 4": ours(read_best=4),
    "gated, mass, routed, best 8": ours(read_best=8),
    "gated, mass, routed, best 16": ours(read_best=16),
    "gated, mass, routed, dt to 0.1": ours(draw=dict(SLOW, dt=(0.001, 0.1))),
    "gated, mass, routed, A to 16, dt to 0.1": ours(draw=dict(SLOW, A=(1, 16), dt=(0.001, 0.1))),
}


def named(style, *names):
    """Of a recurrence's mixers, those of these names, in this order."""
    table = {**mixers(style), **CAPACITIES}
    return {f"{style}, {name}": table[f"{style}, {name}"] for name in names}


FIXED, LOGITS = "fixed segments, routed with logits", "mass, routed with logits"
MAIN = ("mass, routed", "one state", FIXED, "density, given (the paper)")
FEWER = tuple(f"{name}, M = {m}" for m in (16, 8) for name in ("mass, routed", FIXED))


def claims(style):
    """What the claims about recall rest on: first what decides them."""
    return {**named(style, *MAIN), **(OTHERS if style == "gated" else {}), **named(style, *FEWER, LOGITS)}


# What is trained, in the order in which it is taken: every line for all its seeds.
EXPERIMENTS = {
    f"{setting}/{name}": (setting, spec)
    for setting, table in (
        ("recall64", claims("gated")), ("recall64", claims("delta")),
        ("needles", {**named("gated", *MAIN), **OTHERS}), ("bytes", {**named("gated", *MAIN), **OTHERS}),
        ("recall64", CAPACITIES), ("recall64", WHAT_MATTERS), ("recall128", {**named("gated", *MAIN, LOGITS), **OTHERS}),
        ("bytes", named("delta", *MAIN, LOGITS)), ("needles", named("delta", *MAIN, LOGITS)), ("recall64", GATED), ("recall64", DELTA),
        ("needles", GATED), ("bytes", GATED),
    )
    for name, spec in table.items()
}
# Whose activations --activations keeps.
KEPT = "bytes/gated, mass, routed"


def as_listed(name, dtype):
    """An experiment's settings and mixer."""
    setting, spec = EXPERIMENTS[name]
    spec = dict(spec)
    settings = dict(SETTINGS[setting], dtype=dtype)
    if "draw" in spec:
        settings["draw"] = spec.pop("draw")
    return settings, spec


def settings_of(name, options):
    settings, spec = as_listed(name, options.dtype)
    if options.tiny:
        settings.update(TINY[EXPERIMENTS[name][0]], test_batches=2)
        settings["warm_up"] = settings["steps"] // 10
        for key, most in (("capacity", 6), ("segments", 6), ("read_best", 2)):
            if spec.get(key):
                spec[key] = min(spec[key], most)
    if options.rate:
        settings.update(rate=options.rate)
    if options.steps:
        settings.update(steps=options.steps, warm_up=max(options.steps // 10, 1))
    return settings, spec


def machine(device):
    import torch

    found = {"torch": torch.__version__, "date": datetime.date.today().isoformat()}
    for name in ("dla", "fla", "triton"):
        try:
            found[name] = getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError:
            continue
    found["card"] = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return found


def child(options):
    """One run, in a process of its own; its result goes to options.run[2]."""
    import torch
    from train import activations, train

    name, seed, path = options.run
    settings, spec = settings_of(name, options)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    result, model = train(
        settings, spec, int(seed), options.device, clock.monotonic() + 60 * options.minutes,
        lambda text: print(f"{name}, seed {seed}: {text}", flush=True),
    )
    if name == KEPT and seed == "0" and options.activations:
        from tasks import standard_library

        options.activations.parent.mkdir(parents=True, exist_ok=True)
        activations(model, standard_library()[1][: options.activation_tokens + 1].to(options.device), options.activations)
    entry = {"name": name, "seed": int(seed), "settings": settings, "mixer": spec, "machine": machine(options.device), **result}
    pathlib.Path(path).write_text(json.dumps(entry))


def load(path):
    return json.loads(path.read_text()) if path.exists() else {"runs": [], "left_out": []}


def save(report, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def repeat_of(report, name, seed, settings, spec):
    """The kept run of these settings, if there is one."""
    wanted = json.loads(json.dumps({"name": name, "seed": seed, "settings": settings, "mixer": spec}))
    for run in report["runs"]:
        if all(run[key] == value for key, value in wanted.items()):
            return run
    return None


def drive(options, names):
    """Runs what is not there yet, `jobs` at a time, until the time is up."""
    end = clock.monotonic() + 60 * options.minutes
    report = load(options.out)
    failed = {(entry["name"], entry["seed"]) for entry in report["left_out"]}
    waiting = []
    for name in names:
        settings, spec = settings_of(name, options)
        for seed in options.seeds:
            if options.again or repeat_of(report, name, seed, settings, spec) is None:
                waiting.append((name, seed))
    waiting.sort(key=lambda run: run in failed)
    print(f"{len(waiting)} runs to do", flush=True)
    scratch = pathlib.Path(tempfile.mkdtemp(prefix="recall-"))
    running, took = {}, {}

    def finish(run, process, log, started, timed_out):
        name, seed = run
        output = log.read_text(errors="replace")
        report["left_out"] = [e for e in report["left_out"] if (e["name"], e["seed"]) != run]
        path = log.with_suffix(".json")
        if process.returncode == 0 and path.exists():
            entry = json.loads(path.read_text())
            report["runs"] = [r for r in report["runs"] if (r["name"], r["seed"]) != run] + [entry]
            took[EXPERIMENTS[name][0]] = clock.monotonic() - started
            what = entry.get("bits_per_byte") or list(entry["accuracy"].values())[-1]
            print(f"{name}, seed {seed}: {what:.4f} in {entry['seconds']} s, {entry['tokens_per_s']} tokens/s", flush=True)
        else:
            lines = output.strip().splitlines()
            why = "stopped: out of time" if timed_out else (lines[-1][:300] if lines else f"exit status {process.returncode}")
            report["left_out"].append({"name": name, "seed": seed, "why": why})
            print(f"{name}, seed {seed}: left out: {why}", flush=True)
        save(report, options.out)

    try:
        while waiting or running:
            now = clock.monotonic()
            # Where such a run was already timed, one that would not be done in time is not begun.
            while waiting and len(running) < options.jobs and now < end:
                at = next((i for i, (name, _) in enumerate(waiting) if now + took.get(EXPERIMENTS[name][0], 0) < end), None)
                if at is None:
                    break
                run = waiting.pop(at)
                log = scratch / f"{len(list(scratch.iterdir()))}.log"
                left = (end - now) / 60
                command = [sys.executable, __file__, "--run", run[0], str(run[1]), str(log.with_suffix(".json")),
                           "--device", options.device, "--dtype", options.dtype, "--minutes", f"{left:.3f}",
                           "--activation-tokens", str(options.activation_tokens)]
                command += ["--tiny"] if options.tiny else []
                command += ["--steps", str(options.steps)] if options.steps else []
                command += ["--rate", str(options.rate)] if options.rate else []
                command += ["--activations", str(options.activations)] if options.activations else []
                process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)
                running[run] = (process, log, now)
            if not running:
                break
            clock.sleep(0.2)
            for run, (process, log, started) in list(running.items()):
                timed_out = clock.monotonic() > end + 10
                if timed_out and process.poll() is None:
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    del running[run]
                    finish(run, process, log, started, timed_out)
    finally:
        for process, _, _ in running.values():
            process.kill()
    print(f"{len(waiting)} runs are left for another call", flush=True)
    return report


def spread(values):
    """Mean, and least and most where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def grouped(report, setting):
    """Runs of a setting by mixer, in the order of EXPERIMENTS."""
    found = {}
    for name in EXPERIMENTS:
        if name.split("/")[0] == setting:
            runs = [run for run in report["runs"] if run["name"] == name]
            if runs:
                found[name.split("/", 1)[1]] = runs
    return found


def table(report):
    """Markdown: of every setting a row a mixer, mean (least to most) of the seeds."""
    lines = []
    titles = {
        "recall64": "Recall (MQAR), 64 pairs trained, heads of 16: accuracy by pairs",
        "recall128": "Recall (MQAR), 128 pairs trained, heads of 32: accuracy by pairs",
        "needles": "Needles in repetitive filler, trained at T = 1,024: accuracy by length",
        "bytes": "Bytes of the Python standard library, T = 4,096: bits a byte",
    }
    for setting, title in titles.items():
        rows = grouped(report, setting)
        if not rows:
            continue
        everything = [run for runs in rows.values() for run in runs]
        tests = list(max((run["accuracy"] for run in everything), key=len))
        columns = ["all", "last quarter"] if setting == "bytes" else tests
        lines += [title, "", f"| | {' | '.join(columns)} | seeds | tokens/s | opens a slot | largest slot |"]
        lines.append("| --- " * (len(columns) + 5) + "|")
        for name, runs in rows.items():
            if setting == "bytes":
                cells = [spread([run["bits_per_byte"] for run in runs]), spread([run["bits_by_quarter"][-1] for run in runs])]
            else:
                found = [[run["accuracy"][test] for run in runs if test in run["accuracy"]] for test in tests]
                cells = [spread(values) if values else "" for values in found]
            cells += [str(len(runs)), f"{statistics.fmean(run['tokens_per_s'] for run in runs):,.0f}"]
            layers = [layer for run in runs for layer in run.get("memory", [])]
            if layers:
                cells.append(f"{100 * statistics.fmean(x['boundary_rate'] for x in layers):.0f}%")
                cells.append(f"{statistics.fmean(x['slot_tokens_sorted'][0] for x in layers):.0f}")
            else:
                cells += ["", ""]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
        limited = {name: runs for name, runs in rows.items() if any("read_best" in run for run in runs)}
        if limited:
            counts = sorted({int(n) for runs in limited.values() for run in runs for n in run.get("read_best", {})})
            lines += [f"The same models, only the best so many slots read at test: accuracy at {tests[-1]} pairs", ""]
            lines += [f"| | {' | '.join(map(str, counts))} |", "| --- " * (len(counts) + 1) + "|"]
            for name, runs in limited.items():
                cells = []
                for n in counts:
                    found = [run["read_best"][str(n)] for run in runs if str(n) in run.get("read_best", {})]
                    cells.append(spread(found) if found else "")
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
    cards = sorted({(run["machine"]["card"], run["machine"]["torch"], run["machine"]["date"]) for run in report["runs"]})
    lines += [f"{card}, torch {torch}, {date}" for card, torch, date in cards]
    lines += [f"left out: {entry['name']}, seed {entry['seed']}: {entry['why']}" for entry in report["left_out"]]
    return "\n".join(lines) + "\n"


def as_set(report):
    """The report without runs of other settings than SETTINGS' own (--tiny, --steps, --rate)."""
    def own(run):
        if run["name"] not in EXPERIMENTS:
            return False
        return [run["settings"], run["mixer"]] == json.loads(json.dumps(as_listed(run["name"], run["settings"]["dtype"])))

    return dict(report, runs=[run for run in report["runs"] if own(run)])


def ordered(label, runs, value, ours, other, lower=False):
    """A line: what one mixer came to beside another, or that one was not run. `lower` is better, else higher."""
    lacking = [name for name in (ours, other) if name not in runs]
    if lacking:
        return f"- {label}: not run ({', '.join(lacking)})"
    a, b = ([value(run) for run in runs[name]] for name in (ours, other))
    x, y = ([-n for n in values] if lower else values for values in (a, b))
    verdict = "not ahead"
    if statistics.fmean(x) > statistics.fmean(y):
        verdict = "ahead" if min(x) > max(y) else "ahead in the mean, but the seeds overlap"
    counts = f"{len(a)} and {len(b)}" if len(a) != len(b) else str(len(a))
    return f"- {label}: {ours} {spread(a)}, {other} {spread(b)}: {verdict} (seeds: {counts})"


def summary(report):
    """For the README, Markdown: the claims one by one, the table, and what was not run."""
    report = as_set(report)
    if not report["runs"]:
        return "Nothing has been run: there are no figures of this crate's own.\n"
    most = str(max(SETTINGS["recall64"]["test_pairs"]))
    recall64 = grouped(report, "recall64")

    def accuracy(run):
        return run["accuracy"][most]

    lines = [f"Accuracy at {most} pairs, heads of 16, chance below 0.001; mean (least to most of the seeds).", ""]
    for style in ("gated", "delta"):
        best = f"{style}, mass, routed"
        if best in recall64:
            values = [accuracy(run) for run in recall64[best]]
            met = "reached" if statistics.fmean(values) >= 0.85 else "not reached"
            lines.append(f"- {best}, M = 30: {spread(values)}; 0.85 was aimed at: {met}")
        lines.append(ordered(f"{style}, many states and one", recall64, accuracy, best, f"{style}, one state"))
        if style == "gated":
            lines.append(ordered("the fixed binary schedule", recall64, accuracy, best, "Log-Linear"))
        lines.append(ordered(f"{style}, the paper's rule", recall64, accuracy, best, f"{style}, density, given (the paper)"))
        for m in (30, 16, 8):
            of = "" if m == 30 else f", M = {m}"
            lines.append(ordered(f"{style}, fixed segments at M = {m}", recall64, accuracy, best + of, f"{style}, {FIXED}{of}"))
    in_bytes, beside = grouped(report, "bytes"), ("gated, mass, routed", "gated, one state")
    lines.append(ordered("bits a byte", in_bytes, lambda run: run["bits_per_byte"], *beside, lower=True))
    lines.append(ordered("bits a byte of the last quarter", in_bytes, lambda run: run["bits_by_quarter"][-1], *beside, lower=True))
    lines += ["", table(dict(report, left_out=[])).rstrip(), ""]
    short = []
    for name in EXPERIMENTS:
        seeds = len({run["seed"] for run in report["runs"] if run["name"] == name})
        if seeds < 3:
            short.append((name, seeds))
    if short:
        have = len(EXPERIMENTS) - len(short)
        lines += [f"<details><summary>Of {len(EXPERIMENTS)} experiments {have} have three seeds; the rest</summary>", ""]
        for setting in SETTINGS:
            of = [f"{name.split('/', 1)[1]} ({seeds})" if seeds else name.split("/", 1)[1]
                  for name, seeds in short if name.startswith(setting + "/")]
            if of:
                lines.append(f"- {setting}, not run or (seeds) short of three: " + "; ".join(of))
        lines += ["", "</details>", ""]
    lines += [f"- failed: {entry['name']}, seed {entry['seed']}: {entry['why']}" for entry in report["left_out"]]
    return "\n".join(lines) + "\n"


def put(path, name, text):
    """Puts text between a file's marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    whole, marks = path.read_text(), [f"<!-- {name}: {at} -->" for at in ("begin", "end")]
    if any(whole.count(mark) != 1 for mark in marks) or whole.index(marks[0]) > whole.index(marks[1]):
        sys.exit(f"{path}: expected the line {marks[0]}, then {marks[1]}, each once")
    before, after = whole.split(marks[0])[0], whole.split(marks[1])[1]
    path.write_text(f"{before}{marks[0]}\n\n{text.strip()}\n\n{marks[1]}{after}")


def plots(report, path):
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: no plots")
        return
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))

    def line(axis, name, xs, runs, value):
        means = [statistics.fmean(value(run, x) for run in runs) for x in xs]
        style = dict(linewidth=2) if ", mass" in name else dict(linewidth=1, linestyle="--")
        drawn = axis.plot(xs, means, marker="o", markersize=4, label=name, **style)
        axis.fill_between(xs, [min(value(r, x) for r in runs) for x in xs], [max(value(r, x) for r in runs) for x in xs],
                          alpha=0.12, color=drawn[0].get_color())

    drawn_apart = set(CAPACITIES) | set(WHAT_MATTERS)
    for axis, setting, label in ((axes[0][0], "recall64", "pairs"), (axes[1][0], "needles", "T")):
        for name, runs in grouped(report, setting).items():
            if name not in drawn_apart:
                line(axis, name, sorted(map(int, runs[0]["accuracy"])), runs, lambda run, x: run["accuracy"][str(x)])
        axis.set(xlabel=label, ylabel="accuracy", xscale="log", title=setting)
    by_kind = {}
    for runs in grouped(report, "recall64").values():
        mixer = runs[0]["mixer"]
        if runs[0]["name"].split("/", 1)[1] not in WHAT_MATTERS and mixer.get("capacity", 1) > 1 and mixer["style"] == "gated":
            kind = "fixed segments" if mixer.get("segments") else f", {mixer['merge']}".lstrip(", ")
            by_kind.setdefault(f"{kind}, {mixer['read']}", []).extend(runs)
    for name, runs in by_kind.items():
        xs = sorted({run["mixer"]["capacity"] for run in runs})
        most = max(map(int, runs[0]["accuracy"]))
        values = [[run["accuracy"][str(most)] for run in runs if run["mixer"]["capacity"] == x] for x in xs]
        axes[0][1].errorbar(xs, [statistics.fmean(v) for v in values], marker="o", label=name, capsize=3, yerr=[
            [statistics.fmean(v) - min(v) for v in values], [max(v) - statistics.fmean(v) for v in values]])
    axes[0][1].set(xlabel="M", ylabel="accuracy at the most pairs", title="recall64, gated")
    for name, runs in grouped(report, "bytes").items():
        line(axes[1][1], name, [1, 2, 3, 4], runs, lambda run, x: run["bits_by_quarter"][x - 1])
    axes[1][1].set(xlabel="quarter of the context", ylabel="bits a byte", title="bytes", xticks=[1, 2, 3, 4])
    for axis in axes.flat:
        axis.grid(True, alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "evidence" / "recall.json")
    parser.add_argument("--only", default="", help="experiments whose name this regular expression finds")
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e6, help="time for all; runs that do not fit are left for another call")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time: small models leave most of a GPU idle")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="bfloat16 (autocast) on a GPU, float32 on a CPU")
    parser.add_argument("--steps", type=int, help="in place of the settings' own")
    parser.add_argument("--rate", type=float, help="learning rate in place of the settings' own")
    parser.add_argument("--tiny", action="store_true", help="small sizes: whether it runs and learns at all")
    parser.add_argument("--again", action="store_true", help="what is there already too")
    parser.add_argument("--activations", type=pathlib.Path, help=f"keep activations of '{KEPT}', seed 0, here (safetensors)")
    parser.add_argument("--activation-tokens", type=int, default=3072)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--readme", type=pathlib.Path, help="run nothing; put the summary between this file's marks")
    parser.add_argument("--list", action="store_true", help="names of the experiments")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = [name for name in EXPERIMENTS if re.search(options.only, name)]
    if options.list:
        print("\n".join(names))
        return
    if not names:
        sys.exit(f"--only: no experiment's name has {options.only!r}; --list names them")
    if options.readme:
        put(options.readme, "recall", summary(load(options.out)))
        return
    if not options.report:
        import torch

        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
        if options.run:
            child(options)
            return
    report = load(options.out) if options.report else drive(options, names)
    text = table(report)
    options.out.with_suffix(".md").write_text(text)
    plots(report, options.out.with_suffix(".svg"))
    print(text)


if __name__ == "__main__":
    main()

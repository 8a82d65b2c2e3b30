"""Trains one model on one task and says what it came to."""

import contextlib
import math
import time as clock

import tasks
import torch
from models import Model, places


def learning_rate(step, steps, peak, warm_up):
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


class Task:
    """Batches of a task, drawn from seeds: those of training and of testing never meet."""

    def __init__(self, settings, device):
        self.settings, self.device = settings, device
        self.text = [part.to(device) for part in tasks.standard_library()] if settings["task"] == "bytes" else None
        self.vocabulary = {"recall": settings.get("vocabulary"), "needles": tasks.NEEDLE_VOCABULARY, "bytes": 256}[settings["task"]]

    def generator(self, seed):
        return torch.Generator(self.device).manual_seed(seed)

    def batch(self, generator):
        s = self.settings
        if s["task"] == "bytes":
            return tasks.windows(generator, self.text[0], s["batch"], s["time"], self.device)
        if s["task"] == "recall":
            # As many sequences of every number of pairs.
            each = s["batch"] // len(s["train_pairs"])
            parts = [tasks.recall(generator, each, s["time"], n, self.vocabulary, self.device) for n in s["train_pairs"]]
        else:
            # As many sequences of every number of texts, one after another: needles that are asked for soon are learnt first.
            each = s["batch"] // len(s["train_texts"])
            parts = [
                tuple(
                    x.view(each, s["time"])
                    for x in tasks.needles(generator, each * n, s["time"] // n, s["needles"] // n, device=self.device)
                )
                for n in s["train_texts"]
            ]
        return tuple(torch.cat(part) for part in zip(*parts))

    def tests(self):
        """Name, batches; what a result is over."""
        s, size = self.settings, self.settings["batch"]

        def of(make):
            generator = self.generator(1_000_003)
            return [make(generator) for _ in range(s["test_batches"])]

        if s["task"] == "recall":
            for pairs in s["test_pairs"]:
                yield str(pairs), of(lambda g, n=pairs: tasks.recall(g, size, s["time"], n, self.vocabulary, self.device))
        elif s["task"] == "needles":
            for time in s["test_times"]:
                few = max(size * s["time"] // time, 1)
                yield str(time), of(lambda g, n=few, t=time: tasks.needles(g, n, t, s["needles"], device=self.device))
        else:
            yield "test", of(lambda g: tasks.windows(g, self.text[1], size, s["time"], self.device))


class Graphed:
    """A function of tensors whose shapes stay as they are: called plainly a few times, then captured in a CUDA graph and replayed.
    Steps of so small a model are bound by launches otherwise."""

    PLAIN = 3

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None
        self.stream = torch.cuda.Stream()

    def __call__(self, *given):
        self.calls += 1
        if self.calls <= self.PLAIN:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                found = self.function(*given)
            torch.cuda.current_stream().wait_stream(self.stream)
            return found
        if self.graph is None:
            self.given = [x.clone() for x in given]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.found = self.function(*self.given)
        for kept, x in zip(self.given, given):
            kept.copy_(x)
        self.graph.replay()
        return self.found


def train(settings, spec, seed, device="cpu", until=math.inf, say=lambda text: None):
    """settings: recall.py, SETTINGS; spec: a mixer of recall.py, MIXERS. `until`: time.monotonic() to be done by; training that
    would pass it raises TimeoutError. Returns the result, to be written as JSON, and the model."""
    begin = clock.monotonic()
    torch.manual_seed(seed)
    task = Task(settings, device)
    model = Model(
        spec, vocabulary=task.vocabulary, hidden=settings["hidden"], heads=settings["heads"], layers=settings["layers"],
        time=max([settings["time"], *settings.get("test_times", [])]),
    ).draw(seed, **settings["draw"]).to(device)
    plain = [x for x in model.parameters() if x.ndim < 2 or getattr(x, "_no_weight_decay", False)]
    kept = {id(x) for x in plain}
    on_gpu = torch.device(device).type == "cuda"
    # A graph's kernels read the rate from memory.
    rate = torch.tensor(settings["rate"], device=device) if on_gpu else settings["rate"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [x for x in model.parameters() if id(x) not in kept], "weight_decay": 0.1},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=rate, betas=(0.9, 0.98), fused=on_gpu, capturable=on_gpu,
    )
    half = settings["dtype"] == "bfloat16"

    def cast():
        return torch.autocast(torch.device(device).type, torch.bfloat16) if half else contextlib.nullcontext()

    def synchronize():
        if on_gpu:
            torch.cuda.synchronize()

    def update(tokens, targets, asked):
        with cast():
            loss, _, _ = model.loss(tokens, targets, asked)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    step_of = Graphed(update) if on_gpu else update

    generator, curve, steps = task.generator(seed), [], settings["steps"]
    training_from = None
    for step in range(steps):
        if step == min(10, steps // 2):  # what comes first is slower
            synchronize()
            training_from = (clock.monotonic(), step)
        now = learning_rate(step, steps, settings["rate"], settings["warm_up"])
        for group in optimizer.param_groups:
            if on_gpu:
                group["lr"].fill_(now)
            else:
                group["lr"] = now
        tokens, targets = task.batch(generator)
        loss = step_of(tokens, targets, places(targets))
        if step % max(steps // 20, 1) == 0 or step == steps - 1:
            value = loss.item()
            curve.append([step, round(value, 4)])
            say(f"step {step} loss {value:.4f}")
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}")
            if clock.monotonic() > until:
                raise TimeoutError(f"out of time at step {step} of {steps}")
    synchronize()
    seconds = clock.monotonic() - training_from[0]
    result = {
        "steps": steps, "loss": curve,
        "tokens_per_s": round((steps - training_from[1]) * settings["batch"] * settings["time"] / seconds),
        "parameters": sum(x.numel() for x in model.parameters()),
    }
    result.update(evaluate(model, task, cast))
    result.update(memory(model, task, cast))
    layers = model.layers_of_ours()
    if layers and layers[0].read != "given" and layers[0].read_best is None:
        most = str(max(settings.get("test_pairs", [0])))
        for best in settings.get("test_read_best", []):
            if best < layers[0].options["capacity"]:
                for layer in layers:
                    layer.read_best = best
                result.setdefault("read_best", {})[str(best)] = evaluate(model, task, cast)["accuracy"][most]
        for layer in layers:
            layer.read_best = None
    result["seconds"] = round(clock.monotonic() - begin, 1)
    return result, model


@torch.no_grad()
def evaluate(model, task, cast):
    """accuracy by pairs or length; of bytes, bits each, in all and by quarters of the context."""
    accuracy, bits = {}, []
    for name, batches in task.tests():
        right = asked = 0
        for tokens, targets in batches:
            try:
                with cast():
                    _, logits, wanted = model.loss(tokens, targets)
            except NotImplementedError:  # a length that a mixer cannot take
                break
            right += (logits.argmax(1) == wanted).sum().item()
            asked += wanted.numel()
            if task.settings["task"] == "bytes":
                nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").view(tokens.shape)
                bits.append(nats.double().mean(0) / math.log(2))
        if asked:
            accuracy[name] = right / asked
    if not bits:
        return {"accuracy": accuracy}
    by_place = torch.stack(bits).mean(0)
    quarters = [part.mean().item() for part in by_place.chunk(4)]
    return {"accuracy": accuracy, "bits_per_byte": by_place.mean().item(), "bits_by_quarter": quarters}


@torch.no_grad()
def memory(model, task, cast):
    """Of every layer of ours, on one test batch: share of the tokens that open a slot, and the slots' sizes at the end."""
    layers = model.layers_of_ours()
    if not layers:
        return {}
    _, batches = next(iter(task.tests()))
    for layer in layers:
        layer.record = True
    with cast():
        model.hidden(batches[0][0])
    found = []
    for layer in layers:
        tokens = layer.seen["tokens"].flatten(0, 1).sort(1, descending=True).values.float()
        found.append({
            "boundary_rate": (layer.seen["events"] != 0).float().mean().item(),
            "slot_tokens_sorted": [round(x, 1) for x in tokens.mean(0).tolist()],
        })
        layer.record, layer.seen = False, {}
    return {"memory": found}


def activations(model, text, path, heads=2):
    """Writes what a trained byte model's last layer computes on a text, for a few heads: q, k, v, g, beta (delta), lambda and
    do (of the mean loss), with the text itself. `text`: uint8 [T+1]."""
    from safetensors.torch import save_file

    layer = model.layers_of_ours()[-1]
    layer.record = True
    tokens = text.long()[None]
    loss, _, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
    model.zero_grad()
    loss.backward()
    seen, layer.record, layer.seen = layer.seen, False, {}
    names = {"q": "q", "k": "k", "v": "v", "g": "g", "beta": "beta", "lam": "lambda"}
    tensors = {new: seen[old][:, :, :heads] for old, new in names.items() if seen[old] is not None}
    tensors["do"] = seen["o"].grad[:, :, :heads]
    half = ("q", "k", "v", "do")
    tensors = {
        name: x.detach().to(torch.bfloat16 if name in half else torch.float32).contiguous().cpu() for name, x in tensors.items()
    }
    tensors["text"] = text[:-1].to(torch.uint8).contiguous().cpu()
    save_file(tensors, path, {"source": "dla python/examples, byte model, last layer", "loss_bits": f"{loss.item() / math.log(2):.4f}"})

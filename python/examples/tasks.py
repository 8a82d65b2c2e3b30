"""The three tasks: tokens [B,T] and targets [B,T], int64; a target of -100 is not asked for."""

import pathlib
import sysconfig
import zlib

import torch

IGNORED = -100


def recall(generator, batch, time, pairs, vocabulary, device="cpu"):
    """Multi-query associative recall as in Zoology (arXiv 2312.04927): key and value in turn, then every key once more at a random
    place among random tokens; the target at a key's second place is its value. Keys are the lower half of the vocabulary."""
    half, context = vocabulary // 2, 2 * pairs
    if pairs > half or context + pairs > time:
        raise ValueError(f"pairs: expected at most {min(half, time // 3)}, got {pairs}")

    def distinct(high, count):
        return torch.rand(batch, high, generator=generator, device=device).topk(count, 1).indices

    keys, values = distinct(half, pairs), half + distinct(vocabulary - half, pairs)
    tokens = torch.randint(vocabulary, (batch, time), generator=generator, device=device)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    places = context + distinct(time - context, pairs)
    tokens.scatter_(1, places, keys)
    targets = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
    return tokens, targets


NEEDLE_KEYS = NEEDLE_VALUES = 256
FILLER = 64
NEEDLE_VOCABULARY = NEEDLE_KEYS + NEEDLE_VALUES + FILLER


def needles(generator, batch, time, count, phrase=16, device="cpu"):
    """`count` needles, each a key and its value, strewn over a phrase that repeats; the last `count` tokens ask for every key in
    another order. Tokens: keys, then values, then filler."""
    field = time - count
    if 2 * count > field or count > NEEDLE_KEYS:
        raise ValueError(f"count: expected at most {min(time // 3, NEEDLE_KEYS)}, got {count}")

    def distinct(high):
        return torch.rand(batch, high, generator=generator, device=device).topk(count, 1).indices

    words = torch.randint(FILLER, (batch, phrase), generator=generator, device=device) + NEEDLE_KEYS + NEEDLE_VALUES
    tokens = words.repeat(1, -(-time // phrase))[:, :time].contiguous()
    keys, values = distinct(NEEDLE_KEYS), NEEDLE_KEYS + distinct(NEEDLE_VALUES)
    places = 2 * distinct(field // 2)
    tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
    order = distinct(count)
    tokens[:, field:] = keys.gather(1, order)
    targets = torch.full_like(tokens, IGNORED)
    targets[:, field:] = values.gather(1, order)
    return tokens, targets


def standard_library(most_bytes=24 << 20):
    """Bytes of the Python standard library's sources as uint8: those to learn from, and every tenth file (by a hash of its name) to
    test on."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    learn, test, size = [], [], 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name.startswith(("site-packages/", "dist-packages/")) or size >= most_bytes:
            continue
        text = path.read_bytes()
        size += len(text)
        (test if zlib.crc32(name.encode()) % 10 == 0 else learn).append(text)
    return tuple(torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in (learn, test))


def windows(generator, text, batch, time, device="cpu"):
    """Windows of a text at random places: a byte's target is the next byte."""
    begin = torch.randint(len(text) - time, (batch, 1), generator=generator, device=device)
    found = text.to(device)[begin + torch.arange(time + 1, device=device)].long()
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()

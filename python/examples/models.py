"""Models alike but for what mixes tokens: projections, short convolutions, gates and norms are those of DynamicLinearAttention."""

import zlib

import torch
import torch.nn.functional as F
from dla.torch import DynamicLinearAttention
from torch import nn


class Dla(DynamicLinearAttention):
    """The layer; `segments` equal segments in place of the plan, where given. With `record`, what a call saw is kept in `seen`."""

    def __init__(self, *given, segments=None, **named):
        super().__init__(*given, **named)
        self.segments, self.record, self.seen = segments, False, {}

    def mix(self, q, k, v, g, beta, lam, route, **keywords):
        if self.segments:
            # A token opens a segment wherever the sequence's next 1 / segments begins: never more than the capacity.
            at = torch.arange(v.shape[1], device=v.device) * self.segments // v.shape[1]
            opens = F.pad(at.diff(), (1, 0), value=1).to(torch.uint8)
            keywords["events"] = opens[None, :, None].expand(v.shape[:3]).contiguous()
        if not self.record:
            return super().mix(q, k, v, g, beta, lam, route, **keywords)
        keywords.update(return_log=True, output_final_state=True)
        o, state, log = super().mix(q, k, v, g, beta, lam, route, **keywords)
        if o.requires_grad:
            o.retain_grad()
        self.seen = dict(q=q, k=k, v=v, g=g, beta=beta, lam=lam if log.lam is None else log.lam, o=o, events=log.events,
                         tokens=state.tokens)
        return o, state


class Softmax(DynamicLinearAttention):
    """Causal softmax attention; the gates that it has no use for stay unused."""

    def mix(self, q, k, v, g, beta, lam, route, **_):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def levels(time):
    """Levels of Log-Linear Attention's schedule: of token t and an earlier s, the bits of t xor s."""
    return max(time - 1, 1).bit_length() + 1


class LogLinear(DynamicLinearAttention):
    """Log-Linear Attention (arXiv 2506.04761), gated: the masked matrix itself, and on a GPU flash-linear-attention's kernel, where it
    is installed, for more tokens than that is good for."""

    MASKED_TIME = 1024

    def mix(self, q, k, v, g, beta, lam, route, **_):
        q, k = F.normalize(q.float(), dim=-1).to(q.dtype), F.normalize(k.float(), dim=-1).to(k.dtype)
        kernel = self.kernel() if q.is_cuda and q.shape[1] > self.MASKED_TIME else None
        if kernel is not None:
            # The kernel multiplies the scales into scores of q's dtype; its own scale is 1. It takes heads of multiples of 64: zeros
            # beside them change nothing.
            scales = lam[..., : levels(q.shape[1])].to(q.dtype)
            wide = [F.pad(x, (0, -x.shape[3] % 64)) for x in (q, k, v)]
            return kernel(*wide, g, scales, scale=q.shape[3] ** -0.5)[0][..., : v.shape[3]].to(v.dtype), None
        time = q.shape[1]
        if time > self.MASKED_TIME:
            raise NotImplementedError(
                f"Log-Linear Attention of {time} tokens: expected flash-linear-attention on a GPU beyond {self.MASKED_TIME}"
            )
        at = torch.arange(time, device=q.device)
        level = torch.frexp((at[:, None] ^ at).float()).exponent.long()  # bits of the difference
        total = g.cumsum(1).transpose(1, 2)
        decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(at[:, None] < at, -torch.inf).exp()
        weight = lam.transpose(1, 2).gather(3, level.clamp(max=lam.shape[3] - 1).expand(*total.shape[:2], time, time))
        scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[3] ** -0.5
        return torch.einsum("bhts,bshd->bthd", scores * decay * weight, v.float()).to(v.dtype), None

    @staticmethod
    def kernel():
        try:
            from fla.ops.log_linear_attn import chunk_log_linear_attn
        except ImportError:
            return None
        return chunk_log_linear_attn


def mixer(spec, hidden, heads, time):
    """A mixer from what an experiment says of it (recall.py, MIXERS)."""
    spec = dict(spec)
    kind = spec.pop("kind", "dla")
    common = dict(hidden_size=hidden, head_dim=hidden // heads, num_heads=heads, style=spec.pop("style", "gated"))
    if kind == "softmax":
        return Softmax(**common, read="routed", capacity=1)
    if kind == "log_linear":
        return LogLinear(**common, read="given", capacity=levels(time))
    return Dla(**common, **spec)


class Block(nn.Module):
    def __init__(self, mix, hidden):
        super().__init__()
        self.mix, inner = mix, 2 * hidden
        self.before_mix, self.before_mlp = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.up, self.down = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        x = x + self.mix(self.before_mix(x))[0]
        gate, up = self.up(self.before_mlp(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


def places(targets):
    """Of targets [B,T], the places that are asked for, among B x T."""
    return (targets != -100).flatten().nonzero().squeeze(1)


class Model(nn.Module):
    """Embedding, blocks, norm, and logits by the embedding's transpose."""

    def __init__(self, spec, *, vocabulary, hidden, heads, layers, time):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.blocks = nn.ModuleList(Block(mixer(spec, hidden, heads, time), hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)

    @torch.no_grad()
    def draw(self, seed, embedding=0.02, A=(1, 16), dt=(0.001, 0.1)):
        """Parameters from the seed and their names: what two mixers have in common begins alike, whatever else they hold. `embedding`:
        its standard deviation. A token decays the state by exp(-A dt) at the start, A drawn from its range, dt from its own by its
        logarithm. How soon recall is found varies much with all of it."""
        for name, x in self.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if name == "embedding.weight":
                drawn = embedding * torch.randn(x.shape, generator=generator)
            elif name.endswith("A_log"):
                drawn = (A[0] + (A[1] - A[0]) * torch.rand(x.shape, generator=generator)).log()
            elif name.endswith("dt_bias"):
                least, most = dt
                begin = least * (most / least) ** torch.rand(x.shape, generator=generator)
                drawn = begin + torch.log(-torch.expm1(-begin))  # the inverse of softplus
            elif x.ndim == 2:
                drawn = (2 * torch.rand(x.shape, generator=generator) - 1) * x.shape[1] ** -0.5
            else:
                continue
            x.copy_(drawn)
        return self

    def hidden(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def loss(self, tokens, targets, asked=None):
        """Cross entropy of the targets that are asked for, and their logits and values. Other logits are never made. `asked`: the
        places of those targets among all, where they are known."""
        if asked is None:
            asked = places(targets)
        logits = F.linear(self.hidden(tokens).flatten(0, 1)[asked], self.embedding.weight).float()
        wanted = targets.flatten()[asked]
        return F.cross_entropy(logits, wanted), logits, wanted

    def layers_of_ours(self):
        return [block.mix for block in self.blocks if isinstance(block.mix, Dla)]

"""Calls of block_attention as verify_block_attention.py makes them, and what they must give, list by list of keys.

Shapes: B batch, S slots at hand, C chunk size, n chunks at hand, h halo chunks, N chunks of the row, m of the chunks at
hand, H query heads, G KV heads, F = H/G, d channels, U summaries, M pages, R recalled, P = h + n + M places,
J = w + R listed places, T = J*C + U listed keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mka_megatron.memory.chunks import Chunks
from mka_megatron.memory.view import Pages

FORMS = ("one document", "closed", "a document a chunk", "shard", "bare", "nothing recalled", "hidden", "dense")
"""closed: documents, chunks closed early or empty. shard: the row began earlier, pages lie elsewhere. bare: L1 alone,
no bias. hidden: L2 or L3 under a bias of -inf in places. dense: the window is the row."""
SCORES = 1 << 25
"""Scores that are in memory at once."""


@dataclass(frozen=True)
class Inputs:
    """One call's tensors; shapes as in mka_megatron.ops.block_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    summaries: tuple[Tensor, Tensor] | None
    pages: Pages | None
    bias: Tensor | None
    chunks: Chunks
    window: int
    """w."""
    upstream: Tensor
    """[B, S, H, d] the gradient of the output; NaN on padding."""

    @staticmethod
    def draw(
        device: torch.device,
        slots: int,
        *,
        form: str = "one document",
        batch: int = 1,
        heads: int = 28,
        groups: int = 4,
        channels: int = 128,
        size: int = 128,
        window: int = 16,
        recalled: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        sampled: Tensor | None = None,
        seed: int = 0,
    ) -> Inputs:
        """Random ones, without a repeated chunk in any list; NaN lies on padding. `sampled`: the chunks whose outputs
        have a gradient (default: all)."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=kind)

        def share(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device)

        first, count = 3 if form == "shard" else 0, -(-slots // size)
        halo, total = min(window - 1, first), first + count + (form == "shard")
        if form == "dense":
            window = total
        numbers = torch.arange(total, device=device)
        lengths = torch.where(numbers - first == count - 1, slots - size * (count - 1), size).expand(batch, -1)
        starts = (numbers == 0).expand(batch, -1)
        if form in ("closed", "shard"):
            short = share(batch, total)
            lengths = torch.where(short < 0.3, (short / 0.3 * (lengths + 1)).long().clamp_max(lengths), lengths)
            starts = starts | (share(batch, total) < 0.1)
        if form == "a document a chunk":
            starts = torch.ones_like(starts)
        documents = (starts.long().cumsum(1) - 1).masked_fill(lengths == 0, -1)
        chunks = Chunks(size, lengths.contiguous(), documents, lengths, first, count)

        held = halo * size + slots
        # keys and values as a fused projection leaves them, beside the queries of their head
        fused = normal(batch, held, groups, (heads // groups + 2) * channels)
        k, v = fused[..., -2 * channels : -channels], fused[..., -channels:]
        q = normal(batch, slots, heads, channels)
        upstream = normal(batch, slots, heads, channels)
        if sampled is not None:
            chosen = torch.zeros(count, dtype=torch.bool, device=device)
            chosen[sampled] = True
            upstream *= chosen.repeat_interleave(size)[:slots, None, None]
        summaries = pages = bias = None
        if form != "bare":
            summaries = normal(batch, total, groups, channels), normal(batch, total, groups, channels)
            bias = normal(batch, slots, 1 if form == "one document" else groups, 3, kind=torch.float32)
            pages = _draw_pages(chunks, halo, window, groups, recalled, form, k, normal, share)
        if form == "hidden" and bias is not None:
            bias[..., 1:].masked_fill_(share(*bias.shape[:3], 2) < 0.3, -torch.inf)
        blank = torch.arange(size, device=device) >= lengths[:, first - halo : first + count, None]
        for x, padding in ((k, blank), (v, blank), (q, blank[:, halo:]), (upstream, blank[:, halo:]), (bias, blank[:, halo:])):
            if x is not None:
                # [B, chunks, C] -> [B, slots]
                x.masked_fill_(padding.flatten(1)[:, : x.shape[1], None, None], torch.nan)
        for x in summaries or ():
            x.masked_fill_((documents < 0)[..., None, None], torch.nan)
        return Inputs(q, k, v, summaries, pages, bias, chunks, window, upstream)

    @property
    def halo(self) -> int:
        """h."""
        return min(self.window - 1, self.chunks.first)

    @property
    def scale(self) -> float:
        """Factor on the scores."""
        return self.q.shape[3] ** -0.5

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over all query heads."""
        listed = self._listed
        count = self.chunks.count
        seen = (int(listed(at)[2].sum()) for at in torch.arange(count, device=self.q.device).split(self._step))
        return sum(seen) * self.q.shape[2] // self.k.shape[2]

    def run(self, attend: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The output and the gradients of `attend`, which takes the arguments of block_attention but its backend."""
        leaves = {name: x.detach().requires_grad_() for name, x in self.tensors().items()}
        out = self.call(attend, leaves)
        return {"out": out.detach()} | self.gradients(out, leaves)

    def gradients(self, out: Tensor, leaves: dict[str, Tensor], keep: bool = False) -> dict[str, Tensor]:
        """Of `leaves`, given what :meth:`call` made of them; `keep`: it can be called again."""
        grads = torch.autograd.grad(out, list(leaves.values()), self.upstream, retain_graph=keep)
        return {f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """What has a gradient, by name."""
        found = {"q": self.q, "k": self.k, "v": self.v}
        if self.summaries is not None:
            found |= {"summary k": self.summaries[0], "summary v": self.summaries[1]}
        if self.pages is not None and self.pages.k.shape[2]:
            found |= {"page k": self.pages.k, "page v": self.pages.v}
        return found if self.bias is None else found | {"bias": self.bias}

    def call(self, attend: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Tensor:
        """The output, of `leaves` in place of the tensors of these names."""
        given, pages = self.tensors() | leaves, self.pages
        summaries = None if self.summaries is None else (given["summary k"], given["summary v"])
        if pages is not None:
            pages = Pages(given.get("page k", pages.k), given.get("page v", pages.v), pages.lengths, pages.index)
        return attend(
            given["q"], given["k"], given["v"], summaries, pages, given.get("bias"), chunks=self.chunks,
            window=self.window * self.chunks.size, scale=self.scale,
        )  # fmt: skip

    def chunked(self, x: Tensor, at: Tensor) -> Tensor:
        """[B, S, Y, Z] -> [B, m, C, Y, Z], its chunks `at`, zeros behind a ragged end."""
        size = self.chunks.size
        whole = x.shape[1] // size
        if int(at.max()) < whole:
            return x[:, : whole * size].unflatten(1, (-1, size))[:, at]
        return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))[:, at]

    def solved(self, at: Tensor, rounded: bool) -> dict[str, Tensor]:
        """What :meth:`run` gives, when no chunk but `at` [m] has upstream gradients: those of queries, "out", "d q" and
        "d bias", [B, m, C, ...] of these chunks alone; those of keys in full.

        In fp64; `rounded`: in fp32 with every operand and result rounded to q's type, the probabilities and the
        gradients of the scores too, as attention in low precision computes.
        """
        wide = torch.float32 if rounded else torch.float64
        batch, groups, channels = len(self.q), self.k.shape[2], self.q.shape[3]
        places = self._lengths().shape[2]
        banks = [torch.zeros(batch, groups, places, self.chunks.size, channels, dtype=wide, device=self.q.device) for _ in "kv"]
        far = [x.new_zeros(x.shape, dtype=wide) for x in self.summaries or ()]
        parts: list[dict[str, Tensor]] = []
        for some in at.split(self._step):
            found, of_keys, place = self._solve(some, wide, rounded)
            parts.append(found)
            listed = place.shape[3] * self.chunks.size
            rows, heads = (torch.arange(x, device=at.device) for x in (batch, groups))
            where = rows[:, None, None, None], heads[:, None], place.clamp_min(0)
            for bank, grad in zip(banks, of_keys, strict=True):
                # [B, m, G, J*C, d] -> [B, m, G, J, C, d]
                bank.index_put_(where, grad[..., :listed, :].unflatten(3, (-1, self.chunks.size)), accumulate=True)
            for total, grad in zip(far, of_keys, strict=False):
                # [B, m, G, U, d] -> [B, U, G, d]
                total += grad[..., listed:, :].sum(dim=1).transpose(1, 2)
        result = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
        near = self.halo + self.chunks.count
        for name, bank in zip("kv", banks, strict=True):
            # [B, G, h + n, C, d] -> [B, h*C + S, G, d]
            result[f"d {name}"] = bank[:, :, :near].permute(0, 2, 3, 1, 4).flatten(1, 2)[:, : self.k.shape[1]]
        result |= {f"d summary {name}": total for name, total in zip("kv", far, strict=False)}
        if places > near:
            result |= {f"d page {name}": bank[:, :, near:] for name, bank in zip("kv", banks, strict=True)}
        if rounded:
            result = {name: x if name == "d bias" else x.to(self.q.dtype) for name, x in result.items()}
        return result

    @property
    def _step(self) -> int:
        """Chunks to be solved at once."""
        size, recalled = self.chunks.size, 0 if self.pages is None else self.pages.index.shape[3]
        keys = (min(self.window, self.halo + self.chunks.count) + recalled) * size + self.chunks.lengths.shape[1]
        return max(1, SCORES // (len(self.q) * self.q.shape[2] * size * keys))

    def _lengths(self) -> Tensor:
        """[B, G, P] tokens of each place."""
        first, count = self.chunks.first, self.chunks.count
        lengths = self.chunks.lengths[:, None, first - self.halo : first + count].expand(-1, self.k.shape[2], -1)
        return lengths if self.pages is None else torch.cat((lengths, self.pages.lengths), dim=2)

    def _listed(self, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of chunks `at` [m]: the places they see, -1 none, [B, m, G, J]; the level of the keys [T]; who sees whom
        [B, m, G, C, T]."""
        chunks, documents, halo = self.chunks, self.chunks.documents, self.halo
        slots = torch.arange(chunks.size, device=at.device)
        own = chunks.first + at
        document = documents[:, own]
        near = own[:, None] - torch.arange(min(self.window, halo + chunks.count), device=at.device)
        same = (near >= 0) & (documents[:, near.clamp_min(0)] == document[..., None]) & (document >= 0)[..., None]
        place = torch.where(same, near - chunks.first + halo, -1)[:, :, None].expand(-1, -1, self.k.shape[2], -1)
        window = place.shape[3]
        if self.pages is not None:
            place = torch.cat((place, self.pages.index[:, at]), dim=3)
        tokens = self._lengths()[:, None].expand(-1, len(at), -1, -1).gather(3, place.clamp_min(0)).masked_fill(place < 0, 0)
        # [B, m, G, C, J, C]
        seen = (slots < tokens[..., None])[:, :, :, None].repeat(1, 1, 1, chunks.size, 1, 1)
        seen[..., 0, :] &= slots <= slots[:, None]
        seen = seen.flatten(4)
        level = torch.full((seen.shape[4],), 2, device=at.device)
        level[: window * chunks.size] = 0
        if self.summaries is not None:
            numbers = torch.arange(self.summaries[0].shape[1], device=at.device)
            far = (numbers <= own[:, None] - self.window) & (documents[:, None, : len(numbers)] == document[..., None])
            far &= (document >= 0)[..., None]
            seen = torch.cat((seen, far[:, :, None, None].expand(*seen.shape[:4], -1)), dim=4)
            level = torch.cat((level, torch.ones_like(numbers)))
        return place, level, seen & (slots < chunks.lengths[:, own][..., None])[:, :, None, :, None]

    def _solve(
        self, at: Tensor, wide: torch.dtype, rounded: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor], Tensor]:
        """As :meth:`solved`, of the listed keys and values [B, m, G, T, d] and their places."""
        groups, size, low = self.k.shape[2], self.chunks.size, self.q.dtype
        place, level, seen = self._listed(at)
        real = seen.any(dim=4).any(dim=2)[..., None, None]

        def round_(x: Tensor) -> Tensor:
            return x.to(low).to(wide) if rounded else x

        def heads(x: Tensor) -> Tensor:
            # [B, S, H, d] -> [B, m, C, G, F, d] -> [B, m, G, F*C, d]
            mine = torch.where(real, self.chunked(x, at), 0).to(wide)
            return mine.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)

        def back(x: Tensor) -> Tensor:
            # [B, m, G, F*C, d] -> [B, m, C, H, d]
            return x.unflatten(3, (-1, size)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)

        keys, values = (self._gathered(x, place, number).to(wide) for number, x in enumerate((self.k, self.v)))
        used = seen.any(dim=3)[..., None]
        keys, values = (torch.where(used, x, 0) for x in (keys, values))
        q, upstream = heads(self.q), heads(self.upstream)
        # [B, m, G, F, C, T]
        scores = (q @ keys.mT).unflatten(3, (-1, size)) * self.scale
        if self.bias is not None:
            # [B, m, C, G or 1, 3] -> [B, m, G, 1, C, T]
            scores += torch.where(real, self.chunked(self.bias, at), 0).to(wide).transpose(2, 3)[..., level][:, :, :, None]
        scores.masked_fill_(~seen[:, :, :, None], -torch.inf)
        lse = scores.logsumexp(dim=-1, keepdim=True)
        p = (scores - lse.masked_fill(lse == -torch.inf, torch.inf)).exp().flatten(3, 4)
        out = round_(round_(p) @ values)
        change = p * (upstream @ values.mT - (upstream * out).sum(dim=-1, keepdim=True))
        found = {"out": back(out), "d q": back(self.scale * (round_(change) @ keys))}
        if self.bias is not None:
            by_level = torch.stack([change[..., level == each].sum(dim=-1) for each in range(3)], dim=-1)
            # [B, m, G, F*C, 3] -> [B, m, C, G, 3]
            grad = by_level.unflatten(3, (-1, size)).sum(dim=3).transpose(2, 3)
            found["d bias"] = grad if self.bias.shape[2] > 1 else grad.sum(dim=3, keepdim=True)
        return found, (self.scale * (round_(change).mT @ q), round_(p).mT @ upstream), place

    def _gathered(self, x: Tensor, place: Tensor, number: int) -> Tensor:
        """The listed keys (number 0, x: k) or values (1, v), [B, m, G, T, d]."""
        size, batch = self.chunks.size, len(x)
        rows, heads = (torch.arange(each, device=x.device) for each in (batch, x.shape[2]))
        held = self.halo + self.chunks.count
        # [B, h*C + S, G, d] -> [B, h + n, C, G, d]
        bank = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
        taken = bank[rows[:, None, None, None], place.clamp(0, held - 1), :, heads[:, None]]
        if self.pages is not None and self.pages.k.shape[2]:
            pages = (self.pages.k, self.pages.v)[number]
            elsewhere = pages[rows[:, None, None, None], heads[:, None], (place - held).clamp_min(0)]
            taken = torch.where((place >= held)[..., None, None], elsewhere, taken)
        taken = taken.flatten(3, 4)
        if self.summaries is None:
            return taken
        # [B, U, G, d] -> [B, m, G, U, d]
        far = self.summaries[number].transpose(1, 2)[:, None].expand(-1, taken.shape[1], -1, -1, -1)
        return torch.cat((taken, far), dim=3)


def _draw_pages(
    chunks: Chunks, halo: int, window: int, groups: int, recalled: int, form: str, k: Tensor,
    normal: Callable[..., Tensor], share: Callable[..., Tensor],
) -> Pages:  # fmt: skip
    """Distinct chunks of the document before the window, and of pages that lie elsewhere; a fifth of them none."""
    batch, channels, size = len(k), k.shape[3], chunks.size
    pages = 5 if form == "shard" else 0
    own = chunks.first + torch.arange(chunks.count, device=k.device)
    others = chunks.first - halo + torch.arange(halo + chunks.count, device=k.device)
    document = chunks.documents[:, own, None]
    may = (others <= own[:, None] - window) & (chunks.documents[:, None, others] == document) & (document >= 0)
    # a page is an earlier chunk of the document: there is none where the window begins before it
    old = own - window >= (chunks.documents[:, None] == document).int().argmax(dim=2)
    # [B, n, P]
    may = torch.cat((may, (old & (document[..., 0] >= 0))[..., None].expand(-1, -1, pages)), dim=2)
    drawn = share(batch, chunks.count, groups, may.shape[2]).masked_fill_(~may[:, :, None], -1)
    drawn = F.pad(drawn, (0, max(0, recalled - may.shape[2])), value=-1)
    best, index = drawn.topk(recalled, dim=3, sorted=False)
    lost = (best < 0) | (share(*index.shape) < (1.0 if form == "nothing recalled" else 0.2))
    lengths = (share(batch, groups, pages) * (size + 1)).long()
    stored = normal(batch, groups, pages, size, channels), normal(batch, groups, pages, size, channels)
    for x in stored:
        x.masked_fill_((torch.arange(size, device=k.device) >= lengths[..., None])[..., None], torch.nan)
    return Pages(*stored, lengths, index.masked_fill(lost, -1))

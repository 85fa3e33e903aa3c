"""Checks of a world's process groups, and of who owns which part of which weight. Each returns what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mka_megatron.dry_run.rank import Held, RankRun
from mka_megatron.dry_run.world import Created
from mka_megatron.model.hf_table import Entry, hf_tensors
from mka_megatron.parallel.groups import NAMES
from mka_megatron.training.partitions import Partition

Kinds = Mapping[str, Sequence[tuple[int, ...]]]


def kinds_of(created: Iterable[Created]) -> dict[str, list[tuple[int, ...]]]:
    """The groups of each kind in NAMES, of the whole world."""
    found: dict[str, list[tuple[int, ...]]] = {kind: [] for kind in NAMES}
    for each in created:
        for kind, name in NAMES.items():
            if each.kind == name:
                found[kind].append(each.ranks)
    return found


def group_problems(runs: Sequence[RankRun], ranks: int, sizes: Mapping[str, int], ranks_per_node: int) -> list[str]:
    """Every rank in one group of each kind, of the right size, in order; tensor-parallel groups within a node; every
    combination of places once; what the ranks say of their own groups agrees."""
    first, problems = runs[0], []
    for run in runs:
        if run.created != first.created:
            problems.append(f"rank {run.rank} creates other process groups, or in another order, than rank {first.rank}.")
    kinds = kinds_of(first.created)
    places: dict[int, list[int]] = {rank: [] for rank in range(ranks)}
    for kind, groups in kinds.items():
        members = Counter(rank for group in groups for rank in group)
        wrong = sorted(rank for rank in {*range(ranks), *members} if members[rank] != 1 or rank >= ranks)
        if wrong:
            problems.append(f"{kind} groups: rank {wrong[0]} is in {members[wrong[0]]} of them, not in one.")
            continue
        for group in groups:
            if len(group) != sizes[kind] or list(group) != sorted(group):
                problems.append(f"{kind} group {short(group)} is not {sizes[kind]} ranks in ascending order.")
            if kind == "tensor" and (group[-1] - group[0] != len(group) - 1 or group[0] // ranks_per_node != group[-1] // ranks_per_node):
                problems.append(f"tensor group {short(group)} is not on neighbouring GPUs of one node of {ranks_per_node}.")
            if kind != "replicas":
                for place, rank in enumerate(group):
                    places[rank].append(place)
        for run in runs:
            if run.groups[kind] not in groups:
                problems.append(f"rank {run.rank} works in the {kind} group {short(run.groups[kind])}, which nobody else knows.")
    twice = [place for place, count in Counter(map(tuple, places.values())).items() if count > 1]
    if twice:
        problems.append(f"several ranks are (tensor, context, data) rank {twice[0]}.")
    for run in runs:
        if tuple(places[run.rank]) != run.place:
            problems.append(f"rank {run.rank} takes itself for {run.place}, its groups for {tuple(places[run.rank])}.")
    return problems


def weight_problems(whole: Sequence[Held], shards: Mapping[int, Sequence[Held]], ranks: int) -> list[str]:
    """The parts that `ranks` tensor-parallel ranks hold (by rank) tile the whole model's tensors, each element once;
    what is not split is whole on all."""
    problems = []
    missing = sorted(set(range(ranks)) - set(shards))
    if missing:
        return [f"no rank stands for tensor-parallel rank {missing[0]}: its slices are owned by nobody."]
    wanted = {each.name: each for each in whole}
    by_name = {rank: {each.name: each for each in held} for rank, held in shards.items()}
    for name, full in wanted.items():
        parts = {rank: by_name[rank].get(name) for rank in range(ranks)}
        absent = [rank for rank, part in parts.items() if part is None]
        if absent:
            problems.append(f"{name}: tensor-parallel rank {absent[0]} has no part of it.")
            continue
        held = [part for part in parts.values() if part is not None]
        dims = {part.dim for part in held}
        if len(dims) > 1 or len({part.dtype for part in held} | {full.dtype}) > 1:
            problems.append(f"{name}: the ranks do not agree on its split dimension or dtype.")
            continue
        (dim,) = dims
        if dim is None or ranks == 1:
            odd = [rank for rank, part in parts.items() if part is not None and part.shape != full.shape]
            if odd:
                problems.append(f"{name}: rank {odd[0]} holds {list(held[odd[0]].shape)} unsplit, the whole is {list(full.shape)}.")
            continue
        along = sum(part.shape[dim] for part in held)
        rest = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in held}
        if along != full.shape[dim] or rest != {(*full.shape[:dim], *full.shape[dim + 1 :])}:
            problems.append(f"{name}: parts {[list(part.shape) for part in held]} split along {dim} are no tiling of {list(full.shape)}.")
    for rank, held_here in by_name.items():
        extra = sorted(set(held_here) - set(wanted))
        if extra:
            problems.append(f"{extra[0]}: tensor-parallel rank {rank} holds it, the whole model does not.")
    return problems


def table_problems(
    table: Mapping[str, Entry], whole: Mapping[str, Entry], shards: Mapping[int, Sequence[Held]], ranks: int
) -> list[str]:
    """The table that reads Hugging Face slices has what the models hold, in their shapes and split dimensions, and its
    slices of all ranks tile every Hugging Face tensor, each element once (unsplit ones: once on every rank).

    `whole`: the table of one rank.
    """
    problems = []
    for rank, held in shards.items():
        names = {each.name for each in held}
        problems += [f"{name}: the mapping table has it, tensor-parallel rank {rank} does not." for name in set(table) - names]
        for each in held:
            entry = table.get(each.name)
            if entry is None:
                problems.append(f"{each.name}: the mapping table does not have it.")
            elif entry.shard(ranks) != each.shape or (ranks > 1 and (entry.dim if entry.split else None) != each.dim):
                problems.append(f"{each.name}: rank {rank} holds {list(each.shape)} split along {each.dim}, the mapping table says "
                                f"{list(entry.shard(ranks))} along {entry.dim if entry.split else None}.")  # fmt: skip
    owned: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for entry in table.values():
        size = entry.shard(ranks)[entry.dim]
        for rank in range(ranks if entry.split else 1):
            for run in entry.cut(rank * size, size):
                owned[run.source].append((run.start, run.start + run.length))
    wanted = hf_tensors(dict(whole))
    for name in sorted(set(owned) ^ set(wanted)):
        problems.append(f"{name}: the mapping table of {ranks} ranks and that of one do not both have this tensor.")
    for name, tensor in wanted.items():
        if name in owned:
            problems += gaps(name, owned[name], tensor.shape[tensor.entry.dim])
    return problems


def partition_problems(runs: Sequence[RankRun]) -> list[str]:
    """ZeRO's flat buffers: the replicas' pieces tile them, every parameter is in one place, no rank sees them otherwise."""
    problems: list[str] = []
    seen: dict[int, tuple[RankRun, tuple[Partition, ...]]] = {}
    for run in runs:
        if run.partitions is None:
            continue
        first, cut = seen.setdefault(run.place[0], (run, run.partitions))
        if [(p.elements, p.spans, p.pieces) for p in cut] != [(p.elements, p.spans, p.pieces) for p in run.partitions]:
            problems.append(f"rank {run.rank} cuts its parameters otherwise than rank {first.rank}, which holds the same.")
        names = [name for part in run.partitions for name, _, _ in part.spans]
        trained = [each.name for each in run.held if each.trained]
        for name in sorted(set(names) ^ set(trained)):
            problems.append(f"{name}: rank {run.rank} has it in the model or in ZeRO's buffers, not in both.")
        sizes = {each.name: elements(each.shape) for each in run.held}
        for number, part in enumerate(run.partitions):
            what = f"ZeRO's buffer {number} on rank {run.rank}"
            if part.ranks != run.groups["replicas"] or len(part.pieces) != len(part.ranks):
                problems.append(f"{what} is cut over {short(part.ranks)}, not over the replicas {short(run.groups['replicas'])}.")
                continue
            if sum(part.pieces) != part.elements:
                problems.append(f"{what}: pieces of {sum(part.pieces)} elements do not make up its {part.elements}.")
            if part.held != part.pieces[part.ranks.index(run.rank)]:
                problems.append(f"{what}: the optimizer holds {part.held} elements, its piece has {part.pieces[part.ranks.index(run.rank)]}.")
            short_of = [name for name, begin, end in part.spans if end - begin != sizes.get(name)]
            if short_of:
                problems.append(f"{what}: {short_of[0]} is not whole in it.")
            problems += gaps(what, [(begin, end) for _, begin, end in part.spans], part.elements, padded=True)
    return problems


def gaps(name: str, pieces: Iterable[tuple[int, int]], extent: int, padded: bool = False) -> list[str]:
    """Where [begin, end) pieces do not cover [0, extent) once; padded: what nobody owns is padding."""
    position = 0
    for begin, end in sorted(pieces):
        if begin < position:
            return [f"{name}: [{begin}, {min(position, end)}) is owned more than once."]
        if begin > position and not padded:
            return [f"{name}: [{position}, {begin}) is owned by nobody."]
        position = end
    if position > extent or (position < extent and not padded):
        return [f"{name}: owned up to {position}, it has {extent}."]
    return []


def elements(shape: Sequence[int]) -> int:
    """Product."""
    count = 1
    for size in shape:
        count *= size
    return count


def short(ranks: Sequence[int]) -> str:
    """A group's ranks, the first and last of many."""
    return str(list(ranks)) if len(ranks) <= 8 else f"[{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}]"

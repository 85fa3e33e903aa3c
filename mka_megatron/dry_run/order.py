"""Do the members of every group issue the same collectives in an order in which none waits for ever?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from mka_megatron.dry_run.recorder import Collective


def order_problems(steps: Mapping[int, Sequence[Collective]]) -> list[str]:
    """What the ranks of a world (some of them, by rank) issued, played against each other: a collective is over when
    every member at hand has come to it, with equal sizes, and for all-to-all with sizes that fit pair by pair."""
    at = dict.fromkeys(steps, 0)
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for rank, step in steps.items():
        for ranks in {each.ranks for each in step}:
            groups[ranks].append(rank)
            if rank not in ranks:
                return [f"rank {rank} issues a collective of a group that it is not in."]
    ready = set(steps)
    while ready:
        rank = ready.pop()
        while at[rank] < len(steps[rank]):
            mine = steps[rank][at[rank]]
            members = [member for member in mine.ranks if member in steps]
            waiting = [m for m in members if at[m] >= len(steps[m]) or steps[m][at[m]].ranks != mine.ranks]
            if waiting:
                break
            theirs = {member: steps[member][at[member]] for member in members}
            for member, other in theirs.items():
                if not mine.agrees(other) or not _fits(mine, rank, other, member):
                    return [f"ranks {rank} and {member} meet with different collectives: {_told(mine)}; {_told(other)}."]
            for member in members:
                at[member] += 1
            ready |= set(members) - {rank}
    for rank, step in steps.items():
        if at[rank] < len(step):
            mine = step[at[rank]]
            others = [m for m in mine.ranks if m in steps and (at[m] >= len(steps[m]) or steps[m][at[m]].ranks != mine.ranks)]
            return [f"rank {rank} waits for ever at its collective {at[rank] + 1} of {len(step)}, {_told(mine)}: rank {others[0]} does "
                    "not come to it."]  # fmt: skip
    return []


def _fits(mine: Collective, rank: int, other: Collective, member: int) -> bool:
    if mine.op != "all-to-all" or not mine.splits[0]:
        return True
    here, there = mine.ranks.index(rank), mine.ranks.index(member)
    return mine.splits[0][there] == other.splits[1][here] and mine.splits[1][there] == other.splits[0][here]


def _told(each: Collective) -> str:
    return f"{each.op} of {each.given} bytes {each.dtype} over {len(each.ranks)} ranks"

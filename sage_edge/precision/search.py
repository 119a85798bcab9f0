"""Which layers must stay higher: a search by bisection over an order of layers. Pure; the judge is a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Passes = Callable[[frozenset[str]], bool]


def lowest(order: Sequence[str], passes: Passes) -> tuple[frozenset[str], dict[str, frozenset[str]]]:
    """Lower as many layers as pass together. Returns those lowered and, for each that had to stay, the set that failed.

    order: layer names, the least sensitive first. passes: whether the graph with exactly these layers lowered passes;
    lowering nothing must pass. Each layer that has to stay is found by bisection: the longest run of further layers that
    still passes is lowered, the one behind it stays, and the search goes on behind that. With m layers that stay, of n,
    it costs about (m + 1) * (1 + log2 n) judgements, and never lowers a set that was not judged.
    """
    lowered: frozenset[str] = frozenset()
    kept: dict[str, frozenset[str]] = {}
    rest = list(order)
    while rest:
        if passes(lowered | frozenset(rest)):
            return lowered | frozenset(rest), kept
        good, bad = 0, len(rest)
        while bad - good > 1:
            middle = (good + bad) // 2
            if passes(lowered | frozenset(rest[:middle])):
                good = middle
            else:
                bad = middle
        kept[rest[good]] = lowered | frozenset(rest[: good + 1])
        lowered |= frozenset(rest[:good])
        rest = rest[good + 1 :]
    return lowered, kept

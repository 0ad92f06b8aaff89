"""Where labels beside a figure stand, so that none covers another."""

from collections.abc import Sequence


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Return places near `wanted`, at least `gap` apart and within low .. high where that holds them all."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # Blocks of touching labels, each centred on what its members want.
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        centre = sum(wanted[index] for index in block) / len(block)
        first = centre - gap * (len(block) - 1) / 2
        return max(low, min(first, high - gap * (len(block) - 1)))

    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and start(blocks[-2]) + gap * len(blocks[-2]) > start(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    places = [0.0] * len(wanted)
    for block in blocks:
        for nth, index in enumerate(block):
            places[index] = start(block) + nth * gap
    return places

"""How long collectives take on paper: NCCL's tuning constants, nodes of eight H100 with 400 Gb/s for each.

NCCL chooses an algorithm and a protocol by the time that it expects of each (src/graph/tuning.cc: baseLat,
hwLat); so does this. A group has as many network cards as it has ranks on a node.
"""

from __future__ import annotations

import math
from typing import NamedTuple

GPUS_OF_NODE = 8
NETWORK, NVLINK = 45e3, 360e3  # bytes a microsecond of one card, and of one GPU within a node


class Latency(NamedTuple):
    """In microseconds: of a call, of a hop within a node, of one between nodes."""

    call: float
    intra: float
    inter: float


TREE = {
    "LL": Latency(6.8, 0.6, 5.0),
    "LL128": Latency(14.0, 1.25, 8.5),
    "Simple": Latency(8.4, 4.0, 14.0),
}
RING = {
    "LL": Latency(6.6, 0.6, 2.7),
    "LL128": Latency(14.0, 1.9, 4.0),
    "Simple": Latency(8.4, 3.4, 14.0),
}
REACHES = {"LL": 0.25, "LL128": 0.9, "Simple": 1.0}  # of the bandwidth


def all_reduce(size: float, ranks: int, on_node: int) -> float:
    """Microseconds for so many bytes of each rank, by the fastest way; on_node: ranks that share a node."""
    nodes = ranks // on_node
    expected = []
    for protocol, reaches in REACHES.items():
        transfer = 2 * size / (bandwidth(on_node, nodes) * reaches)
        call, intra, inter = TREE[protocol]
        expected.append(transfer + call + 2 * ((on_node - 1) * intra + math.log2(nodes) * inter))
        call, intra, inter = RING[protocol]
        between = 2 * nodes if nodes > 1 else 0
        expected.append(transfer + call + (2 * (ranks - 1) - between) * intra + between * inter)
    return min(expected)


def reduce_scatter(size: float, ranks: int, on_node: int) -> float:
    """Microseconds for so many bytes of each rank, by the bandwidth alone."""
    return size * (ranks - 1) / ranks / bandwidth(on_node, ranks // on_node)


def bandwidth(on_node: int, nodes: int) -> float:
    return NVLINK if nodes == 1 else min(NVLINK, on_node * NETWORK)

"""Durations of collectives on nodes that are joined by a network.

NCCL's ring visits all ranks of a node and then the next node. Each rank sends the bytes of `Collective.sent` once, so a
node sends as many as a rank. All network cards of the node share them.

    seconds = call + hops within nodes * link hop + hops between nodes * network hop + sent bytes / bandwidth

A ring passes n - 1 hops, or twice as many for a sum. NCCL also has trees for sums, with 2 * (r - 1) hops within a node
of r ranks and 2 * log2(nodes) hops between nodes. Both have a protocol for small messages (LL), at a quarter of the
bandwidth. The estimate takes the fastest. It does not know NVLink SHARP and PAT, which newer versions of NCCL use for
some collectives, so latencies are upper bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bclip_fast.hardware import Cluster

from .traffic import Collective

# Share of a network card's rate that NCCL reaches. With 4 cards of 200 Gbit/s (HDR) a node it was at most 96 %
# (NVIDIA/nccl-tests#119), and with 400 Gbit/s (NDR) 92 to 96 % (NVIDIA/nccl-tests#290). RoCE has the same rates.
NETWORK_SHARE = 0.94


@dataclass(frozen=True)
class Protocol:
    """Latencies of one of NCCL's protocols in seconds: for a call, and for a hop within a node and between nodes."""

    call: float
    link_hop: float
    network_hop: float
    share: float
    """Share of the bandwidth."""


# NVIDIA/nccl, src/graph/tuning.cc at 01afd20a: baseLat, hwLat for NVLink and the network, and the bandwidth of LL.
_RINGS = (Protocol(8.4e-6, 3.4e-6, 9.6e-6, 1.0), Protocol(3.6e-6, 0.47e-6, 2.7e-6, 1 / 4))
_TREES = (Protocol(0.0, 28e-6, 50e-6, 1.0), Protocol(4.4e-6, 0.52e-6, 5.0e-6, 1 / 3.8))
# The same file: a tree reaches 90 % of a ring's bandwidth, and at most these bytes per second, for 1 or 2 nodes and for
# more.
_TREE_SHARE, _TREE_LIMITS = 0.9, (110e9, 80e9)
# The same file: the hops of a large sum over several nodes take longer by this factor.
_PLATEAU, _PLATEAU_BYTES_PER_RANK = 1.9, 4096
# gloo between processes of one machine, and over a network. Rough values.
_GLOO = Protocol(50e-6, 20e-6, 50e-6, 1.0)


def bandwidth(cluster: Cluster) -> float:
    """Bytes per second that each rank sends in a ring: those of its links, or all network cards of a node together."""
    if cluster.nodes == 1:
        return cluster.device.link
    share = 1.0 if cluster.cpu else NETWORK_SHARE
    return min(cluster.device.link, share * cluster.nics_per_node * cluster.device.network)


def seconds(collective: Collective, cluster: Cluster) -> float:
    """Duration of all calls of a collective. 0 for one rank, and for messages of the hosts of GPUs.

    The hosts run ahead of their GPUs, so the GPUs don't wait for the hosts' messages.
    """
    if cluster.ranks == 1 or (collective.on_host and not cluster.cpu):
        return 0.0
    is_sum, rate = collective.operation == "all-reduce", bandwidth(cluster)
    num_bytes = collective.num_bytes / collective.count
    between = (cluster.nodes - 1) * (2 if is_sum else 1)
    within = (cluster.ranks - 1) * (2 if is_sum else 1) - between
    durations = []
    for ring in (_GLOO,) if cluster.cpu else _RINGS:
        hops = within * ring.link_hop + between * ring.network_hop
        if is_sum and ring.share == 1 and cluster.nodes > 1 and num_bytes >= cluster.ranks * _PLATEAU_BYTES_PER_RANK:
            hops *= _PLATEAU
        durations.append(ring.call + hops + collective.sent(cluster.ranks) / collective.count / (ring.share * rate))
    if is_sum and not cluster.cpu:
        tree_rate = min(_TREE_SHARE * rate, _TREE_LIMITS[cluster.nodes > 2])
        depth = math.ceil(math.log2(cluster.nodes))
        for tree in _TREES:
            hops = 2 * ((cluster.ranks_per_node - 1) * tree.link_hop + depth * tree.network_hop)
            durations.append(tree.call + hops + 2 * num_bytes / (tree.share * tree_rate))
    return collective.count * min(durations)

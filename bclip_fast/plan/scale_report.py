"""The text of a plan about more GPUs, about the loader and about micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bclip_fast.hardware import Cluster

from .loader import LoaderPlan
from .network import bandwidth
from .scaling import TEXTS, WEIGHTS, ScalePoint, Scaling
from .table import table


def scale_parts(scaling: Scaling) -> Iterator[Any]:
    """The tables of several numbers of GPUs, and what helps on the largest."""
    points = scaling.points
    heads = ["GPUs", "nodes", "batch", "GB/s", "compute", "comm.", "exposed", "step", "weights", "texts", "efficiency"]
    yield table(
        "A MODEL, NOT MEASURED: milliseconds a step. weights, texts: hidden share of their communication",
        [*heads, "pairs/s a GPU"],
        [_row(point) for point in points],
    )
    yield "\n".join(_overlap_lines(scaling))
    if scaling.alternatives:
        rows = [["as planned", *_alternative_cells(points[-1])]]
        rows += [[point.change, *_alternative_cells(point)] for point in scaling.alternatives]
        heads = ["setting", "GPUs a node", "batch", "exposed ms", "step ms", "efficiency", "pairs/s a GPU", "fits"]
        yield table(f"Other settings on {points[-1].cluster.ranks} GPUs", heads, rows)
    yield "\n".join(best_lines(scaling))


def _row(point: ScalePoint) -> list[str]:
    step, cluster = point.step, point.cluster
    shares = (point.hidden(WEIGHTS), point.hidden(TEXTS))
    return [
        str(cluster.ranks),
        str(cluster.nodes),
        f"{point.stage.batch_size:,}",
        f"{bandwidth(cluster) / 1e9:.0f}",
        _milliseconds(sum(step.compute.values())),
        _milliseconds(sum(part.total for part in step.communication)),
        _milliseconds(step.exposed),
        _milliseconds(step.total),
        *("" if share is None else f"{share:.0%}" for share in shares),
        f"{step.efficiency:.1%}",
        f"{point.pairs_per_second:,.0f}",
    ]


def _alternative_cells(point: ScalePoint) -> list[str]:
    does_fit = {None: "", True: "yes", False: "no"}[point.does_fit]
    return [
        str(point.cluster.ranks_per_node),
        f"{point.stage.batch_size:,}",
        _milliseconds(point.step.exposed),
        _milliseconds(point.step.total),
        f"{point.step.efficiency:.1%}",
        f"{point.pairs_per_second:,.0f}",
        does_fit,
    ]


def _overlap_lines(scaling: Scaling) -> Iterator[str]:
    last = scaling.points[-1].cluster.ranks
    for label, names in (("gradients and weights", WEIGHTS), ("text features and their gradients", TEXTS)):
        first = scaling.overlap(names)
        if first is None:
            yield f"Overlap     computation hides at least half of the communication of {label} up to {last} GPUs"
        elif first == scaling.points[0].cluster.ranks:
            yield f"Overlap     computation hides less than half of the communication of {label} on any number of GPUs"
        else:
            yield f"Overlap     computation hides less than half of the communication of {label} from {first} GPUs on"


def best_lines(scaling: Scaling) -> list[str]:
    """The fastest setting with the same batch, and the effect of a larger batch."""
    now, best, count = scaling.points[-1], scaling.best, scaling.points[-1].cluster.ranks
    lines = [f"Best        on {count} GPUs, no other setting is faster with this batch"]
    if best is not None:
        gain = best.pairs_per_second / now.pairs_per_second - 1
        lines = [
            f"Best        on {count} GPUs with this batch: {best.change}, {_milliseconds(best.step.total)} ms a step "
            f"instead of {_milliseconds(now.step.total)}, {gain:.0%} more pairs a second"
        ]
    larger = [point for point in scaling.alternatives if not point.keeps_batch]
    if larger:
        point = larger[0]
        gain = point.pairs_per_second / now.pairs_per_second - 1
        rate = "about as many" if abs(gain) < 0.005 else f"{abs(gain):.0%} {'more' if gain > 0 else 'fewer'}"
        reason = ", because the towers run forward twice" if gain <= -0.005 else ""
        lines.append(
            f"Batch       {point.change} exchanges gradients once for more pairs: {rate} pairs a second{reason}"
        )
    return lines


def loader_lines(plan: LoaderPlan, cluster: Cluster) -> str:
    """The rates that the GPUs need of the loader and the storage, beside those that these have."""
    cores = "" if plan.cores is None else f"; {plan.cores:.1f} of {plan.available:g} cores a rank"
    makes = "unknown" if plan.capacity is None else f"{plan.capacity:,.0f} images/s"
    storage = "Its rate is unknown: set cluster.storage_gb_per_s"
    if plan.storage_bytes:
        storage = f"It gives {plan.storage_bytes / 1e6:,.0f} MB/s a rank"
    node = plan.needed_bytes * cluster.ranks_per_node / 1e9
    return (
        f"Loader      {plan.needed:,.0f} images/s a rank are needed{cores}. It makes {makes}: {plan.source}\n"
        f"Storage     {plan.needed_bytes / 1e6:,.0f} MB/s a rank are needed, {node:.3g} GB/s a node. {storage}"
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"

"""The ranks that share a batch, and what the losses ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..ops import record_files, tuning
from ..ops.contrastive.groups import Groups

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class CollectiveError(RuntimeError):
    """A collective of a loss failed; the message says which, on which rank, and why."""


class RankedLoss(nn.Module):
    """What the losses share: the group of ranks and how a tile is computed."""

    def __init__(
        self,
        cache_labels: bool,
        rank: int,
        world_size: int,
        process_group: dist.ProcessGroup | None,
        chunk_size: int | None,
        operand_dtype: torch.dtype | None,
        deterministic: bool,
        backend: str,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 0:
            raise ValueError(f"chunk_size must be at least 1, or 0 or None for the default, got {chunk_size}")
        if world_size > 1:
            # Compiled, collectives that overwrite their argument inside an autograd function would be lost.
            self._over_ranks = torch.compiler.disable(self._over_ranks)  # type: ignore[method-assign]
            self._share_backends = torch.compiler.disable(self._share_backends)  # type: ignore[method-assign]
        self._backends_shared = world_size == 1
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.process_group = process_group
        self.chunk_size = chunk_size or None
        self.operand_dtype = operand_dtype
        self.deterministic = deterministic
        self.backend = backend
        # open_clip's cache; trainers reset it by these names.
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}

    @staticmethod
    def _over_ranks(*arguments: Any) -> Any:
        """The loss of several ranks, by the autograd function of the class."""
        raise NotImplementedError

    def _ranks(self, features: Tensor) -> Ranks:
        """The group, once it is known to be the one that the constructor was told of."""
        name = type(self).__name__
        if self.world_size == 1 and self.process_group is None:
            return Ranks(name, None, 0, 1)
        group_size = dist.get_world_size(self.process_group) if dist.is_initialized() else 1
        if group_size != self.world_size:
            raise ValueError(f"{name} has world_size={self.world_size}, but the process group has {group_size} ranks")
        group_rank = dist.get_rank(self.process_group)
        if group_rank != self.rank:
            raise ValueError(f"{name} has rank={self.rank}, but this process is rank {group_rank} of the process group")
        ranks = Ranks(name, self.process_group, self.rank, self.world_size)
        if not self._backends_shared:
            self._share_backends(ranks, features.device)
            self._backends_shared = True
        return ranks

    def _share_backends(self, ranks: Ranks, device: torch.device) -> None:
        """Before the first batch: all ranks choose backends by rank 0's records, whatever their machines' own say."""
        records = {}
        if self.rank == 0:
            places = {"cpu": 0, device.type: device.index or 0}
            records = {kind: record_files.to_json(tuning.of_device(kind, index)) for kind, index in places.items()}
        records = ranks.broadcast_object(records, device, "broadcast of backends")
        found = {kind: record_files.from_json(record) for kind, record in records.items()}
        for record in found.values():
            record.origin = "the record of rank 0"
        tuning.install(found)


class Ranks:
    """The ranks that share a batch: the losses' collectives, each of which names itself where it fails."""

    def __init__(self, loss: str, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.loss, self.group, self.rank, self.size = loss, group, rank, size

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(f"{self.loss}, rank {self.rank} of {self.size}: {what} failed: {error}") from error

    def batch_sizes(self, image: Tensor, text: Tensor) -> tuple[list[int], list[int]]:
        """Each rank's number of images and of texts, once all agree on the features' width and precision."""
        if self.size == 1:
            return [len(image)], [len(text)]
        mine = [len(image), len(text), text.shape[1], text.element_size(), int(text.dtype == torch.bfloat16)]
        shapes = torch.empty(self.size * len(mine), dtype=torch.int64, device=text.device)
        with self._named("all-gather of batch sizes"):
            _all_gather(shapes, torch.tensor(mine, device=text.device), group=self.group)
            of_ranks = shapes.view(self.size, -1).tolist()
        for rank, other in enumerate(of_ranks):
            if other[2:] != mine[2:]:
                raise ValueError(
                    f"{self.loss}: ranks {self.rank} and {rank} differ in their features' width or dtype: "
                    f"{mine[2]} numbers of {mine[3]} bytes, {other[2]} numbers of {other[3]} bytes"
                )
        return [images for images, *_ in of_ranks], [texts for _, texts, *_ in of_ranks]

    def broadcast_object(self, value: Any, device: torch.device, what: str) -> Any:
        """Rank 0's value on every rank. It is pickled."""
        values = [value]
        with self._named(what):
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            dist.broadcast_object_list(values, src=source, group=self.group, device=device)
        return values[0]

    def gather(self, rows: Tensor, sizes: list[int], what: str) -> Tensor:
        """All ranks' rows (b, n), one under the other: (B, n)."""
        return self.start_gather(rows, sizes, what)()

    def start_gather(self, rows: Tensor, sizes: list[int], what: str) -> Callable[[], Tensor]:
        """`gather` on its way, for the caller to wait for."""
        if self.size == 1:
            return lambda: rows
        # Shorter parts are padded on the way, as collectives want equal shapes.
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * max(sizes), rows.shape[1])
        with self._named(f"all-gather of {what}"):
            work = _all_gather(gathered, padded, group=self.group, async_op=True)

        def arrived() -> Tensor:
            with self._named(f"all-gather of {what}"):
                work.wait()
            if padded.shape[0] == min(sizes):
                return gathered
            parts = gathered.view(self.size, max(sizes), -1)
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

        return arrived

    def reduce(self, rows: Tensor, sizes: list[int], what: str) -> Tensor:
        """This rank's rows (b, n) of the sum over ranks of (B, n): the reverse of `gather`."""
        return self.start_reduce(rows, sizes, what)()

    def start_reduce(self, rows: Tensor, sizes: list[int], what: str) -> Callable[[], Tensor]:
        """`reduce` on its way, for the caller to wait for; until then the rows are not to be changed."""
        if self.size == 1:
            return lambda: rows
        padded = rows
        if min(sizes) != max(sizes):
            padded = rows.new_zeros(self.size * max(sizes), rows.shape[1])
            parts = padded.view(self.size, max(sizes), -1)
            for part, own in zip(parts, rows.split(sizes), strict=True):
                part[: len(own)] = own
        reduced = rows.new_empty(max(sizes), rows.shape[1])
        with self._named(f"reduce-scatter of {what}"):
            work = _reduce_scatter(reduced, padded, group=self.group, async_op=True)

        def arrived() -> Tensor:
            # Names the input too: it must live until the collective has read it.
            with self._named(f"reduce-scatter of {what}, {tuple(padded.shape)}"):
                work.wait()
            return reduced[: sizes[self.rank]]

        return arrived

    def sum(self, value: Tensor, what: str) -> Tensor:
        """`value`, which becomes the sum over ranks."""
        if self.size > 1:
            with self._named(f"all-reduce of {what}"):
                dist.all_reduce(value, group=self.group)
        return value

    def merge_lse(self, lse: Tensor, what: str) -> Tensor:
        """The log-sum-exp over all ranks' terms of each rank's log-sum-exps."""
        if self.size == 1:
            return lse
        highest = lse.clone()
        with self._named(f"all-reduce of {what} (their maxima)"):
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.group)
        highest.clamp_min_(torch.finfo(lse.dtype).min)  # a column without negatives anywhere: -inf - -inf would be NaN
        return highest + self.sum((lse - highest).exp(), what).log()


class GatherRows(torch.autograd.Function):
    """All ranks' rows; the gradient of each goes back, summed, to the rank that it came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, sizes: list[int], what: str) -> Tensor:  # type: ignore[override]
        ctx.ranks, ctx.sizes, ctx.what = ranks, sizes, what
        return ranks.gather(rows, sizes, what)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.ranks.reduce(grad.contiguous(), ctx.sizes, f"gradients of {ctx.what}"), None, None, None


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors, of which every rank then computes the same loss."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, ranks: Ranks) -> Tensor:  # type: ignore[override]
        ctx.num_ranks = ranks.size
        return ranks.sum(value.clone(), "feature sums")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad * ctx.num_ranks, None  # for the averaging, as in _GlobalClipLoss


def one_dtype(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Towers that leave autocast in different dtypes, in the wider of the two; elsewhere that is the caller's error."""
    if image.dtype != text.dtype and torch.is_autocast_enabled(image.device.type):
        dtype = torch.promote_types(image.dtype, text.dtype)
        return image.to(dtype), text.to(dtype)
    return image, text


class Columns:
    """Where this rank's texts stand among those of all ranks, and where those of the others."""

    def __init__(self, rank: int, sizes: list[int]) -> None:
        first, self.total = sum(sizes[:rank]), sum(sizes)
        self.own = slice(first, first + sizes[rank])
        parts = slice(0, first), slice(self.own.stop, self.total)
        self.remote = [part for part in parts if part.start < part.stop]


def gather_groups(
    ranks: Ranks, image_ids: Tensor, text_ids: Tensor, image_sizes: list[int], text_sizes: list[int]
) -> Groups:
    """The groups of this rank's images (b,) among all ranks' images and texts."""
    images = ranks.gather(image_ids[:, None], image_sizes, "image groups")[:, 0]
    texts = ranks.gather(text_ids[:, None], text_sizes, "text groups")[:, 0]
    return Groups.of(image_ids, images, texts)


def check_rows(image: Tensor, other: Tensor) -> None:
    if len(image) != len(other):
        raise ValueError(f"image and text must have as many rows, got {len(image)} and {len(other)}")

"""The ranks that share a batch, their collectives, and the base class of the losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bclip_fast.distributed import message_device
from bclip_fast.ops import linear, record_files, tuning
from bclip_fast.ops.contrastive import LIMITS
from bclip_fast.ops.contrastive.checks import check_features, check_pairs, checked_groups, operand_dtype_of
from bclip_fast.ops.contrastive.groups import Groups
from bclip_fast.ops.contrastive.limits import shape_class
from bclip_fast.ops.derivatives import transformed
from bclip_fast.ops.dispatch import choose

# torch 2.13 renamed both functions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

GroupIds = Tensor | tuple[Tensor, Tensor]


class CollectiveError(RuntimeError):
    """A collective of a loss failed. The message names the collective, the rank and the reason."""


class DistributedLoss(nn.Module):
    """Base class of the losses: the group of ranks, and the options of the kernels."""

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
            raise ValueError(f"chunk_size={chunk_size} must be at least 1, or 0 or None for the default")
        # open_clip passes 0 for a single process.
        if world_size < 0:
            raise ValueError(f"world_size={world_size} must be the number of ranks, or 0 or 1 for a single process")
        self._backends_shared = world_size <= 1
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.process_group = process_group
        self.chunk_size = chunk_size or None
        self.operand_dtype = operand_dtype
        self.deterministic = deterministic
        self.backend = backend
        # open_clip's label cache. Trainers reset it by these names.
        self.prev_num_logits = 0
        self.labels: dict[torch.device, Tensor] = {}
        self._hide_collectives()

    def _hide_collectives(self) -> None:
        if self.world_size > 1:
            # torch.compile would drop collectives that overwrite their argument inside an autograd function.
            self._global_loss = torch.compiler.disable(_in_reverse_mode(type(self)))  # type: ignore[method-assign]
            self._share_backends = torch.compiler.disable(self._share_backends)  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy. A process group goes by its name."""
        state = {name: value for name, value in vars(self).items() if name not in ("_global_loss", "_share_backends")}
        if self.process_group is not None:
            state["process_group"] = self.process_group.group_name
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Raises:
            ValueError: this process doesn't have the process group.
        """
        super().__setstate__(state)
        if self.process_group is not None:
            self.process_group = _group_named(str(self.process_group), type(self).__name__)
        self._hide_collectives()

    @staticmethod
    def _global_loss(*arguments: Any) -> Any:
        """Apply the autograd function that computes this loss over several ranks."""
        raise NotImplementedError

    def _checked_ranks(self, features: Tensor) -> Ranks:
        """Return the ranks after checking that the process group agrees with the constructor's arguments."""
        name = type(self).__name__
        if self.world_size <= 1 and self.process_group is None:
            return Ranks(name, None, 0, 1)
        group_size = dist.get_world_size(self.process_group) if dist.is_initialized() else 1
        if group_size != max(self.world_size, 1):
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
        """Make every rank choose backends by rank 0's tuning records, not by its local ones."""
        records = {}
        if self.rank == 0:
            indices = {"cpu": 0, device.type: device.index or 0}
            records = {kind: record_files.to_json(tuning.of_device(kind, index)) for kind, index in indices.items()}
        records = ranks.broadcast_object(records, device, "broadcast of backends")
        shared_records = {kind: record_files.from_json(record) for kind, record in records.items()}
        for record in shared_records.values():
            record.origin = "the record of rank 0"
        tuning.install(shared_records)

    def _prepare(self, image: Tensor, text: Tensor) -> tuple[Ranks, Tensor, Tensor, torch.dtype]:
        """Return the ranks, the features in one dtype, and the dtype in which the kernels multiply them."""
        ranks = self._checked_ranks(image)
        image, text = promote_under_autocast(image, text)
        return ranks, image, text, operand_dtype_of(image, self.operand_dtype)

    def _checked_ids(self, image: Tensor, text: Tensor, groups: GroupIds | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the group ids of images and texts, or (None, None), after checking them and the features."""
        check_features(image, text)
        ids = checked_groups(image, text, groups)
        if groups is None:
            check_pairs(image, text)
        return ids

    def _product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """rows @ columns.T. Backends of the losses other than the reference don't concern the product."""
        return linear(rows, columns, backend="reference" if self.backend == "reference" else "auto")

    def _choose_backend(self, operator: str, image: Tensor, text: Tensor, dtype: torch.dtype) -> str:
        inputs = image, text, dtype, self.deterministic
        return choose(operator, LIMITS, self.backend, *inputs, dtype=dtype, shapes=shape_class(text))


def _group_named(name: str, loss: str) -> dist.ProcessGroup:
    groups = dist.distributed_c10d._world.pg_names if dist.is_initialized() else {}
    for group, group_name in groups.items():
        if group_name == name:
            return group
    raise ValueError(
        f"{loss} was saved with the process group {name!r}, which this process doesn't have: create the groups first, "
        "in the same order, or save the loss with process_group=None"
    )


def _in_reverse_mode(loss: type[DistributedLoss]) -> Callable[..., Any]:
    """The function that computes the loss over ranks, behind a check of the derivatives.

    An autograd function has no other ones: torch would raise errors that name neither the loss nor the remedy.
    """

    def run(*arguments: Any) -> Any:
        if transformed(arguments):
            raise NotImplementedError(
                f"{loss.__name__} over several ranks has derivatives in reverse mode only: for forward mode "
                "(torch.func.jvp, torch.autograd.forward_ad) or a transform of torch.func gather the features and pass "
                'world_size=1, backend="reference"'
            )
        return loss._global_loss(*arguments)

    return run


class Ranks:
    """The ranks that share a batch. Every collective names itself in the error when it fails."""

    def __init__(self, loss: str, group: dist.ProcessGroup | None, rank: int, size: int) -> None:
        self.loss, self.group, self.rank, self.size = loss, group, rank, size

    @contextmanager
    def _naming(self, operation: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CollectiveError(
                f"{self.loss}, rank {self.rank} of {self.size}: {operation} failed: {error}"
            ) from error

    def batch_sizes(self, image: Tensor, text: Tensor) -> tuple[list[int], list[int]]:
        """Return each rank's number of images and of texts, after comparing the features' width and dtype."""
        if self.size == 1:
            return [len(image)], [len(text)]
        local = [len(image), len(text), text.shape[1], text.element_size(), int(text.dtype == torch.bfloat16)]
        # On the CPU if possible: with NCCL, reading the answer would wait for all queued work of the GPU.
        device = message_device(text.device, self.group)
        gathered = torch.empty(self.size * len(local), dtype=torch.int64, device=device)
        with self._naming("all-gather of batch sizes"):
            _all_gather(gathered, torch.tensor(local, device=device), group=self.group)
            rows = gathered.view(self.size, -1).tolist()
        for rank, row in enumerate(rows):
            if row[2:] != local[2:]:
                raise ValueError(
                    f"{self.loss}: ranks {self.rank} and {rank} differ in their features' width or dtype: "
                    f"{local[2]} numbers of {local[3]} bytes, {row[2]} numbers of {row[3]} bytes"
                )
        return [num_images for num_images, *_ in rows], [num_texts for _, num_texts, *_ in rows]

    def broadcast_object(self, value: Any, device: torch.device, operation: str) -> Any:
        """Return rank 0's `value` on every rank. It travels pickled."""
        values = [value]
        with self._naming(operation):
            source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
            messages = message_device(device, self.group)
            dist.broadcast_object_list(values, src=source, group=self.group, device=messages)
        return values[0]

    def gather(self, rows: Tensor, sizes: list[int], name: str) -> Tensor:
        """Return the rows (b, n) of all ranks, concatenated to (B, n)."""
        return self.start_gather(rows, sizes, name)()

    def start_gather(self, rows: Tensor, sizes: list[int], name: str) -> Callable[[], Tensor]:
        """Start a `gather` and return the function that waits for its result."""
        if self.size == 1:
            return lambda: rows
        # Collectives need equal shapes, so shorter parts travel padded.
        padded = rows.new_zeros(max(sizes), rows.shape[1])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * max(sizes), rows.shape[1])
        with self._naming(f"all-gather of {name}"):
            work = _all_gather(gathered, padded, group=self.group, async_op=True)

        def wait() -> Tensor:
            with self._naming(f"all-gather of {name}"):
                work.wait()
            if padded.shape[0] == min(sizes):
                return gathered
            parts = gathered.view(self.size, max(sizes), -1)
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

        return wait

    def reduce(self, rows: Tensor, sizes: list[int], name: str) -> Tensor:
        """Sum the rows (B, n) over ranks and return this rank's part (b, n): the reverse of `gather`."""
        return self.start_reduce(rows, sizes, name)()

    def start_reduce(self, rows: Tensor, sizes: list[int], name: str) -> Callable[[], Tensor]:
        """Start a `reduce` and return the function that waits for its result. Don't change the rows before that."""
        if self.size == 1:
            return lambda: rows
        padded = rows
        if min(sizes) != max(sizes):
            padded = rows.new_zeros(self.size * max(sizes), rows.shape[1])
            parts = padded.view(self.size, max(sizes), -1)
            for part, unpadded in zip(parts, rows.split(sizes), strict=True):
                part[: len(unpadded)] = unpadded
        reduced = rows.new_empty(max(sizes), rows.shape[1])
        with self._naming(f"reduce-scatter of {name}"):
            work = _reduce_scatter(reduced, padded, group=self.group, async_op=True)

        def wait() -> Tensor:
            # The reference to `padded` keeps the input alive until the collective has read it.
            with self._naming(f"reduce-scatter of {name}, {tuple(padded.shape)}"):
                work.wait()
            return reduced[: sizes[self.rank]]

        return wait

    def sum(self, value: Tensor, name: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Sum `value` over ranks in place, or combine it by another operation, and return it."""
        if self.size > 1:
            with self._naming(f"all-reduce of {name}"):
                dist.all_reduce(value, operation, group=self.group)
        return value

    def merge_lse(self, lse: Tensor, name: str) -> Tensor:
        """Merge the log-sum-exps of all ranks' terms elementwise."""
        if self.size == 1:
            return lse
        highest = self.sum(lse.clone(), f"{name} (their maxima)", dist.ReduceOp.MAX)
        # A column without negatives on any rank is -inf, and -inf - -inf would be NaN.
        highest.clamp_min_(torch.finfo(lse.dtype).min)
        return highest + self.sum((lse - highest).exp(), name).log()


def promote_under_autocast(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Convert features to the wider dtype of the two, if autocast let the towers end in different dtypes.

    Without autocast, different dtypes are the caller's error, which a later check reports.
    """
    if image.dtype != text.dtype and torch.is_autocast_enabled(image.device.type):
        dtype = torch.promote_types(image.dtype, text.dtype)
        return image.to(dtype), text.to(dtype)
    return image, text


class ColumnRanges:
    """The columns of the global similarity matrix that this rank's texts occupy, and those of the other ranks."""

    def __init__(self, rank: int, sizes: list[int]) -> None:
        start, self.total = sum(sizes[:rank]), sum(sizes)
        self.local = slice(start, start + sizes[rank])
        others = slice(0, start), slice(self.local.stop, self.total)
        self.remote = [columns for columns in others if columns.start < columns.stop]

    def remote_of(self, values: Tensor) -> Tensor:
        """The remote columns of a tensor (B, ...), in one piece, so that one tile covers them all."""
        parts = [values[columns] for columns in self.remote]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def put_remote(self, values: Tensor, result: Tensor) -> None:
        """Write what `remote_of` would return for `result` to `result`."""
        sizes = [columns.stop - columns.start for columns in self.remote]
        for columns, part in zip(self.remote, values.split(sizes), strict=True):
            result[columns] = part


def gather_groups(
    ranks: Ranks, image_ids: Tensor, text_ids: Tensor, image_sizes: list[int], text_sizes: list[int]
) -> Groups:
    """The groups of this rank's images (b,) among the images and texts of all ranks."""
    images = ranks.gather(image_ids[:, None], image_sizes, "image groups")[:, 0]
    texts = ranks.gather(text_ids[:, None], text_sizes, "text groups")[:, 0]
    return Groups.of(image_ids, images, texts)


def num_rows(*features: Tensor) -> Tensor:
    """The number of rows of each tensor, as one tensor on their device, in their dtype.

    Kernels write the numbers. A copy from the host would wait for the device.
    """
    return torch.stack([rows.new_full((), len(rows)) for rows in features])


def checked_smoothing(label_smoothing: float) -> float:
    """Return the value. Raises ValueError unless it lies within 0 and 1."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be within 0 and 1")
    return label_smoothing

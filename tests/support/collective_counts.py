"""Bytes of the collectives that a process starts: those of our code, of DDP's reducer and of DeepSpeed."""

from __future__ import annotations

import collections
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch.distributed's operators, and whether the larger of their tensors is an input or an output.
_OPERATIONS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
}


class CollectiveCounter(TorchDispatchMode):
    """Sum the bytes of all collectives by phase and operation. Set `phase` between the parts of a step.

    Collectives with other operations count under their own names.

    num_bytes: {"phase operation": bytes} of the gathered, unscattered or summed tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.num_bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.__name__.partition(".")[0]
            sizes = [tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, Tensor)]
            # A gather has the whole and this rank's part. An all-reduce has one tensor.
            self.num_bytes[f"{self.phase} {_OPERATIONS.get(name, name)}"] += max(sizes, default=0)
        return function(*args, **(kwargs or {}))

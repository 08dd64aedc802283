"""Losses over all ranks, with open_clip's constructors, keywords and return forms.

Every rank returns the loss of the global batch. Data-parallel averaging (DDP, DeepSpeed, FSDP) then gives the gradients
of that loss for the towers, logit_scale and logit_bias. The ranks' batch sizes may differ. If the loss is scaled before
`backward`, all ranks must use the same factor.

Only text features travel: one gather, an O(B) reduction of column sums, and one reduce-scatter of gradients. `forward`
never holds more than `chunk_size` rows of the similarity matrix. DistillClipLoss holds four such chunks.

If a rank is lost, the other ranks raise a `CollectiveError` after the process group's timeout, which
`torch.distributed.init_process_group` or `new_group` sets. The error names the collective that failed. With NCCL, set
TORCH_NCCL_BLOCKING_WAIT=1. Otherwise its watchdog ends the process, and only its log names the collective.

With backend="reference" the losses have second derivatives, also over ranks, and on one rank forward-mode derivatives
and the transforms of torch.func. They hold the similarity matrix. Other backends raise a NotImplementedError.

The losses can be copied and pickled. A process group is saved by its name, and must exist where the loss is loaded.
"""

from __future__ import annotations

from .clip import ClipLoss
from .coca import CoCaLoss
from .collectives import CollectiveError
from .distill import DistillClipLoss
from .siglip import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "CollectiveError", "DistillClipLoss", "SigLipLoss"]

"""Losses over all ranks, with open_clip's constructors, keywords and return forms.

Every rank returns the loss of the global batch. After data-parallel averaging (DDP, DeepSpeed, FSDP) the gradients of
the towers, of logit_scale and of logit_bias are those of that global loss, whatever the ranks' batch sizes; all ranks
must scale the loss alike before `backward`. Only text features travel: one gather, an O(B) reduction of column sums,
one reduce-scatter of gradients. `forward` never holds more than `chunk_size` rows of the matrix of similarities,
DistillClipLoss four such chunks.

A rank that is lost ends the others' wait after the process group's timeout (`torch.distributed.init_process_group`
or `new_group` set it) with a `CollectiveError` that says what they were waiting for. NCCL's watchdog ends the process
itself unless TORCH_NCCL_BLOCKING_WAIT=1 is set; its log then names the collective.
"""

from __future__ import annotations

from .clip import ClipLoss
from .coca import CoCaLoss
from .collectives import CollectiveError
from .distill import DistillClipLoss
from .siglip import SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "CollectiveError", "DistillClipLoss", "SigLipLoss"]

# %% [markdown]
# # The loss in plain DDP
#
# This tutorial trains two linear towers with `DistributedDataParallel` and `ClipLoss`. Run it on any number of ranks.
# The losses stay the same, because the loss and its gradient are always those of the global batch:
#
#     python loss_in_ddp.py
#     torchrun --nproc-per-node 2 loss_in_ddp.py
#
# ## The process group
#
# torchrun sets the variables `RANK` and `WORLD_SIZE`. Without them, the script is the only rank.

# %%
import os

import torch
import torch.distributed as dist
from torch import nn

from bclip_fast import ClipLoss

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if world_size > 1:
    dist.init_process_group("gloo")

# %% [markdown]
# ## The towers
#
# Every rank builds the same weights from the same seed. The logit scale is a parameter, as in CLIP.


# %%
class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual, self.text = nn.Linear(48, 16), nn.Linear(32, 16)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images, texts):
        normalize = nn.functional.normalize
        return normalize(self.visual(images), dim=-1), normalize(self.text(texts), dim=-1), self.logit_scale.exp()


torch.manual_seed(0)
model = Towers()
if world_size > 1:
    model = nn.parallel.DistributedDataParallel(model)

# %% [markdown]
# ## The steps
#
# Each rank takes its own part of the global batch of 64 pairs. `ClipLoss` exchanges the text features, and DDP averages
# the gradients. No other change is needed.

# %%
loss_function = ClipLoss(rank=rank, world_size=world_size)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
pairs = torch.randn(64, 48)
part = pairs.chunk(world_size)[rank]
for step in range(3):
    image_features, text_features, logit_scale = model(part, part[:, :32])
    loss = loss_function(image_features, text_features, logit_scale)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if rank == 0:
        print(f"step {step}: {loss.item():.4f}")
if world_size > 1:
    dist.destroy_process_group()

# %% [markdown]
# ```text
# step 0: 6.1412
# step 1: 3.9766
# step 2: 3.9335
# ```
#
# With open_clip's loss, this holds only with `gather_with_grad=True`.

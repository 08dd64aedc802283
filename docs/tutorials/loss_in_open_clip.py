# %% [markdown]
# # The loss in open_clip
#
# open_clip's loss builds the whole similarity matrix. `ClipLoss` of bclip_fast has the same constructor and the same
# `forward`, and holds only a few rows of that matrix at a time. There are two ways to use it in open_clip.
#
# You need the packages `bclip_fast` and `open_clip_torch`.
#
# ## Change one import
#
# This is the better way if you can edit your training code.

# %%
import open_clip
import torch

from bclip_fast import ClipLoss

torch.manual_seed(0)
features = torch.nn.functional.normalize(torch.randn(2, 1024, 512), dim=-1)
images, texts = features[0].requires_grad_(), features[1].requires_grad_()
scale = torch.tensor(20.0)

ours = ClipLoss()(images, texts, scale)
theirs = open_clip.ClipLoss()(images, texts, scale)
print(f"{ours.item():.4f} {theirs.item():.4f}")

# %% [markdown]
# ```text
# 7.3281 7.3281
# ```
#
# The gradients agree, too. Their largest difference is far below the rounding of a training step in bfloat16.

# %%
(our_gradient,) = torch.autograd.grad(ours, images)
(their_gradient,) = torch.autograd.grad(theirs, images)
print((our_gradient - their_gradient).abs().max().item() < 1e-8)

# %% [markdown]
# ```text
# True
# ```
#
# ## Leave open_clip as it is
#
# `install` replaces the four loss classes in open_clip's modules. Call it before open_clip builds its loss, for example
# at the top of your launch script. The trainer of open_clip then uses our losses without any other change.

# %%
from types import SimpleNamespace

from bclip_fast.integrations import open_clip as integration

integration.install()
settings = dict.fromkeys(["distill", "model", "siglip", "local_loss", "gather_with_grad", "horovod"], False)
arguments = SimpleNamespace(**settings | {"model": "ViT-B-16", "rank": 0, "world_size": 1})
loss = open_clip.create_loss(arguments)
print(type(loss).__module__)
integration.uninstall()

# %% [markdown]
# ```text
# bclip_fast.loss.clip
# ```
#
# ## On several ranks
#
# The options `local_loss` and `gather_with_grad` change nothing here. Our loss always has the gradient of the global
# batch. [Losses](../losses.md) explains why, and [the loss's mathematics](../loss-mathematics.md)
# derives it.

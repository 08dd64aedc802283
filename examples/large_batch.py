"""Gradient caching (GradCache, arXiv 2101.06983) around ClipLoss: a large batch in the memory of a micro-batch.

    python examples/large_batch.py --batch_size 4096 --micro_batch_size 64

`bclip train --micro_batch_size` does the same for whole runs, with dropout, several ranks and DeepSpeed.
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn.functional import normalize

from bclip_fast import ClipLoss

parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=4096)
parser.add_argument("--micro_batch_size", type=int, default=64)
args = parser.parse_args()

torch.manual_seed(0)
tower = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 128))
scale = torch.tensor(20.0)
images, texts = torch.randn(2, args.batch_size, 64)


def embed(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return unit vectors (b, 128)."""
    return normalize(model(batch), dim=-1)


# 1. Embed every micro-batch without a graph.
with torch.no_grad():
    cached = [torch.cat([embed(tower, part) for part in data.split(args.micro_batch_size)]) for data in (images, texts)]
# 2. The loss of the whole batch, and its gradient by the embeddings.
cached = [embeddings.requires_grad_() for embeddings in cached]
ClipLoss()(*cached, scale).backward()
# 3. Embed each micro-batch again, now with a graph, and pass its part of the gradient on.
for data, embeddings in zip((images, texts), cached, strict=True):
    for part, gradient in zip(
        data.split(args.micro_batch_size), embeddings.grad.split(args.micro_batch_size), strict=True
    ):
        embed(tower, part).backward(gradient)

# The same step without caching holds the activations of the whole batch.
plain = copy.deepcopy(tower)
plain.zero_grad()
ClipLoss()(embed(plain, images), embed(plain, texts), scale).backward()
pairs = zip(tower.parameters(), plain.parameters(), strict=True)
difference = max((ours.grad - theirs.grad).abs().max().item() for ours, theirs in pairs)
print(f"largest difference of a gradient: {difference:.0e}")

"""Train two towers with ClipLoss, and compare its memory with that of the dense loss.

python examples/loss_in_your_loop.py --batch_size 8192
"""

import argparse

import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from bclip_fast import ClipLoss


def dense_loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the same loss by its definition, with the whole similarity matrix in memory."""
    logits = scale * images @ texts.T
    targets = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


parser = argparse.ArgumentParser()
parser.add_argument("--batch_size", type=int, default=8192)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
image_tower, text_tower = (nn.Linear(256, 512, device=device) for _ in range(2))
log_scale = nn.Parameter(torch.tensor(2.66, device=device))
optimizer = torch.optim.AdamW([*image_tower.parameters(), *text_tower.parameters(), log_scale], lr=1e-3)
loss_function = ClipLoss()

for step in range(args.steps):
    pairs = torch.randn(args.batch_size, 256, device=device)
    images, texts = normalize(image_tower(pairs), dim=-1), normalize(text_tower(pairs), dim=-1)
    loss = loss_function(images, texts, log_scale.exp())
    if step == 0:
        dense = dense_loss(images.detach(), texts.detach(), log_scale.detach().exp())
        print(f"the dense loss is the same: {torch.allclose(loss, dense, atol=1e-5)}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
print(f"the similarity matrix, which ClipLoss never holds, takes {args.batch_size**2 * 4 / 2**20:.0f} MiB in fp32")

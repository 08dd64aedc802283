from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from torch import nn

from bclip_fast import ClipLoss
from bclip_fast.ops.contrastive import reference

WIDTH = 8


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.image, self.text = nn.Linear(6, WIDTH, dtype=torch.float64), nn.Linear(5, WIDTH, dtype=torch.float64)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, image, text):
        return F.normalize(self.image(image)), F.normalize(self.text(text)), self.scale.exp(), self.bias


def data(sizes):
    generator = torch.Generator().manual_seed(2)
    total = sum(sizes)
    images = torch.randn(total, 6, generator=generator, dtype=torch.float64)
    texts = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    return images.split(sizes), texts.split(sizes)


def averaged_gradients(rank, sizes, local_loss, gather_with_grad):
    """Loss and gradients after DDP's averaging, of this rank's share of the batch."""
    images, texts = data(sizes)
    towers = nn.parallel.DistributedDataParallel(Towers())
    loss = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=len(sizes), chunk_size=3)(
        *towers(images[rank], texts[rank])
    )
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in towers.module.parameters()]]


def single_process(sizes):
    images, texts = data(sizes)
    towers = Towers()
    loss = reference.dense(*towers(torch.cat(images), torch.cat(texts)))
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in towers.parameters()]]


@pytest.mark.parametrize("sizes", [(6, 6), (5, 1, 7)], ids=str)
def test_gradients_after_averaging_are_those_of_the_global_loss(sizes):
    modes = [(False, False), (True, True)] if len(sizes) == 2 else [(True, False)]
    truth = single_process(sizes)
    for mode in modes:
        for result in on_ranks(len(sizes), averaged_gradients, sizes, *mode):
            for ours, true in zip(result, truth, strict=True):
                torch.testing.assert_close(ours, true, rtol=1e-10, atol=1e-14)


def sub_group(rank, sizes):
    """Ranks 1 and 2 of three share a batch; rank 0 stands apart."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return None
    images, texts = data(sizes)
    features = [tensor.detach() for tensor in Towers()(images[rank - 1], texts[rank - 1])]
    return ClipLoss(rank=rank - 1, world_size=2, process_group=group)(*features)


def test_a_sub_group_shares_a_batch():
    sizes = (4, 3)
    results = on_ranks(3, sub_group, sizes)
    for result in results[1:]:
        torch.testing.assert_close(result, single_process(sizes)[0])


def test_one_process_has_open_clips_forms():
    image, text = F.normalize(torch.randn(2, 7, 16)).requires_grad_(), F.normalize(torch.randn(2, 7, 16))
    image, text = image[0], text[1]
    loss = ClipLoss()(image_features=image, text_features=text, logit_scale=torch.tensor(20.0))
    assert loss.ndim == 0
    torch.testing.assert_close(loss, reference.dense(image, text, torch.tensor(20.0)))
    result = ClipLoss()(image, text, 20.0, output_dict=True)
    assert list(result) == ["contrastive_loss"] and torch.equal(result["contrastive_loss"], loss)


def test_a_world_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="world_size=2, but the process group has 1"):
        ClipLoss(world_size=2)(torch.zeros(2, 4), torch.zeros(2, 4), 1.0)

"""The losses of the contrastive operators' options by their definitions, on dense logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_cross_entropy(logits, same, normalizer=None):
    """Mean over rows with a positive, targets uniform over the positives; by the definition, on dense logits."""
    log_probabilities = logits - (logits if normalizer is None else normalizer).logsumexp(1, keepdim=True)
    has = same.any(1)
    return -((log_probabilities * same).sum(1)[has] / same.sum(1)[has]).mean()


def dense(image, text, scale, same, hardness=0.0):
    """Both directions; hardness adds to each negative's logit a multiple of its cosine, as a constant."""
    cosines = image @ text.T
    logits = scale * cosines
    # Whatever the kernel's precision, autograd sees constants.
    weighted = logits + torch.where(same, 0.0, hardness * cosines.detach()).to(logits.dtype)
    return (soft_cross_entropy(logits, same, weighted) + soft_cross_entropy(logits.T, same.T, weighted.T)) / 2


def dense_siglip(image, text, scale, bias, same):
    logits = scale * image @ text.T + bias
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)

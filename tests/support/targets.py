"""The losses of the contrastive operators' options, by their definitions on dense logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def soft_cross_entropy(logits, same, normalizer=None):
    """The mean cross-entropy over rows with a positive, with targets uniform over the positives."""
    log_probabilities = logits - (logits if normalizer is None else normalizer).logsumexp(1, keepdim=True)
    has_positive = same.any(1)
    means = (log_probabilities * same).sum(1)[has_positive] / same.sum(1)[has_positive]
    return -means.mean()


def dense(image, text, scale, same, hardness=0.0):
    """The softmax loss. `hardness` adds a multiple of its cosine to each negative's logit, as a constant."""
    cosines = image @ text.T
    logits = scale * cosines
    # Constants for autograd, as in the kernels.
    weighted = logits + torch.where(same, 0.0, hardness * cosines.detach()).to(logits.dtype)
    return (soft_cross_entropy(logits, same, weighted) + soft_cross_entropy(logits.T, same.T, weighted.T)) / 2


def dense_siglip(image, text, scale, bias, same):
    """The sigmoid loss."""
    logits = scale * image @ text.T + bias
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum() / len(image)

"""Vectors in clusters, for tests of indexes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def vectors(num: int, dim: int, seed: int = 0) -> np.ndarray:
    """Return unit rows around 20 centres, float32 (num, dim)."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, dim, generator=torch.Generator().manual_seed(99))
    rows = centres[torch.arange(num) % 20] + 0.7 * torch.randn(num, dim, generator=generator)
    return F.normalize(rows, dim=1).numpy()

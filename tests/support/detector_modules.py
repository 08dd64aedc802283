"""Import the modules of the panel detector, so that forked processes find them loaded."""

from __future__ import annotations

import contextlib

from bclip_fast.benchmarks import peers

with contextlib.suppress(ImportError):
    peers.import_torchvision()

import transformers.models.dab_detr.modeling_dab_detr
import transformers.models.resnet.modeling_resnet  # noqa: F401

import bclip_fast.ingest.panels.detector  # noqa: F401

"""Import the modules of the panel detector, so that forked processes find them loaded."""

from __future__ import annotations

from peers import import_torchvision

import_torchvision()

import transformers.models.dab_detr.modeling_dab_detr  # noqa: E402
import transformers.models.resnet.modeling_resnet  # noqa: E402, F401

import bclip_fast.ingest.panels.detector  # noqa: E402, F401

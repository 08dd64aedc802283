"""Types of the public names, which `__init__.py` imports on first use."""

from typing import Any

from . import ops as ops
from .loss import ClipLoss as ClipLoss
from .loss import CoCaLoss as CoCaLoss
from .loss import DistillClipLoss as DistillClipLoss
from .loss import SigLipLoss as SigLipLoss
from .model.biomedclip import BiomedClip as BiomedClip
from .model.biomedclip import BiomedClipConfig as BiomedClipConfig
from .pretrained import load as load
from .pretrained import save as save
from .version import __version__ as __version__

# The compiled modules, of which _cuda may be missing.
_cpu: Any
_cuda: Any

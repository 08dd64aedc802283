"""Evaluation of CLIP-like models: retrieval, zero-shot classification, linear probes and questions.

Every score comes with its chance baseline.
"""

from .command import EvalCommand, run
from .config import EvalConfig
from .evaluate import Evaluation, evaluate

__all__ = ["EvalCommand", "EvalConfig", "Evaluation", "evaluate", "run"]

"""Evaluation of CLIP-like models: retrieval and zero-shot classification, each figure beside its chance level."""

from .command import EvalCommand, run
from .config import EvalConfig
from .evaluate import Evaluation, evaluate

__all__ = ["EvalCommand", "EvalConfig", "Evaluation", "evaluate", "run"]

"""Evaluation of CLIP-like models: retrieval and zero-shot classification, each figure beside its chance level."""

from .command import EvalCommand, Evaluation, evaluate, run
from .config import EvalConfig

__all__ = ["EvalCommand", "EvalConfig", "Evaluation", "evaluate", "run"]

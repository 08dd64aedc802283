"""Evaluation of CLIP-like models: retrieval and zero-shot classification, each figure beside its chance level."""

from .command import EvalCommand, EvalConfig, Evaluation, evaluate, run

__all__ = ["EvalCommand", "EvalConfig", "Evaluation", "evaluate", "run"]

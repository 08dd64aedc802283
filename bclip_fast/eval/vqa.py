"""Visual question answering as classification over the training set's answers: data sets, metrics, saved heads.

An answer counts as right if it equals the reference exactly after `normalise` (BiomedCLIP's rule); a question whose
answer the vocabulary lacks can't be answered rightly. Token F1 counts words; the paper counts GPT-2 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bclip_fast.data.images import open_image
from bclip_fast.errors import UserError
from bclip_fast.model.meter import VqaModel

from . import statistics
from .datasets.vqa import Question, VqaDataset, _read

if TYPE_CHECKING:
    from .embed import Embedder


def token_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, as multisets; 1 where both are empty."""
    words, wanted = Counter(answer.split()), Counter(truth.split())
    if not words or not wanted:
        return float(words == wanted)
    common = (words & wanted).total()
    return 2 * common / (words.total() + wanted.total())


def measure(
    questions: Sequence[Question], answers: Sequence[str], known: Sequence[str], common: Sequence[str]
) -> dict[str, Any]:
    """Overall, open and closed accuracy and token F1, with intervals.

    Args:
        answers: what the model said to each question.
        known: the vocabulary, whose share of the reference answers bounds the accuracy.
        common: the training set's most frequent answer to open and to closed questions: chance.
    """
    truths = [q.answer for q in questions]
    right = np.array([said == truth for said, truth in zip(answers, truths, strict=True)], dtype=np.float64)
    f1 = np.array([token_f1(said, truth) for said, truth in zip(answers, truths, strict=True)])
    guess = np.array([float(q.answer == common[q.kind == "closed"]) for q in questions])
    guess_f1 = np.array([token_f1(common[q.kind == "closed"], q.answer) for q in questions])
    kinds = np.array([q.kind for q in questions])
    figures = []
    for name, values, chance, rows in (
        ("accuracy", right, guess, kinds != ""),
        ("open accuracy", right, guess, kinds == "open"),
        ("closed accuracy", right, guess, kinds == "closed"),
        ("token F1", f1, guess_f1, kinds != ""),
    ):
        if rows.any():
            figures.append(
                statistics.figure(
                    name,
                    float(values[rows].mean()),
                    float(chance[rows].mean()),
                    "the most frequent training answer of the question's type",
                    int(rows.sum()),
                    interval=statistics.mean_interval(values[rows]),
                )
            )
    vocabulary = set(known)
    return {
        "num_samples": len(questions),
        "num_answers": len(known),
        "answerable": sum(truth in vocabulary for truth in truths) / len(truths),
        "figures": figures,
        "samples": {
            "key": [q.key for q in questions],
            "question": [q.text for q in questions],
            "kind": kinds.tolist(),
            "label": truths,
            "prediction": list(answers),
            "accuracy": right.astype(int).tolist(),
            "token F1": f1.round(6).tolist(),
        },
    }


@torch.inference_mode()
def predict(embedder: Embedder, data: VqaDataset) -> list[str]:
    """The model's answer to each question."""
    model, said = embedder.model, []
    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(embedder.num_workers) as pool:
            for start in range(0, len(data), embedder.batch_size):
                part = data.questions[start : start + embedder.batch_size]
                images = pool.map(lambda q: embedder.preprocess(open_image(_read(q.image), lambda: q.key)), part)
                ids = embedder.tokenizer([q.text for q in part]).to(embedder.device)
                with embedder.autocast():
                    logits = model(torch.stack(list(images)).to(embedder.device), ids)["logits"].float()
                if not bool(torch.isfinite(logits).all()):
                    raise UserError("the model's logits hold NaN or infinity: the weights are broken")
                said += [model.answers[i] for i in logits.argmax(1).tolist()]
    finally:
        model.train(was_training)
    return said


def run(embedder: Embedder, data: Any) -> dict[str, Any]:
    """The result of protocol `vqa`."""
    model = embedder.model
    if not isinstance(model, VqaModel):
        raise UserError("this task needs a model tuned for it: bclip finetune MODEL --task vqa_rad --data DIR")
    common = getattr(model, "common_answers", ("", "yes"))
    return measure(data.questions, predict(embedder, data), model.answers, common)

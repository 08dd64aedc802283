"""Visual question answering as classification over the answers of the training set: metrics and the protocol.

An answer is correct if it equals the reference after `normalise` (BiomedCLIP's rule). If the vocabulary lacks the
reference, no answer is correct. Token F1 counts words, whereas the paper counts GPT-2 tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from bclip_fast.errors import UserError
from bclip_fast.model.meter import VqaModel

from . import statistics
from .datasets.vqa import Question, VqaDataset
from .embed import Embedder


def token_f1(answer: str, reference: str) -> float:
    """Return the harmonic mean of precision and recall over words, as multisets. Two empty texts give 1."""
    answer_words, reference_words = Counter(answer.split()), Counter(reference.split())
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    num_common = (answer_words & reference_words).total()
    return 2 * num_common / (answer_words.total() + reference_words.total())


def measure(
    questions: Sequence[Question], answers: Sequence[str], vocabulary: Sequence[str], common_answers: Sequence[str]
) -> dict[str, Any]:
    """Compute accuracy, open and closed accuracy and token F1, with intervals.

    Args:
        answers: the model's answer to each question.
        vocabulary: the answers that the model can give. Its share of the references bounds the accuracy.
        common_answers: the most frequent training answer to open and to closed questions, as chance baseline.
    """
    references = [q.answer for q in questions]
    is_correct = np.array([answer == true for answer, true in zip(answers, references, strict=True)], dtype=np.float64)
    f1 = np.array([token_f1(answer, true) for answer, true in zip(answers, references, strict=True)])
    guesses = [common_answers[q.kind == "closed"] for q in questions]
    chance_correct = np.array([float(guess == true) for guess, true in zip(guesses, references, strict=True)])
    chance_f1 = np.array([token_f1(guess, true) for guess, true in zip(guesses, references, strict=True)])
    kinds = np.array([q.kind for q in questions])
    metrics = []
    for name, values, chance, rows in (
        ("accuracy", is_correct, chance_correct, kinds != ""),
        ("open accuracy", is_correct, chance_correct, kinds == "open"),
        ("closed accuracy", is_correct, chance_correct, kinds == "closed"),
        ("token F1", f1, chance_f1, kinds != ""),
    ):
        if rows.any():
            metrics.append(
                statistics.metric(
                    name,
                    float(values[rows].mean()),
                    float(chance[rows].mean()),
                    "the most frequent training answer of the question's type",
                    int(rows.sum()),
                    interval=statistics.mean_interval(values[rows]),
                )
            )
    known_answers = set(vocabulary)
    return {
        "num_samples": len(questions),
        "num_answers": len(vocabulary),
        "answerable": sum(true in known_answers for true in references) / len(references),
        "figures": metrics,
        "samples": {
            "key": [q.key for q in questions],
            "question": [q.text for q in questions],
            "kind": kinds.tolist(),
            "label": references,
            "prediction": list(answers),
            "accuracy": is_correct.astype(int).tolist(),
            "token F1": f1.round(6).tolist(),
        },
    }


@torch.inference_mode()
def predict(embedder: Embedder, data: VqaDataset) -> list[str]:
    """Return the model's answer to each question. Raises UserError if a logit is not finite."""
    model, answers = embedder.model, []
    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(embedder.num_workers) as pool:
            for start in range(0, len(data), embedder.batch_size):
                rows = range(start, min(start + embedder.batch_size, len(data)))
                images = pool.map(lambda i: embedder.read(data, i), rows)
                ids = embedder.tokenizer([data.questions[i].text for i in rows]).to(embedder.device)
                with embedder.autocast():
                    logits = model(torch.stack(list(images)).to(embedder.device), ids)["logits"].float()
                if not bool(torch.isfinite(logits).all()):
                    raise UserError(
                        "the model's logits hold NaN or infinity: its weights are damaged; use another checkpoint"
                    )
                answers += [model.answers[i] for i in logits.argmax(1).tolist()]
    finally:
        model.train(was_training)
    return answers


def run(embedder: Embedder, data: Any) -> dict[str, Any]:
    """Return the result of protocol `vqa`. Raises UserError if the model has no answers."""
    model = embedder.model
    if not isinstance(model, VqaModel):
        raise UserError("this task needs a model tuned for it: bclip finetune MODEL --task vqa_rad --data DIR")
    common_answers = getattr(model, "common_answers", ("", "yes"))
    return measure(data.questions, predict(embedder, data), model.answers, common_answers)

"""The report of an evaluation: one HTML file without scripts, which loads nothing from the network.

Captions, labels and keys are untrusted data. jinja2 escapes them all, and images are decoded and encoded again. A
content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bclip_fast.errors import UserError
from bclip_fast.html import chart
from bclip_fast.html.curves import training_curves
from bclip_fast.html.page import environment, thumbnail

from . import report_charts
from .datasets import EvalDataset
from .results import write_files
from .suite_results import TITLES

_NUM_QUESTIONS = 8
_NUM_EXAMPLES, _NUM_PROBABILITIES = 6, 3
_NUM_MISTAKES = 12
_NUM_FIRST_QUERIES = 2
"""Queries of the gallery that open the report. The others follow the tables."""


def write(
    path: Path | str,
    results: dict[str, Any],
    data: Mapping[str, EvalDataset] | None = None,
    run_folder: Path | None = None,
    *,
    search: str = "",
    steps: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of `results`, as `evaluate` returns them, to `path`.

    Args:
        data: data set of each result. It provides the images and captions of the report.
        run_folder: folder of a training run. metrics.jsonl provides the curves, config.toml the batch size.
        search: folder of an index of images. The report then has a box that searches it while `bclip serve` runs.
        steps: what to do next, and the command of each.

    Raises:
        UserError: a line of metrics.jsonl is not JSON, an image file cannot be read, or the report cannot be written.
    """
    data = data or {}
    tasks = results["tasks"]
    nouns = {name: result["prompts"]["classes"] for name, result in tasks.items() if "prompts" in result}
    datasets = {row["fingerprint"]: row for row in (result["task"]["data"] for result in tasks.values())}
    gallery = next((_gallery(tasks[name], dataset) for name, dataset in data.items() if "gallery" in tasks[name]), None)
    page = (
        environment()
        .get_template("report.html")
        .render(
            results=results,
            datasets=list(datasets.values()),
            headline=_headline(results),
            published=_published(results),
            curves=training_curves(run_folder) if run_folder else [],
            max_curves=chart.MAX_CURVES,
            charts={name: report_charts.of_result(result) for name, result in tasks.items()},
            roc={name: _roc_chart(result, nouns.get(name, {})) for name, result in tasks.items()},
            questions=[
                _questions(result, data[name])
                for name, result in tasks.items()
                if "num_answers" in result and name in data
            ],
            gallery=gallery,
            num_first=_NUM_FIRST_QUERIES,
            examples=_examples(tasks, data),
            mistakes=_mistakes(tasks, data),
            search=search,
            steps=steps,
            suite_titles=TITLES,
        )
    )
    write_files(Path(path).parent, {Path(path).name: page})


def _roc_chart(result: dict[str, Any], nouns: Mapping[str, Any]) -> Any:
    """Return the chart of a task's ROC curves, or None without curves. A class is named by its first noun."""
    curves = [{**curve, "class": nouns.get(curve["class"], [curve["class"]])[0]} for curve in result.get("roc", [])]
    return chart.roc_chart(curves, title=result["task"]["title"]) if curves else None


def _published(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one block per task with published scores. For each metric, our score comes before the published ones."""
    blocks = []
    for result in results["tasks"].values():
        task, rows = result["task"], []
        model = results["model"]["path"] or results["model"]["class"]
        for name in dict.fromkeys(row["figure"] for row in task["published"]):
            measured = next((metric for metric in result["figures"] if metric["name"] == name), None)
            if measured is not None:
                score = f"{100 * measured['value']:.2f} %"
                rows.append({"metric": name, "model": model, "score": score, "measured": True})
            rows += [
                {
                    "metric": name,
                    "model": row["model"],
                    "score": f"{row['value']:.2f} %",
                    "measured": False,
                    "source": row["source"],
                }
                for row in task["published"]
                if row["figure"] == name
            ]
        if rows:
            notes = [task["about"]] if task["about"] else []
            num_published, num = task["num_samples_published"], result["num_samples"]
            if num_published and num_published != num:
                notes.append(
                    f"Published on {num_published:,} samples, measured on {num:,}: the scores are not comparable."
                )
            blocks.append({"title": task["title"], "notes": " ".join(notes), "rows": rows})
    return blocks


def _questions(result: dict[str, Any], data: EvalDataset) -> dict[str, Any]:
    """Return evenly spaced questions with their images and answers."""
    samples = result["samples"]
    num = len(samples["key"])
    step = max(1, num // _NUM_QUESTIONS)
    columns = ("key", "question", "kind", "label", "prediction")

    def row(i: int) -> dict[str, Any]:
        return {name: samples[name][i] for name in columns} | {"right": samples["accuracy"][i] == 1, **_image(data, i)}

    rows = [row(i) for i in range(step // 2, num, step)[:_NUM_QUESTIONS]]
    task = result["task"]
    keys = ("num_answers", "answerable")
    return {"title": task["title"], "about": task["about"], "rows": rows, **{key: result[key] for key in keys}}


def _examples(tasks: Mapping[str, Any], data: Mapping[str, EvalDataset]) -> dict[str, Any] | None:
    """Return evenly spaced samples of the first zero-shot task, with the most probable classes of each."""
    for name, result in tasks.items():
        if result["task"]["protocol"] != "zero_shot" or "confusion" not in result or name not in data:
            continue
        samples, classes = result["samples"], result["classes"]
        num = len(samples["key"])
        step = max(1, num // _NUM_EXAMPLES)
        chosen = range(step // 2, num, step)[:_NUM_EXAMPLES]
        keys = {samples["key"][i] for i in chosen}
        dataset_rows = {key: i for i in range(len(data[name])) if (key := data[name].key(i)) in keys}
        rows = []
        for i in chosen:
            scores = [(samples[f"score of {each}"][i], each) for each in classes]
            best = sorted(scores, reverse=True)[:_NUM_PROBABILITIES]
            label = samples["label"][i]
            row = {
                "key": samples["key"][i],
                "label": label,
                "best": best,
                "is_found": any(label == each for _, each in best),
            }
            rows.append(row | _image(data[name], dataset_rows[samples["key"][i]]))
        return {"result": result, "rows": rows}
    return None


def _mistakes(tasks: Mapping[str, Any], data: Mapping[str, EvalDataset]) -> dict[str, Any] | None:
    """Return the wrong samples of a classifier: those first that give their wrong classes the highest probabilities."""
    for name, result in tasks.items():
        if result["task"]["protocol"] != "classification" or name not in data:
            continue
        samples, classes = result["samples"], result["classes"]
        wrong = []
        for i, label in enumerate(samples["label"]):
            true = set(label.split("|")) if result["multi_label"] else {label}
            scores = {each: samples[f"score of {each}"][i] for each in classes}
            # How sure the model is of its worst error. A class is predicted above 1/2, or as the best one.
            errors = [scores[each] if each not in true else 1 - scores[each] for each in classes]
            if samples["accuracy"][i] != 1:
                best = sorted(((score, each) for each, score in scores.items()), reverse=True)[:_NUM_PROBABILITIES]
                wrong.append((max(errors), samples["key"][i], true, best))
        wrong.sort(key=lambda row: (-row[0], row[1]))
        shown = wrong[:_NUM_MISTAKES]
        keys = {key for _, key, *_ in shown}
        rows_of = {key: i for i in range(len(data[name])) if (key := data[name].key(i)) in keys}
        rows = [
            {"key": key, "true": sorted(true), "best": best, **_image(data[name], rows_of[key])}
            for _, key, true, best in shown
        ]
        return {"rows": rows, "num_wrong": len(wrong), "num_samples": result["num_samples"]}
    return None


def _image(data: EvalDataset, i: int) -> dict[str, str | None]:
    """Return the thumbnail of a sample, or the reason why it has none: open_clip's conversion reads more files."""
    content = data.image(i)
    try:
        return {"image": thumbnail(content, lambda: data.key(i)), "problem": None}
    except UserError as error:
        return {"image": None, "problem": str(error)}


def _headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the metrics of the large tiles: recall at 5, accuracies, and each task's published metric."""
    tiles = []
    for result in results["tasks"].values():
        for metric in result["figures"]:
            if metric["name"].endswith("R@5") or metric["name"] in ("accuracy", result["task"]["metric"]):
                task, name = result["task"], metric["name"]
                if task["title"] == "zero shot":
                    name = f"{result['label'].replace('_', ' ')} accuracy"
                tiles.append({**metric, "kind": task["title"].replace("zero shot", "zero-shot"), "name": name})
    return tiles


def _gallery(result: dict[str, Any], data: EvalDataset) -> dict[str, list[dict[str, Any]]] | None:
    """Return the retrieval gallery with captions and images in place of sample indices. None without captions."""
    gallery = result["gallery"]
    captions = data.captions()
    if captions is None:
        return None
    thumbnails: dict[int, dict[str, str | None]] = {}

    def show(sample: int, with_image: bool) -> dict[str, Any]:
        if with_image and sample not in thumbnails:
            thumbnails[sample] = _image(data, sample)
        return {"key": data.key(sample), "caption": captions[sample], **(thumbnails[sample] if with_image else {})}

    def fill(rows: list[dict[str, Any]], is_image_query: bool) -> list[dict[str, Any]]:
        return [
            {
                **row,
                **show(row["sample"], is_image_query),
                "is_hit": any(hit["right"] for hit in row["hits"]),
                "answer": show(row["sample"], not is_image_query),
                "hits": [{**hit, **show(hit["sample"], not is_image_query)} for hit in row["hits"]],
            }
            for row in rows
        ]

    return {
        "text_to_image": fill(gallery["text_to_image"], False),
        "image_to_text": fill(gallery["image_to_text"], True),
    }

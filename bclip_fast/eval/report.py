"""The report: one HTML file that needs no network and no script, from the results and the run's metrics.

Captions, labels and keys come from data nobody vouches for: jinja2 escapes them all, pictures are decoded and
encoded anew, and a content security policy forbids the page to load or run anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..html import chart
from ..html.curves import training_curves
from ..html.page import environment, thumbnail
from ..io.atomic import write_text
from .datasets import EvalDataset

_NUM_QUESTIONS = 8


def write(
    path: Path | str,
    results: dict[str, Any],
    data: Mapping[str, EvalDataset] | None = None,
    run_folder: Path | None = None,
) -> None:
    """Writes the report of `results`, as `evaluate` returns them, to `path`.

    Args:
        data: the data set of each task; pictures and captions come from them, without them there are none.
        run_folder: a training run; its metrics.jsonl gives the curves, its config.toml the batch size.

    Raises:
        UserError: metrics.jsonl holds a line that is not JSON; a gallery picture that cannot be decoded.
    """
    data = data or {}
    tasks = results["tasks"]
    names = {name: result["prompts"]["classes"] for name, result in tasks.items() if "prompts" in result}
    page = (
        environment()
        .get_template("report.html")
        .render(
            results=results,
            datasets=list(
                {row["fingerprint"]: row for row in (result["task"]["data"] for result in tasks.values())}.values()
            ),
            headline=_headline(results),
            published=_published(results),
            curves=training_curves(run_folder) if run_folder else [],
            most_curves=chart.MAX_CURVES,
            roc={name: _roc(result, names.get(name, {})) for name, result in tasks.items()},
            questions=[
                _questions(result, data[name])
                for name, result in tasks.items()
                if "num_answers" in result and name in data
            ],
            gallery=next(
                (_gallery(tasks[name], each) for name, each in data.items() if "gallery" in tasks[name]), None
            ),
        )
    )
    write_text(Path(path), page)


def _roc(result: dict[str, Any], nouns: Mapping[str, Any]) -> Any:
    """The chart of a task's curves, classes called by their first noun; None where there are none."""
    curves = [{**curve, "class": nouns.get(curve["class"], [curve["class"]])[0]} for curve in result.get("roc", [])]
    return chart.roc_chart(curves, title=result["task"]["title"]) if curves else None


def _published(results: dict[str, Any]) -> list[dict[str, Any]]:
    """A block a task: ours first for every figure that someone published, then theirs."""
    blocks = []
    for result in results["tasks"].values():
        task, rows = result["task"], []
        for name in dict.fromkeys(row["figure"] for row in task["published"]):
            own = next((figure for figure in result["figures"] if figure["name"] == name), None)
            value = "not measured" if own is None else f"{100 * own['value']:.2f} %"
            model = results["model"]["path"] or results["model"]["class"]
            if own is not None:
                rows.append({"figure": name, "model": model, "value": value, "measured": True})
            rows += [
                {
                    "figure": name,
                    "model": row["model"],
                    "value": f"{row['value']:.2f} %",
                    "measured": False,
                    "source": row["source"],
                }
                for row in task["published"]
                if row["figure"] == name
            ]
        if rows:
            notes = [task["about"]] if task["about"] else []
            wanted, num = task["num_samples_published"], result["num_samples"]
            if wanted and wanted != num:
                notes.append(f"Published on {wanted:,} samples, measured on {num:,}: the figures do not compare.")
            blocks.append({"title": task["title"], "notes": " ".join(notes), "rows": rows})
    return blocks


def _questions(result: dict[str, Any], data: EvalDataset) -> dict[str, Any]:
    """Some questions with their pictures and answers, at even steps through the data."""
    samples = result["samples"]
    num = len(samples["key"])
    step = max(1, num // _NUM_QUESTIONS)
    rows = [
        {name: samples[name][i] for name in ("key", "question", "kind", "label", "prediction")}
        | {"right": samples["accuracy"][i] == 1, "picture": thumbnail(data.image(i), lambda: data.key(i))}  # noqa: B023
        for i in range(step // 2, num, step)[:_NUM_QUESTIONS]
    ]
    task = result["task"]
    keys = ("num_answers", "answerable")
    return {"title": task["title"], "about": task["about"], "rows": rows, **{key: result[key] for key in keys}}


def _headline(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures shown large: recall at 5 both ways, accuracies, and what a task was published with."""
    tiles = []
    for result in results["tasks"].values():
        for figure in result["figures"]:
            if figure["name"].endswith("R@5") or figure["name"] in ("accuracy", result["task"]["metric"]):
                task, name = result["task"], figure["name"]
                if task["title"] == "zero shot":
                    name = f"{result['label'].replace('_', ' ')} accuracy"
                tiles.append({**figure, "kind": task["title"].replace("zero shot", "zero-shot"), "name": name})
    return tiles


def _gallery(result: dict[str, Any], data: EvalDataset) -> dict[str, list[dict[str, Any]]] | None:
    """The retrieval gallery with captions and pictures put in for the sample numbers."""
    gallery = result["gallery"]
    captions = data.captions()
    if captions is None:
        return None
    pictures: dict[int, str] = {}

    def show(sample: int, picture: bool) -> dict[str, Any]:
        if picture and sample not in pictures:
            pictures[sample] = thumbnail(data.image(sample), lambda: data.key(sample))
        return {
            "key": data.key(sample),
            "caption": captions[sample],
            "picture": pictures.get(sample) if picture else None,
        }

    def fill(rows: list[dict[str, Any]], picture_query: bool) -> list[dict[str, Any]]:
        return [
            {
                **row,
                **show(row["sample"], picture_query),
                "found": any(hit["right"] for hit in row["hits"]),
                "answer": show(row["sample"], not picture_query),
                "hits": [{**hit, **show(hit["sample"], not picture_query)} for hit in row["hits"]],
            }
            for row in rows
        ]

    return {
        "text_to_image": fill(gallery["text_to_image"], False),
        "image_to_text": fill(gallery["image_to_text"], True),
    }

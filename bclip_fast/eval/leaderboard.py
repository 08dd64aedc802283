"""`bclip eval suite --models A,B --data DIR`: evaluate models on a suite, and write one page and one table.

OUT/models/NAME holds the evaluation of each model, which is complete or absent. Another run continues with the models
that are missing, so a killed run loses at most one model. A model that fails is listed, and the others go on. Without
models and data, the page and the table need only the kept scores.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from bclip_fast.data.image_files import ImageConversion
from bclip_fast.errors import UserError, first_line
from bclip_fast.html.intervals import interval_chart
from bclip_fast.html.page import environment
from bclip_fast.io.file_names import file_names
from bclip_fast.io.hashing import sha256
from bclip_fast.pretrained.named_models import is_name

from . import results, suite_results, suites, yardstick_metrics
from .config import EvalConfig
from .embed import OnBadImage, Precision
from .evaluate import Evaluation

log = logging.getLogger(__name__)

PAGE, TABLE = "leaderboard.html", "leaderboard.csv"


@dataclass(frozen=True, kw_only=True)
class SuiteCommand:
    """Evaluate models on a suite, and write leaderboard.html and leaderboard.csv."""

    evaluations: tyro.conf.Positional[tuple[str, ...]] = ()
    """Folders that bclip eval --suite wrote. The page shows them too."""
    models: str = ""
    """Models, separated by commas: short names (medpmc, bmc, biomedclip, pmc, openclip, coca, medsiglip; NAME=FOLDER
    for local files), folders, hf-hub:ID. Empty: only the models in the folder `out`."""
    data: str = ""
    """Folder with the data of the rows, as for bclip eval --suite."""
    suite: str = "medpmc"
    """medpmc, or a suite's TOML file."""
    out: str = "runs/suite"
    """Folder of the page, the table and the evaluations. Another run continues with the models that are missing."""
    cache: str = "auto"
    """Folder of cached embeddings, as for bclip eval. none: no cache."""
    device: str = "auto"
    """Device of the models. auto: a CUDA GPU if there is one, else the CPU."""
    precision: Precision = "fp32"
    """Number format of the towers. auto: bf16 if the device multiplies it in hardware, else fp32."""
    batch_size: int = 64
    """Images or texts per batch of the towers."""
    num_workers: int = 2
    """Threads that decode and resize images."""
    image_conversion: ImageConversion = "standard"
    """How image files become pixels, as for bclip eval."""
    on_bad_image: OnBadImage = "stop"
    """What follows when an image cannot be decoded. stop: the model fails. skip: the sample counts in no score."""
    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        """Check the fields. Raises UserError."""
        suites.load(self.suite)
        names = self.names
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"models names {repeated!r} twice; remove one")
        if names and not self.data:
            raise UserError("models need --data, the folder that holds the data of the suite's rows")

    @property
    def names(self) -> list[str]:
        """The names in `models`."""
        return [name for part in self.models.split(",") if (name := part.strip())]


def run(command: SuiteCommand) -> int:
    """Evaluate the models, and write the page and the table after each. Return 1 if every model failed, else 0."""
    suite, out = suites.load(command.suite), Path(command.out)
    failures: dict[str, str] = {}
    if command.names:
        # A folder's name may not depend on the other models of this run.
        folders = {name: out / "models" / file_names([name])[name] for name in command.names}
        evaluation = Evaluation(
            EvalConfig(
                suite=command.suite, data=command.data, cache=command.cache, device=command.device,
                precision=command.precision, batch_size=command.batch_size, num_workers=command.num_workers,
                image_conversion=command.image_conversion, on_bad_image=command.on_bad_image, progress=command.progress,
            )
        )  # fmt: skip
        subject = _subject(command, evaluation)
        for name, folder in folders.items():
            state = sha256(repr((subject, _state_of(name))))
            if _is_complete(folder, state):
                log.info("%s: kept from %s", name, folder)
                continue
            try:
                evaluated = evaluation.run(name)
                suite_results.add(evaluated, suite)
                results.write(folder, evaluated | {"state": state})
            except (UserError, ModuleNotFoundError, OSError, RuntimeError) as error:
                failures[name] = first_line(error)
                log.error("%s failed: %s", name, failures[name])
            gc.collect()
            _write(command, suite, out, failures)
    board = _write(command, suite, out, failures)
    _print(board)
    log.info("leaderboard in %s", out / PAGE)
    return int(bool(failures) and not board["models"])


def _subject(command: SuiteCommand, evaluation: Evaluation) -> tuple[object, ...]:
    """Return everything except the model on which an evaluation depends."""
    data = [(task, data.fingerprint) for task, data in evaluation.tasks]
    return data, command.precision, command.image_conversion, command.on_bad_image


def _state_of(name: str) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a local model's files. A model of the hub has none."""
    if is_name(name):
        name = name.partition("=")[2]
    elif name.startswith("open_clip:"):
        name = name.partition("/")[2]  # the weights may be a file
    root = Path(name)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if name and root.is_dir() else []
    # Evaluations in a run's folder are not part of the model.
    files = [path for path in files if "eval" not in path.relative_to(root).parts]
    if name and root.is_file():
        files = [root]
    facts = [(str(path.relative_to(root)), path.stat()) for path in files]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in facts]


def _is_complete(folder: Path, state: str) -> bool:
    if not (folder / "results.json").is_file() and not (folder / ".files.written").is_dir():
        return False
    try:
        return results.read(folder).get("state") == state  # type: ignore[no-any-return]
    except UserError as error:
        log.warning("%s; evaluating again", error)
        return False


def _write(command: SuiteCommand, suite: suites.Suite, out: Path, failures: Mapping[str, str]) -> dict[str, Any]:
    """Write the page and the table from the files of all models. Return the board."""
    folders = [Path(folder) for folder in command.evaluations]
    if (out / "models").is_dir():
        folders += [path for path in sorted((out / "models").iterdir()) if path.is_dir()]
    evaluations = {}
    for folder in folders:
        if not (folder / "results.json").is_file() and folder.parent == out / "models":
            continue
        content = results.read(folder)
        name = content["model"]["path"] or content["model"]["class"]
        if name in evaluations:
            name = f"{name} ({folder})"
        if name not in failures:
            evaluations[name] = content
    if not evaluations and not failures:
        raise UserError(
            f"{out} holds no evaluation; pass --models and --data, or folders that bclip eval --suite wrote"
        )
    board = make(suite, evaluations, failures)
    page = environment().get_template("leaderboard.html").render(board=board, titles=suite_results.TITLES)
    results.write_files(out, {PAGE: page, TABLE: _as_csv(board)})
    return board


def make(
    suite: suites.Suite, evaluations: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Compare models on the rows that all of them have.

    Returns:
        dict of `models` in the order of their AUC, and of `rows[model][name]`: the rows, domains and means.

    Raises:
        UserError: the models have no row in common, or were measured on different data.
    """
    names = [task.row for task in suite.tasks]
    tasks = {
        model: {result["task"].get("row"): result for result in content["tasks"].values()}
        for model, content in evaluations.items()
    }
    common = [name for name in names if all(name in results for results in tasks.values())]
    if tasks and not common:
        raise UserError(f"the models {', '.join(tasks)} have no row of suite {suite.name} in common")
    for name in common:
        prints = {model: results[name]["task"]["data"]["fingerprint"] for model, results in tasks.items()}
        other = next((model for model in prints if prints[model] != next(iter(prints.values()))), None)
        if other is not None:
            raise UserError(f"row {name}: {other} was measured on other data than {next(iter(prints))}; evaluate again")
    scores = {
        model: suite_results.scores_of({name: results[name] for name in common}) for model, results in tasks.items()
    }
    rows = {
        model: {row.name: row.as_json() for row in suites.summarise(each)} for model, each in scores.items()
    }  # fmt: skip
    order = sorted(rows, key=lambda model: -rows[model][suites.OVERALL_DOMAINS]["auc"])
    first = next(iter(rows.values()), {})
    kinds = {
        kind: [name for name, row in first.items() if row["kind"] == kind] for kind in ("row", "domain", "overall")
    }
    chart_rows = [
        (model, row["auc"], row["auc_low"], row["auc_high"])
        for model in order
        for row in (rows[model][suites.OVERALL_DOMAINS],)
    ]
    return {
        "title": suite.title,
        "source": suite.source,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "models": order,
        "rows": rows,
        "num_rows": len(names),
        "num_common": len(common),
        "num_draws": yardstick_metrics.NUM_DRAWS,
        "missing": [name for name in names if name not in common] if tasks else [],
        "failures": dict(failures),
        "domains": kinds["domain"],
        "overall": kinds["overall"],
        "row_names": kinds["row"],
        "best": {
            name: {metric: max(rows[model][name][metric] for model in order) for metric in yardstick_metrics.METRICS}
            for name in [*kinds["row"], *kinds["domain"]]
        },
        "differences": {
            model: _difference(scores[order[0]], scores[model]) if model != order[0] else None for model in order
        },
        "chart": interval_chart(chart_rows, title="AUC of OVERALL_SPECIALTY_MACRO") if order else "",
    }


def _difference(first: suite_results.Scores, other: suite_results.Scores) -> tuple[float, float, float]:
    """Return the difference of the mean AUC over domains, in percentage points, and the ends of its interval."""
    domains: dict[str, list[str]] = {}
    for row, (domain, _, _) in first.items():
        domains.setdefault(domain, []).append(row)
    points = {row: [yardstick_metrics.measure(each[row][1])["auc"] for each in (first, other)] for row in first}
    draws = [np.mean([other[row][2][:, 2] - first[row][2][:, 2] for row in rows], axis=0) for rows in domains.values()]
    value = np.mean([np.mean([points[row][1] - points[row][0] for row in rows]) for rows in domains.values()])
    ends = yardstick_metrics.interval(np.mean(draws, axis=0)) or (float("nan"), float("nan"))
    return 100 * float(value), 100 * ends[0], 100 * ends[1]


def _as_csv(board: Mapping[str, Any]) -> str:
    ends = [f"{metric}{end}" for metric in yardstick_metrics.METRICS for end in ("", "_low", "_high")]
    columns = ["model", "kind", "name", "domain", "num_rows", "num_samples", *ends, "error"]
    lines = [
        [model, *(row[column] for column in columns[1:-1]), ""]
        for model in board["models"]
        for row in board["rows"][model].values()
    ]
    lines += [[model, "failed", *[""] * (len(columns) - 3), reason] for model, reason in board["failures"].items()]
    return results.as_csv(columns, lines)


def _print(board: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "model",
        "mean over",
        *suite_results.TITLES.values(),
        title=f"{board['title']}; the means cover {board['num_common']} of {board['num_rows']} rows",
    )
    for model in board["models"]:
        for name in board["overall"]:
            row = board["rows"][model][name]
            table.add_row(model, name, *(f"{100 * row[metric]:.1f} %" for metric in yardstick_metrics.METRICS))
    console = Console()
    console.print(table, markup=False)
    for name, reason in board["failures"].items():
        console.print(f"failed: {name}: {reason}", markup=False)

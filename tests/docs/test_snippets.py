"""Every snippet and command of README, of the tutorials and of examples/ runs, and prints what the page shows.

The tutorials run in the order of NAMES in one folder, because later ones use the files of earlier ones.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import snippets
from peers import import_open_clip
from PIL import Image
from ranks import on_ranks
from snippets import ROOT, read, run, unlike
from tutorial_data import download_from, write_hub_model

TUTORIALS = ROOT / "docs/tutorials"
ALONE = ["loss_in_open_clip", "loss_in_ddp", "loss_in_sentence_transformers", "zero_shot"]
NAMES = ["pmc_to_shards", "pretrain", "finetune_on_a_csv", "evaluate_and_compare", "search_your_figures"]
# Commands of README that this file doesn't run, with the place that does.
ELSEWHERE = {
    "pip install": "the set-up of every workflow",
    "bclip quickstart": "tests/cli/test_quickstart.py, with fewer images",
    "from bclip_fast import ClipLoss": "README's first snippet",
    "bclip plan": "tests/plan/test_scaling.py: its table needs a recipe for GPUs",
}


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the tiny model that hf-hub:microsoft/BiomedCLIP-... loads."""
    import huggingface_hub

    folder = write_hub_model(tmp_path_factory.mktemp("hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_from(folder))
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the tutorials of NAMES ran: articles, shards, runs/tiny, runs/finetuned, images, index."""
    folder, before = tmp_path_factory.mktemp("tutorials"), Path.cwd()
    os.chdir(folder)
    try:
        for name in NAMES:
            run(read(TUTORIALS / f"{name}.py"), TUTORIALS / f"{name}.py")
    finally:
        os.chdir(before)
    return folder


def test_tutorials_are_all_tested():
    assert sorted(path.stem for path in TUTORIALS.glob("*.py")) == sorted(ALONE + NAMES)


@pytest.mark.parametrize("name", ALONE)
def test_tutorial_prints_its_output(name, hub, tmp_path, monkeypatch):
    if name == "loss_in_open_clip":
        import_open_clip()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    run(read(TUTORIALS / f"{name}.py"), TUTORIALS / f"{name}.py")


@pytest.mark.slow
def test_tutorials_from_articles_to_search_print_their_output(results):
    """It takes 20 s of CPU time, mostly for two processes of torchrun. The other tests use its files."""
    assert (results / "hits.html").is_file()
    assert (results / "runs/compare/compare.html").is_file()


def _losses_of_rank(rank: int) -> list[float]:
    """The losses of the DDP tutorial on this rank of a group that exists already."""
    import io
    from contextlib import redirect_stdout
    from unittest.mock import patch

    import torch.distributed as dist

    output = io.StringIO()
    with (
        redirect_stdout(output),
        patch.dict(os.environ, {"RANK": str(rank), "WORLD_SIZE": "2"}),
        patch.object(dist, "init_process_group"),
        patch.object(dist, "destroy_process_group"),
    ):
        runpy.run_path(str(TUTORIALS / "loss_in_ddp.py"))
    return [float(number) for number in re.findall(r": ([\d.]+)", output.getvalue())]


def test_ddp_tutorial_two_ranks_print_the_same_losses():
    (output,) = [cell.output for cell in read(TUTORIALS / "loss_in_ddp.py") if cell.output]
    expected = [float(number) for number in re.findall(r": ([\d.]+)", output)]
    first, second = on_ranks(2, _losses_of_rank)
    assert first == pytest.approx(expected, abs=2e-4)
    assert second == []


# README.

_ARTICLE = """<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta>
<article-id pub-id-type="pmc">1</article-id><title-group><article-title>Squares</article-title></title-group>
<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/"/></permissions></article-meta></front>
<body><fig id="F1"><label>Figure 1</label><caption><p>A red square.</p></caption><graphic xlink:href="square"/></fig>
<fig id="F2"><label>Figure 2</label><caption><p>A blue square.</p></caption><graphic xlink:href="lost"/></fig></body>
</article>"""


def test_readme_snippets_print_their_output(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "red").save("figure.jpg")
    Path("article").mkdir()
    Image.new("RGB", (64, 48), "red").save("article/square.png")
    Path("article/article.nxml").write_text(_ARTICLE)
    run(read(ROOT / "README.md"), ROOT / "README.md")


def readme_commands() -> list[str]:
    """The commands in README's table of tasks and in its indented blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"## I want to \.\.\.\n(.*?)\n## ", text, re.DOTALL)[1]  # type: ignore[index]
    table = [command for row in rows.splitlines() if row.startswith("|") for command in re.findall("`([^`]+)`", row)]
    prose = re.sub(r"(?ms)^```.*?^```", "", text)
    return table + [line.split("  #")[0].strip() for line in re.findall(r"(?m)^    (\S.*)$", prose)]


def test_readme_commands_run(results, monkeypatch, capsys):
    monkeypatch.chdir(results)
    names = {
        "ARTICLES": "articles", "SHARDS": "shards", "CONFIG.toml": "tiny.toml", "MODEL": "runs/finetuned",
        "RUN": "runs/tiny", "IMAGES": "images", "INDEX": "index", "FOLDER": "exported",
    }  # fmt: skip
    # The sizes of `bclip bench` for tests. The command starts pytest, so it needs a process.
    monkeypatch.setenv("BCLIP_BENCHMARKS", "tiny")
    further = {"ingest build": "--overwrite --workers 1", "finetune": "--epochs 1", "train": "--max_steps 2 --run new"}
    commands = [command for command in readme_commands() if not command.startswith(tuple(ELSEWHERE))]
    assert len(commands) == 9
    for command in commands:
        words = [names.get(word, word) for word in shlex.split(command)]
        if words[0] == "torchrun":
            words = ["bclip", *words[words.index("bclip_fast.cli") + 1 :]]
        for name, options in further.items():
            if words[1 : 1 + len(name.split())] == name.split() and "export" not in words:
                words += options.split()
        if words[:2] == ["bclip", "bench"]:
            words = [sys.executable, "-m", "bclip_fast.cli", *words[1:], "--only", "clip and float32 and cpu"]
        snippets.command(shlex.join(words), f"README.md: {command}")


# Examples.

_EXAMPLES = {
    "loss_in_your_loop.py": "--batch_size 256 --steps 1",
    "large_batch.py": "--batch_size 128 --micro_batch_size 32",
    "packed_attention.py": "",
    "zero_shot.py": "runs/finetuned images/red0.png red green blue grey --template 'a {} pattern'",
    "finetune_csv.py": "runs/tiny pairs.csv --run runs/example --lr 1e-3 --epochs 3",
    "search_images.py": "runs/finetuned images 'a red pattern' -k 2",
}
_PRINTED = {
    "loss_in_your_loop.py": r"the dense loss is the same: True\nstep 0: loss 5\.\d+\n.* 0 MiB in fp32\n",
    "large_batch.py": r"largest difference of a gradient: \d+e-(0[6-9]|\d\d)\n",
    "packed_attention.py": r"595 tokens instead of 2048: .*\nlargest difference: \de-0[6-9]\n",
    "zero_shot.py": r" *[\d.]+%  red\n( *[\d.]+%  \w+\n){3}",
    "finetune_csv.py": r"(.* R@1: \d+% -> \d+%\n){2}",
    "search_images.py": r"(-?0\.\d+  red\d+\.png\n){2}",
}


def test_examples_are_all_tested():
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert [path.name for path in scripts] == sorted(_EXAMPLES) == sorted(_PRINTED)
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []


@pytest.mark.parametrize("name", _EXAMPLES)
def test_example_prints_results(name, results, monkeypatch, capsys):
    monkeypatch.chdir(results)
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(_EXAMPLES[name])])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    assert re.fullmatch(_PRINTED[name], capsys.readouterr().out)


# The runner itself.


def test_run_other_output_is_an_error(tmp_path, monkeypatch):
    page = ROOT / "README.md"
    cells = [snippets.Cell("python", "print(1)\n", 7, "2\n")]
    with pytest.raises(AssertionError, match=r"README.md:7: the page shows"):
        run(cells, page)
    with pytest.raises(AssertionError, match="shows no output"):
        run([snippets.Cell("python", "print(1)\n", 7)], page)
    with pytest.raises(AssertionError, match="ends with status 2"):
        run([snippets.Cell("bash", "bclip no-such-command\n", 7)], page)


def test_unlike_dots_stand_for_any_text():
    assert unlike("a 0.123 b\nc\n", "a ... b\n...\n") == ""
    assert unlike("a 0.123 b\n", "a ... c\n") != ""

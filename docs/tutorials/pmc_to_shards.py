# %% [markdown]
# # From PMC articles to shards
#
# This tutorial turns articles into training pairs. It writes 48 small articles, so that it runs anywhere. The later
# tutorials use its shards.
#
# You need `pip install 'bclip_fast[ingest]'`. To fetch real articles from PubMed Central's bucket, list their ids in a
# file, one a line, and run `bclip ingest fetch --ids FILE -o articles`.
#
# ## The articles
#
# An article is a JATS file beside its images. Each of these has one figure: a pattern in one of four colours.

# %%
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (50, 50, 230), "grey": (130, 130, 130)}
ARTICLE = """<article xmlns:xlink="http://www.w3.org/1999/xlink">
<front><article-meta><article-id pub-id-type="pmc">{number}</article-id>
<title-group><article-title>A {colour} pattern</article-title></title-group>
<permissions><license xlink:href="https://creativecommons.org/licenses/by/4.0/"/></permissions></article-meta></front>
<body><fig id="F1"><label>Figure 1</label><caption><p>A {colour} pattern, number {number}.</p></caption>
<graphic xlink:href="pattern"/></fig></body></article>"""

random = np.random.default_rng(0)
for number in range(1, 49):
    colour = list(COLOURS)[number % 4]
    folder = Path(f"articles/PMC{number}")
    folder.mkdir(parents=True)
    (folder / "article.nxml").write_text(ARTICLE.format(number=number, colour=colour))
    weights = Image.fromarray(random.integers(60, 255, (6, 8), np.uint8)).resize((64, 48), Image.Resampling.BICUBIC)
    pixels = np.asarray(weights)[..., None] / 255 * COLOURS[colour]
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "pattern.jpg", quality=92)

# %% [markdown]
# ## What becomes of an article?
#
# `check` explains it in words and writes nothing. Use it when a figure that you expect gives no pair.

# %% [bash]
# bclip ingest check articles/PMC1

# %% [markdown]
# ```text
# article.nxml: PMC1, 1 figure...: A green pattern
#   licence: CC BY
#     address: https://creativecommons.org/licenses/by/4.0/
#     accepted with --license commercial or noncommercial or all
#   figure 1 (id F1, Figure 1)
#     caption: A green pattern, number 1.
#     image 1: pattern
#     pattern.jpg: JPEG of mode RGB, 64 x 48 pixels; its bytes are kept: pair f1: A green pattern, number 1.
# ```
#
# ## Build the shards
#
# A hash of the article's id selects the split, so an article is never divided. A killed build continues when you run
# the same command again.

# %% [bash]
# bclip ingest build articles -o shards --val_fraction 0.2 --test_fraction 0.2 --workers 1

# %% [markdown]
# The manifest has one row for each pair, with its licence, its caption and its place in the shards.

# %%
import pyarrow.parquet as pq

manifest = pq.read_table("shards/manifest.parquet").to_pylist()
print(sorted({(row["split"], sum(other["split"] == row["split"] for other in manifest)) for row in manifest}))
print(manifest[0]["key"], manifest[0]["licence"], "|", manifest[0]["caption"])

# %% [markdown]
# ```text
# [('test', 13), ('train', 24), ('val', 11)]
# PMC43_f1 CC BY | A grey pattern, number 43.
# ```
#
# Figures without a pair are in `rejects.parquet`, each with its reason.
#
# ## Check the shards, and look at them
#
# `verify` reads every byte and compares the checksums. `report` writes a page with counts, captions and a gallery.

# %% [bash]
# bclip ingest verify shards
# bclip ingest report shards

# %% [markdown]
# ```text
# shards: no problems found
# ```
#
# The shards are tar files in WebDataset's layout, so other libraries read them as well.

# %%
import tarfile

with tarfile.open(next(Path("shards").glob("train-*.tar"))) as shard:
    print([name.rpartition(".")[2] for name in shard.getnames()[:3]])

# %% [markdown]
# ```text
# ['jpg', 'txt', 'json']
# ```
#
# Next: [pretrain on these shards](pretrain.md). [Ingest](../ingest.md) has the rules for captions, licences and images.

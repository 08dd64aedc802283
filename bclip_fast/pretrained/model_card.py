"""The card of a model that was exported for transformers: how to repeat its embeddings there."""

from __future__ import annotations

import logging
from pathlib import Path

from bclip_fast.io.atomic import write_text
from bclip_fast.model.biomedclip import BiomedClipConfig

log = logging.getLogger(__name__)

FILE = "README.md"
MARK = "<!-- Written by bclip_fast. Without this line, the file is kept as it is. -->"
_HEAD = f"""---
library_name: transformers
---
{MARK}

# Towers of a CLIP model for transformers

"""
_USAGE = """\
`vision/` embeds images and `text/` embeds captions, {embed_dim} numbers each. `projections.safetensors` holds the rest.

## Captions need repair before the tokenizer

The model was trained on repaired captions: ftfy mends their encoding and quotes, HTML entities are decoded, and white
space is single. The tokenizer in `text/` doesn't do this, and nor does transformers. Without it, captions with curly
quotes, entities or broken accents get other token ids, and other embeddings. So repair each caption first:

```python
import html

import ftfy


def clean(text):
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())
```

## Embeddings

```python
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer{text_class}


def embed_images(folder, images):
    pixels = AutoImageProcessor.from_pretrained(f"{{folder}}/vision")(images, return_tensors="pt")
    with torch.no_grad():
        features = AutoModel.from_pretrained(f"{{folder}}/vision").eval()(**pixels).pooler_output
    return F.normalize(features, dim=-1)


def embed_captions(folder, captions):
    tokenizer = AutoTokenizer.from_pretrained(f"{{folder}}/text")
{tokenize}
    with torch.no_grad():
{features}
    return F.normalize(features, dim=-1)
```

The image processor rounds resized images to whole numbers, so image embeddings differ from bclip_fast's in the third
digit. A score is `exp(logit_scale)` times the product of two embeddings, plus `logit_bias` if the file has it.
"""
_TOKENIZE = """    ids = tokenizer(
        [clean(caption) for caption in captions],
        padding=True, truncation=True, max_length={length}, return_tensors="pt",
    )"""
# CLIP's tokenizer pads with its end token, or has no token for it. The tower reads the first end token of a row.
_TOKENIZE_ROWS = """    repaired = [clean(caption) for caption in captions]
    rows = tokenizer(repaired, truncation=True, max_length={length}).input_ids
    ids = torch.full((len(rows), {length}), {pad})
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = torch.tensor(tokens)
    ids = {{"input_ids": ids}}"""
_BERT = """        bert = AutoModel.from_pretrained(f"{{folder}}/text", add_pooling_layer=False).eval()
        hidden = bert(**ids).last_hidden_state[:, 0]
        rest = load_file(f"{{folder}}/projections.safetensors")
        {project}"""
_PROJECTIONS = {
    "mlp": 'features = F.gelu(hidden @ rest["text_projection.0.weight"].T) @ rest["text_projection.2.weight"].T',
    "linear": 'features = hidden @ rest["text_projection.weight"].T',
}
_GPT = """        model = CLIPTextModelWithProjection.from_pretrained(f"{folder}/text").eval()
        features = model(**ids).text_embeds"""


def is_replaceable(folder: Path) -> bool:
    """Return whether `folder` has no README.md of the user's. Otherwise, log a warning."""
    path = folder / FILE
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        log.warning("%s is kept: it isn't a card of bclip_fast, so it may not say how captions are repaired", path)
        return False
    return True


def write(folder: Path, config: BiomedClipConfig, pad_id: int) -> None:
    """Write README.md into an exported folder."""
    write_text(folder / FILE, _HEAD + usage(config, pad_id))


def usage(config: BiomedClipConfig, pad_id: int) -> str:
    """Markdown that says how to compute embeddings with transformers."""
    text, bert = config.text, config.text.kind == "bert"
    return _USAGE.format(
        embed_dim=config.embed_dim,
        text_class="" if bert else ", CLIPTextModelWithProjection",
        tokenize=(_TOKENIZE if bert else _TOKENIZE_ROWS).format(length=text.context_length, pad=pad_id),
        features=_BERT.format(project=_PROJECTIONS[text.projection]) if bert else _GPT,
    )

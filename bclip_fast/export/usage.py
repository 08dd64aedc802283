"""The part of a model card that shows how to load the exported files, with code that needs none of ours."""

from __future__ import annotations

from bclip_fast.model import transformers_clip
from bclip_fast.model.biomedclip import BiomedClipConfig
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.model.tokenizer_cleaning import Cleaning
from bclip_fast.pretrained import model_card

LIBRARIES = {
    "open_clip": "open_clip",
    "transformers": "transformers",
    "sentence_transformers": "sentence-transformers",
    "onnx": "onnx",
    "safetensors": "open_clip",
}
"""By format: the hub's library_name."""

_REPAIR = '" ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())'
_PUNCTUATION = 'str.maketrans("", "", string.punctuation)'
_CLEAN: dict[Cleaning, tuple[str, str]] = {
    "whitespace": ("import html\n\nimport ftfy", f"return {_REPAIR}"),
    "canonicalize": (
        "import html\nimport string\n\nimport ftfy",
        f'text = {_REPAIR}.replace("_", " ")\n    return " ".join(text.translate({_PUNCTUATION}).lower().split())',
    ),
    "siglip": ("import string", f'return " ".join(text.lower().translate({_PUNCTUATION}).split())'),
}

_REPAIR_NOTE = """\
## Captions need repair before the tokenizer

The model was trained on cleaned captions, and this library doesn't clean them. Without it, some captions get other
token ids and other embeddings. So clean each caption first:

```python
{imports}


def clean(text):
    {body}
```
"""

_SENTENCE_TRANSFORMERS = """
## Embeddings

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(folder)
texts = model.encode([clean(caption) for caption in captions])
pictures = model.encode(images)  # PIL images
scores = model.similarity(pictures, texts)
```

It needs sentence-transformers from 5.4 on.
"""

_JOINT = """
## Embeddings

```python
import torch
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained(folder)
inputs = processor(
    text=[clean(caption) for caption in captions], images=images, padding={padding}, truncation=True,
    return_tensors="pt",
)
with torch.no_grad():
    output = AutoModel.from_pretrained(folder).eval()(**inputs)
scores = output.logits_per_image
```

vLLM serves embeddings from this layout too.
"""

_ONNX = """
## Embeddings

`image.onnx` and `text.onnx` embed images and captions as rows of unit length. A score is `logit_scale` of
`config.json` times the product of two rows, plus `logit_bias`.

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def embed_captions(folder, captions, graph="text.onnx"):
    config = json.loads(Path(folder, "config.json").read_text())
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.enable_truncation(config["context_length"])
    tokenizer.enable_padding(
        pad_id=config["pad_id"], length=config["context_length"] if config["pads_to_context_length"] else None
    )
    rows = [row.ids for row in tokenizer.encode_batch([clean(caption) for caption in captions])]
    session = onnxruntime.InferenceSession(f"{folder}/{graph}")
    return session.run(None, {"input_ids": np.array(rows, dtype=np.int64)})[0]


def pixels(image, settings):
    size = settings["crop_size"]["height"]
    image = image.convert("RGB")
    if settings["do_center_crop"]:
        image = image.resize([int(size * side / min(image.size)) for side in image.size], settings["resample"])
        left, top = (round((side - size) / 2) for side in image.size)
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), settings["resample"])
    values = np.asarray(image, dtype=np.float32) / 255
    values = (values - np.float32(settings["image_mean"])) / np.float32(settings["image_std"])
    return values.transpose(2, 0, 1)


def embed_images(folder, images, graph="image.onnx"):
    settings = json.loads(Path(folder, "preprocessor_config.json").read_text())
    session = onnxruntime.InferenceSession(f"{folder}/{graph}")
    batch = np.stack([pixels(image, settings) for image in images])
    return session.run(None, {"pixel_values": batch})[0]
```

Pillow rounds resized images to whole numbers, so image embeddings differ from bclip_fast's in the third digit.
"""

_OPEN_CLIP = """
## Embeddings

```python
import open_clip

model, preprocess = open_clip.create_model_from_pretrained("hf-hub:ORG/NAME")
tokenizer = open_clip.get_tokenizer("hf-hub:ORG/NAME")
```

The same with bclip_fast, which also takes this folder:

```python
import bclip_fast

model, preprocess, tokenizer = bclip_fast.load(folder)
```
"""

_SAFETENSORS = """
## Weights

`model.safetensors` holds the weights alone, under the names of open_clip's state dict:

```python
from safetensors.torch import load_file

model.load_state_dict(load_file("model.safetensors"))
```
"""


def text(format_name: str, config: BiomedClipConfig, tokenizer: Tokenizer) -> str:
    """Markdown that says how to load the files of a format."""
    imports, body = _CLEAN[tokenizer.cleaning]
    note = _REPAIR_NOTE.format(imports=imports, body=body)
    if format_name == "transformers":
        if not transformers_clip.is_joint(config):
            return model_card.usage(config, tokenizer.pad_id)
        return note + _JOINT.format(padding='"max_length"' if config.text.computes_padding else "True")
    if format_name == "sentence_transformers":
        return note + _SENTENCE_TRANSFORMERS
    if format_name == "onnx":
        return note + _ONNX
    return _OPEN_CLIP if format_name == "open_clip" else _SAFETENSORS

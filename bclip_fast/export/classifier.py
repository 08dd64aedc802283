"""The classifier of a run of `bclip finetune --task classification` as one ONNX graph, in a folder without our code.

    classifier.onnx           pixel_values (batch, 3, S, S) float32 -> probabilities (batch, C) float32
    config.json               id2label and label2id as transformers has them, problem_type, image_size
    preprocessor_config.json  as transformers writes it

The probabilities of a row sum to 1, or each is that of one class of multi-label images. `problem_type` says which.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_files, write_text
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.image_classifier import ClassHead
from bclip_fast.pretrained import processor_config

from . import onnx_files, parity

log = logging.getLogger(__name__)

GRAPH = "classifier.onnx"
_NAMES = "pixel_values", "probabilities"
_BATCHES = (1, 7)

USAGE = """
## Classes

`classifier.onnx` gives the probability of each class. `config.json` names the classes in the order of the columns.
`problem_type` says whether an image has one class or any number of them. Preprocess images as
`preprocessor_config.json` says.

```python
import json
from pathlib import Path

import onnxruntime
from transformers import CLIPImageProcessor

names = json.loads(Path(folder, "config.json").read_text())["id2label"]
pixels = CLIPImageProcessor.from_pretrained(folder)(images, return_tensors="np")["pixel_values"]
session = onnxruntime.InferenceSession(f"{folder}/classifier.onnx")
rows = session.run(None, {"pixel_values": pixels})[0]
probabilities = [{names[str(i)]: float(value) for i, value in enumerate(row)} for row in rows]
```
"""


class _Probabilities(nn.Module):
    """An image tower and its head, from pixels to probabilities."""

    def __init__(self, model: BiomedClip, head: ClassHead) -> None:
        super().__init__()
        self.visual, self.head = model.visual, head

    def forward(self, pixel_values: Tensor) -> Tensor:
        head = self.head
        # The same as `ClassHead.forward`, without the autocast context, which has no operator in ONNX.
        rows = nn.functional.normalize(self.visual(pixel_values), dim=-1)
        return head.probabilities(head.scale * nn.functional.linear(rows, head.weight) + head.bias)


def save(folder: Path, model: BiomedClip, head: ClassHead, preprocess: Preprocess) -> None:
    """Write the graph and its settings. onnxruntime checks it before the files take their places.

    Raises:
        UserError: a package is missing, or the graph gives other probabilities than the model.
        OSError: a file cannot be written.
    """
    onnx_files.check_packages()
    model, head = model.float().eval(), head.float().eval()
    size = model.config.vision.image_size
    config = {
        "architectures": ["bclip_fast classifier"],
        "id2label": {str(i): name for i, name in enumerate(head.names)},
        "label2id": {name: i for i, name in enumerate(head.names)},
        "problem_type": "multi_label_classification" if head.multi_label else "single_label_classification",
        "image_size": size,
    }
    with replacing_files(folder) as partial:
        sizes = {0: torch.export.Dim("batch", min=1)}
        onnx_files.write_module(
            partial / GRAPH, _Probabilities(model, head), onnx_files.example(model, "image"), _NAMES, sizes
        )
        _check(partial / GRAPH, model, head)
        write_text(partial / onnx_files.CONFIG, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        processor = processor_config.write(preprocess.config, "CLIP")
        write_text(partial / processor_config.FILE, json.dumps(processor, indent=2) + "\n")


@torch.no_grad()
def _check(path: Path, model: BiomedClip, head: ClassHead) -> None:
    """Raise UserError if onnxruntime's probabilities of made-up pictures differ from the model's."""
    images = parity.made_up_samples(model.config.vision.image_size).images
    expected = head.probabilities(head(model.encode_image(images)))
    for batch in _BATCHES:
        difference = float((parity.run(path, images, batch) - expected).abs().max())
        if not difference <= parity.TOLERANCE:
            raise UserError(
                f"{path.name} differs from the model by {difference:.1e} in batches of {batch}, more than "
                f"{parity.TOLERANCE:.0e}: onnxruntime or torch's exporter has a fault; try other versions of them"
            )
        log.info("%s: at most %.1e from torch in batches of %d", path.name, difference, batch)

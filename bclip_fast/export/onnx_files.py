"""Both towers as ONNX, for onnxruntime, TensorRT and the like, in a folder that needs none of our code.

    image.onnx               pixel_values (batch, 3, S, S) float32 -> image_embeds (batch, D) float32 of unit length
    text.onnx                input_ids (batch, tokens) int64 -> text_embeds (batch, D) float32 of unit length
    image_int8.onnx, text_int8.onnx   the same with the weights of linear layers in 8 bits, on request
    config.json              sizes, tokens, logit scale and bias
    preprocessor_config.json, tokenizer.json, ...   as transformers writes them

`pixel_values` are images as `Preprocess` returns them. `input_ids` are padded with `pad_id`, and the graph ignores the
padding, so it needs no attention mask. Both batch and number of tokens are dynamic.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bclip_fast.data.transform import Preprocess
from bclip_fast.errors import UserError
from bclip_fast.io.atomic import replacing_files, write_text
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import processor_config

log = logging.getLogger(__name__)

TOWERS = {"image": ("pixel_values", "image_embeds"), "text": ("input_ids", "text_embeds")}
"""By tower: the names of the graph's input and output."""
CONFIG = "config.json"
# A protocol buffer holds 2 GiB at most. Weights with more bytes go into a second file.
_MAX_BYTES = 1_900_000_000


class _Tower(nn.Module):
    """One tower, so that each graph holds only its own weights."""

    def __init__(self, model: BiomedClip, tower: str) -> None:
        super().__init__()
        self.tower = model.visual if tower == "image" else model.text

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.normalize(self.tower(inputs), dim=-1)


def check_packages() -> None:
    """Raise UserError unless the packages of the extra `export` are installed."""
    import importlib.util

    names = ["onnx", "onnxscript", "onnxruntime"]
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--to onnx needs {' and '.join(missing)}, which the extra export has: pip install 'bclip_fast[export]'"
        )


def save(
    folder: Path,
    model: BiomedClip,
    preprocess: Preprocess,
    tokenizer: Tokenizer,
    *,
    int8: bool = False,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write both towers as ONNX graphs and what a caller needs beside them.

    Args:
        folder: created if it is missing. Files of the same name are replaced, all together.
        int8: also write graphs whose linear layers have weights in 8 bits, with one scale an output channel. They
            round their inputs to 8 bits at run time (onnxruntime, "dynamic quantization").
        check: called with the folder of the finished graphs, before they take their places.

    Raises:
        UserError: a package is missing.
        OSError: a file cannot be written.
    """
    check_packages()
    model = model.float().eval()
    with replacing_files(folder) as partial:
        for tower in TOWERS:
            write_graph(partial / f"{tower}.onnx", model, tower)
            if int8:
                _quantize(partial / f"{tower}.onnx", partial / f"{tower}_int8.onnx")
        check(partial)
        write_text(partial / CONFIG, json.dumps(_config(model, tokenizer), indent=2) + "\n")
        processor = processor_config.write(preprocess.config, "CLIP")
        write_text(partial / processor_config.FILE, json.dumps(processor, indent=2) + "\n")
        tokenizer.save(partial)


def _config(model: BiomedClip, tokenizer: Tokenizer) -> dict[str, Any]:
    config = model.config
    bias = model.logit_bias
    return {
        "embed_dim": config.embed_dim,
        "image_size": config.vision.image_size,
        "context_length": config.text.context_length,
        "pad_id": tokenizer.pad_id,
        "pads_to_context_length": config.text.computes_padding,
        "logit_scale": float(model.logit_scale.detach().double().exp()),
        "logit_bias": 0.0 if bias is None else float(bias.detach()),
        "caption_cleaning": tokenizer.cleaning,
    }


def example(model: BiomedClip, tower: str) -> Tensor:
    """Valid inputs of a tower: three images, or three rows of tokens of different lengths."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if tower == "image":
        size = config.vision.image_size
        return torch.randn(3, 3, size, size, generator=generator)
    text = config.text
    length = text.context_length if text.computes_padding else min(16, text.context_length)
    ids = torch.randint(1, text.vocab_size, (3, length), generator=generator)
    ids[1, length // 2 :] = text.pad_id
    return ids


def write_graph(path: Path, model: BiomedClip, tower: str) -> None:
    """Write a tower, `image` or `text`, as an ONNX graph."""
    sizes: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    text = model.config.text
    if tower == "text" and not text.computes_padding:
        sizes[1] = torch.export.Dim("tokens", min=1, max=text.context_length)
    write_module(path, _Tower(model, tower), example(model, tower), TOWERS[tower], sizes)


def write_module(path: Path, module: nn.Module, inputs: Tensor, names: tuple[str, str], sizes: dict[int, Any]) -> None:
    """Write a module of one input as an ONNX graph.

    Args:
        inputs: valid inputs. names: names of the graph's input and output. sizes: dynamic dimensions by number.
    """
    module = module.eval()
    num_bytes = sum(weight.numel() * weight.element_size() for weight in module.state_dict().values())
    input_name, output_name = names
    log.info("%s: tracing %s weights", path.name, f"{num_bytes // 4:,}")
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            (inputs,),
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=(sizes,),
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # torch returns None only with a file's name and without dynamo
    # Without these, the graph names the Python files of the machine that exported it.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
    program.save(str(path), external_data=num_bytes > _MAX_BYTES)


def _quantize(path: Path, quantized: Path) -> None:
    """Write a graph with weights in 8 bits.

    The weights use 7 of the bits. Without VNNI, x86 adds products of 8-bit numbers in 16 bits, and larger weights would
    overflow there (onnxruntime, "Quantize ONNX Models").
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            str(path),
            str(quantized),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=path.with_name(f"{path.name}.data").is_file(),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop the output of torch's exporter and of onnxruntime's quantizer, which name steps, deprecations and files."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

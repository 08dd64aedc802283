"""The layout of sentence-transformers, which encodes captions and PIL images with one model.

It takes versions from 5.4 on, which pass texts and images to different modules. Both towers of CLIP and of SigLIP
are one module:

    config.json, model.safetensors, ...     transformers' CLIPModel or SiglipModel
    1_Normalize/

Other towers are modules of a router:

    router_config.json
    text_0_Transformer/     BertModel or CLIPTextModel, and the tokenizer
    text_1_Pooling/         takes the first token of a BERT
    text_N_Dense/           the projection
    image_0_Transformer/    ViTModel, whose pooler_output is the image embedding
    1_Normalize/

sentence-transformers doesn't repair captions as ours does (`tokenizer.clean`), and the card says how to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bclip_fast import pretrained
from bclip_fast.data.transform import Preprocess
from bclip_fast.io.atomic import replacing_files, write_text
from bclip_fast.model import tower_config, transformers_clip, weights
from bclip_fast.model.biomedclip import BiomedClip
from bclip_fast.model.tokenizer import Tokenizer
from bclip_fast.pretrained import processor_config

_MODULES = "sentence_transformers.base.modules"
_TRANSFORMER = f"{_MODULES}.transformer.Transformer"
_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_DENSE = f"{_MODULES}.dense.Dense"
_EMBEDDING = "sentence_embedding"
Json = dict[str, Any]
_GELU, _IDENTITY = "torch.nn.modules.activation.GELU", "torch.nn.modules.linear.Identity"


def save(folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Write the model for sentence-transformers. Files of the same name are replaced, all together.

    Raises:
        UserError: transformers has no class for a tower, such as CLIP's ResNet.
        OSError: a file cannot be written.
    """
    with replacing_files(folder) as partial:
        if transformers_clip.is_joint(model.config):
            pretrained.save_transformers(partial, model, preprocess, tokenizer)
            padding = {"padding": "max_length"} if model.config.text.computes_padding else {}
            _write_settings(
                partial,
                {
                    kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
                    for kind in ("text", "image")
                },
                processing_kwargs={"text": padding},
            )
            _add_pad_token(partial, tokenizer)
            first = _TRANSFORMER
        else:
            _write_routes(partial, model, preprocess, tokenizer)
            first = f"{_MODULES}.router.Router"
        modules = (("", first), ("1_Normalize", f"{_MODULES}.normalize.Normalize"))
        _write_json(
            partial / "modules.json",
            [
                {"idx": number, "name": str(number), "path": path, "type": kind}
                for number, (path, kind) in enumerate(modules)
            ],
        )
        names = {"module_input_name": _EMBEDDING, "module_output_name": _EMBEDDING}
        _write_json(partial / "1_Normalize" / "config.json", names)
        general: Json = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
        _write_json(partial / "config_sentence_transformers.json", {**general, "similarity_fn_name": "cosine"})


def _write_routes(folder: Path, model: BiomedClip, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
    """Write the modules of texts and of images."""
    config = model.config
    vision_state, text_state, rest = weights.to_transformers(model.state_dict(), config)
    vision_config, text_config = tower_config.transformers_configs(config)
    routes = _Routes(folder)
    text = routes.add("text", "Transformer", _TRANSFORMER)
    if config.text.kind == "bert":
        _write_tower(text, text_config, text_state, ("text", "last_hidden_state", "token_embeddings"))
        pooling = {"embedding_dimension": config.text.width, "pooling_mode": "cls", "include_prompt": True}
        _write_json(routes.add("text", "Pooling", _POOLING) / "config.json", pooling)
        projections = [rest[name] for name in sorted(rest) if name.startswith("text_projection.")]
    else:
        # AutoModel loads CLIPTextModel, which has no projection, so a second module holds it.
        state = dict(text_state)
        projections = [state.pop("text_projection.weight")]
        _write_tower(
            text, {**text_config, "architectures": ["CLIPTextModel"]}, state, ("text", "pooler_output", _EMBEDDING)
        )
    tokenizer.save(text)
    _add_pad_token(text, tokenizer)
    for number, weight in enumerate(projections, start=1):
        is_last = number == len(projections)
        _write_dense(routes.add("text", "Dense", _DENSE), weight, _IDENTITY if is_last else _GELU)
    image = routes.add("image", "Transformer", _TRANSFORMER)
    _write_tower(image, vision_config, vision_state, ("image", "pooler_output", _EMBEDDING))
    _write_json(image / processor_config.FILE, processor_config.write(preprocess.config, "CLIP"))
    routes.write()


class _Routes:
    """The modules of each route, in order."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.types: dict[str, str] = {}
        self.structure: dict[str, list[str]] = {}

    def add(self, route: str, name: str, kind: str) -> Path:
        """Append a module and return its folder."""
        modules = self.structure.setdefault(route, [])
        modules.append(f"{route}_{len(modules)}_{name}")
        self.types[modules[-1]] = kind
        return self.folder / modules[-1]

    def write(self) -> None:
        parameters = {"default_route": "text", "allow_empty_key": True, "route_mappings": {}}
        content = {"types": self.types, "structure": self.structure, "parameters": parameters}
        _write_json(self.folder / "router_config.json", content)


def _write_tower(
    folder: Path, config: dict[str, Any], state: Mapping[str, Tensor], names: tuple[str, str, str]
) -> None:
    """Write a tower of transformers.

    names: the kind of input, the attribute of the tower's output, and its name for the next module.
    """
    from safetensors.torch import save_file

    modality, attribute, output = names
    _write_json(folder / "config.json", config)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    _write_settings(folder, {modality: {"method": "forward", "method_output_name": attribute}}, output)


def _write_settings(folder: Path, calls: Json, output: str = _EMBEDDING, **others: Any) -> None:
    """Write how sentence-transformers calls a model of transformers.

    calls: by kind of input, the method and the attribute of its result.
    """
    settings = {"transformer_task": "feature-extraction", "modality_config": calls, "module_output_name": output}
    _write_json(folder / "sentence_bert_config.json", settings | others)


def _write_dense(folder: Path, weight: Tensor, activation: str) -> None:
    """Write a linear layer without bias, and the activation after it."""
    from safetensors.torch import save_file

    width_out, width_in = weight.shape
    content = {"in_features": width_in, "out_features": width_out, "bias": False, "activation_function": activation}
    _write_json(folder / "config.json", {**content, "module_input_name": _EMBEDDING, "module_output_name": _EMBEDDING})
    save_file({"linear.weight": weight.contiguous()}, folder / "model.safetensors", metadata={"format": "pt"})


def _add_pad_token(folder: Path, tokenizer: Tokenizer) -> None:
    """Let CLIP's tokenizer pad with its end token if it names no token for that.

    The tower reads the first end token of a row, and no token sees what follows it, so any padding will do.
    """
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if "pad_token" not in content:
        ends = [content[name] for name in ("eos_token", "sep_token") if name in content]
        content["pad_token"] = ends[0] if ends else tokenizer.fast.id_to_token(tokenizer.pad_id)
        _write_json(path, content)


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")

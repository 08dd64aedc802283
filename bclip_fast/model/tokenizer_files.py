"""The tokenizer that a folder's files describe together: its pipeline and the settings beside it.

`tokenizer.json` holds a complete pipeline, `vocab.txt` the pieces of a BERT, and `spiece.model` those of a SigLIP.
`tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and `config.json` beside them hold settings, as
transformers writes them.
Every setting that changes token ids is applied, or an error names it. This module doesn't import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from bclip_fast.errors import UserError
from bclip_fast.io import stand_ins
from bclip_fast.io.json_files import read_object

from .sentencepiece_files import read_sentencepiece
from .special_tokens import DEFAULTS, SpecialTokens, read_added_tokens, read_special_tokens
from .tokenizer_cleaning import CLEANERS, Cleaning

Json = dict[str, Any]

SENTENCEPIECE = "spiece.model"
PIPELINES = ("tokenizer.json", "vocab.txt", SENTENCEPIECE)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
# Kinds of tokenizers that need another library. Their fast form is a tokenizer.json.
OTHER_KINDS = {
    "tokenizer.model": "a sentencepiece model",
    "sentencepiece.bpe.model": "a sentencepiece model",
    "spm.model": "a sentencepiece model",
    "merges.txt": "the merges of a byte-pair tokenizer",
    "tekken.json": "a Tekken vocabulary",
    "bpe.codes": "the codes of a byte-pair tokenizer",
}
_CONVERT = (
    "convert it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes tokenizer.json"
)
_MAX_SETTINGS_BYTES = 16 << 20
# transformers writes 10^30 for a tokenizer without a limit.
_NO_LIMIT = 1_000_000
_BERT_TYPES = ("Bert", "DistilBert", "Electra", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM")
_BERT_CLASSES = {f"{name}Tokenizer{fast}" for name in _BERT_TYPES for fast in ("", "Fast")}
# Classes that take tokenizer.json as it is.
_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# Settings of which only these values are supported.
_FIXED: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "never_split": (None, [], ()),
    "clean_text": (True, None),
    "split_special_tokens": (False, None),
    "padding_side": ("right", None),
    "truncation_side": ("right", None),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """A pipeline with every setting of its folder."""

    fast: FastTokenizer
    special: SpecialTokens
    max_length: int | None
    """Number of tokens of the longest text that the tokenizer was made for. None: no limit."""
    cleaning: Cleaning = "whitespace"
    """What happens to a text before the pipeline."""


def read(path: Path) -> TokenizerFiles:
    """Read a `tokenizer.json`, the `vocab.txt` of a BERT or a `spiece.model`, and the settings in the same folder.

    Raises:
        UserError: a file can't be read, two files contradict each other, or a setting isn't supported.
    """
    if path.name in OTHER_KINDS:
        raise UserError(f"{path} is {OTHER_KINDS[path.name]}; {_CONVERT}")
    config, special_map, added, model = (_optional(path.parent / name) for name in SETTINGS)
    if isinstance(config.get("auto_map"), dict) and config["auto_map"].get("AutoTokenizer"):
        raise UserError(f"{path.parent / SETTINGS[0]}: auto_map names code for its own tokenizer, which is never run")
    for name, values in _FIXED.items():
        if config.get(name) not in values:
            raise UserError(f"{path.parent / SETTINGS[0]}: {name}={config[name]!r} isn't supported, only {values[0]!r}")
    class_name = _class_name(config, model)
    is_bert, is_siglip = class_name in _BERT_CLASSES, class_name == "SiglipTokenizer"
    cleaning = config.get("clean", "siglip" if is_siglip else "whitespace")
    if cleaning not in CLEANERS:
        raise UserError(f"{path.parent / SETTINGS[0]}: clean={cleaning!r} must be {' or '.join(CLEANERS)}")
    if is_siglip and not config.pop("do_lower_case", True):
        raise UserError(f"{path.parent / SETTINGS[0]}: do_lower_case=false isn't supported for {class_name}")
    if path.suffix == ".txt":
        if class_name not in (*_BERT_CLASSES, *_PLAIN_CLASSES, None):
            raise UserError(f"{path} belongs to a {class_name}, not to a BERT; {_CONVERT}")
        special = read_special_tokens(path.parent, config, special_map, DEFAULTS)
        fast = _from_vocabulary(path, config, model, special)
    else:
        special = read_special_tokens(path.parent, config, special_map, DEFAULTS if is_bert else {})
        fast = read_sentencepiece(path) if path.name == SENTENCEPIECE else _from_json(path)
        _check_normalizer(fast, path, config, is_bert)
    _add_tokens(fast, path, special, read_added_tokens(path.parent, config, added, special))
    if path.suffix != ".txt":
        _check_template(fast, path, special)
    if fast.padding is not None:
        special.setdefault("pad_token", AddedToken(fast.padding["pad_token"]))
    for name, token in DEFAULTS.items():
        if fast.token_to_id(token.content) is not None:
            special.setdefault(name, token)
    return TokenizerFiles(fast, special, _max_length(fast, path, config), cleaning)


def wordpiece(
    vocabulary: dict[str, int],
    special: SpecialTokens,
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    split_chinese: bool = True,
) -> FastTokenizer:
    """BERT's pipeline around a vocabulary, as transformers' BertTokenizer builds it."""
    unknown, start, end = (special[name].content for name in ("unk_token", "cls_token", "sep_token"))
    fast = FastTokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    fast.normalizer = normalizers.BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    if vocabulary:
        fast.add_special_tokens([token for token in special.values() if token.content in vocabulary])
        fast.post_processor = processors.BertProcessing((end, vocabulary[end]), (start, vocabulary[start]))
    return fast


def _optional(path: Path) -> Json:
    return read_object(path, _MAX_SETTINGS_BYTES) if path.is_file() else {}


def _class_name(config: Json, model: Json) -> str | None:
    """Name of transformers' class for the folder, as AutoTokenizer finds it. None without any sign."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None and isinstance(model.get("model_type"), str):
        types = {kind.lower(): kind for kind in _BERT_TYPES}
        kind = types.get(model["model_type"].replace("-", ""))
        name = f"{kind}Tokenizer" if kind else None
    return name if isinstance(name, str) else None


def _from_json(path: Path) -> FastTokenizer:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error}") from error
    try:
        return FastTokenizer.from_str(text)
    except Exception as error:  # the library doesn't raise a narrower type
        stand_ins.refuse(path)
        raise UserError(f"{path} is not a tokenizer.json: {error}") from error


def _from_vocabulary(path: Path, config: Json, model: Json, special: SpecialTokens) -> FastTokenizer:
    vocabulary = _read_vocabulary(path, special)
    settings = path.parent / SETTINGS[0]
    lowercase = config.get("do_lower_case", model.get("do_lower_case"))
    if lowercase is None:
        if cased := next((token for token in vocabulary if _is_cased(token)), None):
            raise UserError(
                f"{path} has pieces in upper case, such as {cased!r}, but no file says if texts become lower case; "
                f'write {{"do_lower_case": false}} (or true) to {settings}'
            )
        lowercase = True
    return wordpiece(
        vocabulary,
        special,
        lowercase=_flag(settings, "do_lower_case", lowercase),
        strip_accents=_flag(settings, "strip_accents", config.get("strip_accents"), optional=True),
        split_chinese=_flag(settings, "tokenize_chinese_chars", config.get("tokenize_chinese_chars", True)),
    )


def _flag(path: Path, name: str, value: Any, optional: bool = False) -> Any:
    if not isinstance(value, bool) and not (optional and value is None):
        raise UserError(f"{path}: {name}={value!r} must be true or false")
    return value


def _is_cased(token: str) -> bool:
    """Whether a piece, other than [CLS] or [unused1], has an upper-case letter of ASCII."""
    return not (token.startswith("[") and token.endswith("]")) and any("A" <= letter <= "Z" for letter in token)


def _read_vocabulary(path: Path, special: SpecialTokens) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"vocabulary file {path} cannot be read: {error}") from error
    if lines and not lines[-1]:
        lines.pop()
    vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    required = [special[name].content for name in ("pad_token", "unk_token", "cls_token", "sep_token")]
    missing = [token for token in required if token not in vocabulary]
    if missing:
        stand_ins.refuse(path)
        raise UserError(f"vocabulary file {path} lacks {', '.join(missing)}; it isn't a BERT vocab.txt")
    return vocabulary


def _check_normalizer(fast: FastTokenizer, path: Path, config: Json, is_bert: bool) -> None:
    """Raise UserError if tokenizer.json treats case, accents or Chinese characters otherwise than its settings say.

    transformers' BERT classes obey the settings and their defaults, and other classes obey tokenizer.json.
    """
    defaults = {"do_lower_case": True, "tokenize_chinese_chars": True} if is_bert else {}
    says = {**defaults, **{name: config[name] for name in _PROBES if config.get(name) is not None}}
    if is_bert and "strip_accents" not in says:
        says["strip_accents"] = says["do_lower_case"]
    for name, value in says.items():
        text, changed = _PROBES[name]
        result = fast.normalizer.normalize_str(text) if fast.normalizer is not None else text
        if (result == changed) != _flag(path.parent / SETTINGS[0], name, value):
            stated = f"says {name}={value}" if name in config else f"leaves {name} at its default, {value}"
            raise UserError(
                f"{path} turns {text!r} into {result!r}, but {SETTINGS[0]} {stated}; set {name} there as the model "
                "was trained with, and write tokenizer.json again"
            )


# A text for each setting, and its form if the setting is on.
_PROBES = {"do_lower_case": ("A", "a"), "strip_accents": ("é", "e"), "tokenize_chinese_chars": ("中", " 中 ")}


def _add_tokens(fast: FastTokenizer, path: Path, special: SpecialTokens, added: dict[int, AddedToken]) -> None:
    """Add the tokens of the settings to the pipeline. Their ids must be those of the settings."""
    own = fast.get_added_tokens_decoder()
    for number, token in sorted(added.items()):
        if number in own and repr(own[number]) != repr(token):
            raise UserError(
                f"{path.parent}: token {number} is {token!r} in the settings, but {own[number]!r} in {path.name}; "
                "write both files again with save_pretrained"
            )
        if number not in own:
            _add(fast, path, token)
        if fast.token_to_id(token.content) != number:
            raise UserError(
                f"{path.parent}: the settings give {token.content!r} the id {number}, but with {path.name} it has "
                f"{fast.token_to_id(token.content)}; write both files again with save_pretrained"
            )
    for name, token in special.items():
        if fast.token_to_id(token.content) is not None or not name.endswith("_token"):
            _add(fast, path, token)
        elif name != "mask_token":
            raise UserError(f"{path.parent}: {name} {token.content!r} isn't in the vocabulary of {path.name}")


def _add(fast: FastTokenizer, path: Path, token: AddedToken) -> None:
    if not token.content:
        raise UserError(f"{path.parent}: an added token is empty")
    if any(own.content == token.content for own in fast.get_added_tokens_decoder().values()):
        return
    (fast.add_special_tokens if token.special else fast.add_tokens)([token])


def _check_template(fast: FastTokenizer, path: Path, special: SpecialTokens) -> None:
    """Raise UserError if tokenizer.json wraps a text in other tokens than the settings name, or has another unknown."""
    unknown = getattr(fast.model, "unk_token", None)
    if "unk_token" in special and unknown is not None and unknown != special["unk_token"].content:
        raise UserError(
            f"{path} has the unknown token {unknown!r}, but the settings beside it {special['unk_token'].content!r}"
        )
    ids = fast.encode("").ids
    for name, position in (("cls_token", 0), ("sep_token", -1)):
        if name in special and len(ids) == 2 and ids[position] != fast.token_to_id(special[name].content):
            raise UserError(
                f"{path} puts {fast.id_to_token(ids[position])!r} where the settings beside it have {name} "
                f"{special[name].content!r}"
            )


def _max_length(fast: FastTokenizer, path: Path, config: Json) -> int | None:
    limits = [config.get("model_max_length"), fast.truncation["max_length"] if fast.truncation else None]
    if fast.truncation and fast.truncation["direction"] != "right":
        raise UserError(f"{path} truncates on the {fast.truncation['direction']}, which isn't supported")
    if fast.padding and fast.padding["direction"] != "right":
        raise UserError(f"{path} pads on the {fast.padding['direction']}, which isn't supported")
    numbers = [limit for limit in limits if isinstance(limit, int | float) and 0 < limit < _NO_LIMIT]
    return int(min(numbers)) if numbers else None

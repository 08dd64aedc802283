"""The special and added tokens in the settings of a tokenizer, as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from bclip_fast.errors import UserError

Json = dict[str, Any]
SpecialTokens = dict[str, AddedToken]
"""Name of the role, such as `pad_token` -> token. Further special tokens have the name of their list and a number."""

_LISTS = ("additional_special_tokens", "extra_special_tokens")
_ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "bos_token", "eos_token")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def _special(content: str) -> AddedToken:
    return AddedToken(content, special=True, normalized=False)


DEFAULTS: SpecialTokens = {
    name: _special(content)
    for name, content in zip(_ROLES, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), strict=False)
}
"""BERT's tokens."""


def read_special_tokens(folder: Path, config: Json, special_map: Json, defaults: SpecialTokens) -> SpecialTokens:
    """The special tokens of tokenizer_config.json and special_tokens_map.json, or the default of a role without any.

    Raises:
        UserError: a token isn't text or a table, or the two files contradict each other.
    """
    tokens = dict(defaults)
    for name in _ROLES:
        values = [
            _token(folder / file, name, content[name])
            for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map))
            if content.get(name) is not None
        ]
        if len(values) == 2 and values[0].content != values[1].content:
            raise UserError(
                f"{folder}: {name} is {values[0].content!r} in tokenizer_config.json, but {values[1].content!r} in "
                "special_tokens_map.json; correct one of them"
            )
        if values:
            tokens[name] = values[0]
    for content in (config, special_map):
        for list_name in _LISTS:
            values_or_table = content.get(list_name) or []
            items = values_or_table.values() if isinstance(values_or_table, dict) else values_or_table
            if not isinstance(values_or_table, dict | list):
                raise UserError(f"{folder}: {list_name}={values_or_table!r} must be a list of tokens")
            for number, value in enumerate(items):
                tokens.setdefault(f"{list_name}[{number}]", _token(folder, list_name, value))
    return tokens


def read_added_tokens(folder: Path, config: Json, added: Json, special: SpecialTokens) -> dict[int, AddedToken]:
    """The added tokens by their id, from tokenizer_config.json or, without any there, from added_tokens.json.

    Raises:
        UserError: an id or a token is malformed.
    """
    table = config.get("added_tokens_decoder")
    contents = {token.content for token in special.values()}
    try:
        if table:
            return {int(number): _token(folder, "added_tokens_decoder", token) for number, token in table.items()}
        return {
            int(number): _special(content) if content in contents else AddedToken(content, normalized=True)
            for content, number in added.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder}: its added tokens are malformed: {error}") from error


def _token(source: Path, name: str, value: Any) -> AddedToken:
    if isinstance(value, str):
        return _special(value)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise UserError(f"{source}: {name}={value!r} must be a token")
    flags = {flag: bool(value[flag]) for flag in _FLAGS if flag in value}
    # Before transformers 4.34, the tables of roles had no entry "special".
    special = bool(value.get("special", name != "added_tokens_decoder"))
    return AddedToken(value["content"], special=special, **{"normalized": not special, **flags})

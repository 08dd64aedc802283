"""Remove the references to the literature from a caption, and keep numbers of different height apart.

`text_of` marks both in the text. The rules for references:
- A number or sign ("12", "[3]", "*") is dropped, with the separators of a list ("12, 14-16").
- A bracket is dropped if it contains only references and words such as "see" or "adapted from".
- "as described in" and "adapted from" are dropped with the number that they refer to.
- A reference by name stays if it is a part of the sentence, as in "data from Smith et al., 2010".
  "The methods of (Smith, 2010)" loses its bracket. Inside a bracket, a name stays only if other words refer to it.
- A bracket may name a reference in plain text ("Smith et al., 2010", "Smith and Doe 2010"), or in front of a year that
  is a reference. Such a name is a part of the reference. One name and a year in plain text stay: they may be a place.
- Dropping a reference never joins the words around it, and a reference that stays never touches a word.
- No space remains behind an opening bracket, or in front of a closing one, a comma or a full stop.

Digits of different height never form one number: 10 to the 6th becomes "10 6". Other scripts join: CO2, 25th, Ca2+.
"""

from __future__ import annotations

import re

# The XML parser refuses these control characters, so they never occur in an article.
REFERENCE, REFERENCE_END, SCRIPT, SCRIPT_END = "\x01", "\x02", "\x03", "\x04"
# The start of an element that the caller of `text_of` looks for.
MARK = "\x08"

# In the working text, a reference by number or sign is one character. One by name is its position in a list.
_NUMBER = "\x05"
_ITEM = r"(?:\x05|\x06\d+\x07)"
_REFERENCE = re.compile(f"{REFERENCE}([^{REFERENCE_END}]*){REFERENCE_END}")
_ANY = re.compile("[\x05\x06]")
_MAX_DEPTH = 2
_NAME = re.compile(r"\x06(\d+)\x07")
_WORD = re.compile(r"[^\W\d_]{3,}")
_SIGN = "[+\\-\u2010-\u2013\u2212]"
_INTO_SCRIPT = re.compile(rf"(?<=\d)\x04*\x03+(?=\s?{_SIGN}?\s?\d)")
_OUT_OF_SCRIPT = re.compile(r"(?<=\d)\x04+(?=\d)")
_SURNAME = (
    r"(?:(?:[Vv]an|[Vv]on|[Dd]e|der|den|[Dd]a|[Dd]i|[Ll]a|[Ll]e|[Ee]l|[Dd]os)\s){0,3}"
    r"[A-Z\u00c0-\u00de][\w'\u2019\u2010-]{1,30}"
)
_SEVERAL = rf"{_SURNAME}\s(?:et\sal\.?|(?:and|&)\s{_SURNAME})"
_YEAR = r"(?:19|20)\d\d[a-z]?"
_LEAD = (
    r"(?:(?:see(?: also)?|e\.g\.,?|cf\.|reviewed in|"
    r"(?:(?:adapted|modified|reproduced|redrawn|taken)\s)?(?:from|after))\s)?"
)
_NAMED_YEAR = re.compile(
    rf"([(\[;,]\s?{_LEAD})({_SEVERAL}|{_SURNAME}),?\s{REFERENCE}({_YEAR}){REFERENCE_END}(?=\s?[)\];,{REFERENCE}])"
)
_PLAIN = re.compile(rf"([(\[;,]\s?{_LEAD})({_SEVERAL},?\s{_YEAR})(?=\s?[)\];,\[{REFERENCE}])")
_SPACE_BEFORE = re.compile(r" (?=[)\]]|[.,](?: |$))")
_SPACE_BEHIND = re.compile(rf"(?<=[(\[])({MARK}*) ")
_BRACKET = re.compile(r"([\[(])([^\[\]()]*)([\])])")
# Longer brackets stay as they are. The limit also bounds the time of the patterns below.
_MAX_BRACKET = 2000
# No two alternatives match the same text, so that a match takes linear time.
_FILLER = re.compile(
    r"(?:see(?: also)?|e\.?\s?g|i\.\s?e|cf|refs?|references?(?: therein)?|and|adapted|modified|reproduced|redrawn|"
    "reviewed|taken|from|after|in|by|[\\d\\s,;:.&/\u2010-\u2013\x05\x06\x07-])+",
    re.IGNORECASE,
)
_PREPOSITION = re.compile(r"\b(?:of|in|from|by|to|with|after|and|as)\s*$", re.IGNORECASE)
_PHRASE = re.compile(
    r",?\s*\b(?:as\s+(?:previously\s+)?(?:described|reported|published|shown|defined)|adapted|modified|reproduced|redrawn|"
    r"taken)\s+(?:previously\s+)?(?:in|by|from|after)(?:\s+(?:refs?\.?|references?))?$",
    re.IGNORECASE,
)
_MAX_PHRASE = 80
_LIST = rf"{_ITEM}(?:[\s,;&\u2010-\u2013-]*(?:and\s)?{_ITEM})*"
_LAST_IN_BRACKET = re.compile(rf"\s*[,;]\s*(?:(?:see(?: also)?|e\.g\.,?|refs?\.?|cf\.)\s*)?{_LIST}\s*(?=[,;]|$)")
_FIRST_IN_BRACKET = re.compile(rf"^\s*{_LIST}\s*[,;]\s*")
_NUMBERS = re.compile("\x05(?:\\s*(?:(?:[,;&\u2010-\u2013-]|and)\\s*)?\x05)*")


def resolve_marks(text: str) -> str:
    """Return the text without marks: references dropped or kept by the rules, and digits of different height apart."""
    names: list[str] = []
    if "19" in text or "20" in text:
        text = _NAMED_YEAR.sub(rf"\1{REFERENCE}\2, \3{REFERENCE_END}", text)
        text = _PLAIN.sub(rf"\1{REFERENCE}\2{REFERENCE_END}", text)
    if REFERENCE in text:
        text = _REFERENCE.sub(lambda match: _placeholder(match.group(1), names), text)
    if SCRIPT in text:
        text = _OUT_OF_SCRIPT.sub(" ", _INTO_SCRIPT.sub(" ", text))
        text = text.replace(SCRIPT, "").replace(SCRIPT_END, "")
    if _NUMBER in text or names:
        # A bracket of references inside another one is replaced first, by a reference.
        for _ in range(_MAX_DEPTH):
            text = _BRACKET.sub(_without_references, text)
        text = _without_numbers(text)
        text = _NAME.sub(lambda match: _apart(match, names[int(match.group(1))]), text)
    return text


def without_loose_spaces(text: str) -> str:
    """Return a folded text without spaces behind opening brackets and in front of closing ones, commas, full stops."""
    return _SPACE_BEHIND.sub(r"\1", _SPACE_BEFORE.sub("", text))


def _placeholder(reference: str, names: list[str]) -> str:
    if not _WORD.search(reference):
        return _NUMBER
    names.append(reference.translate({ord(mark): None for mark in (SCRIPT, SCRIPT_END)}))
    return f"\x06{len(names) - 1}\x07"


def _without_references(match: re.Match[str]) -> str:
    """Return a bracket without its references, or one reference if it has nothing else."""
    start, content, end = match.groups()
    if len(content) > _MAX_BRACKET or not _ANY.search(content):
        return match.group()
    if _FILLER.fullmatch(content):
        before = match.string[max(0, match.start() - _MAX_PHRASE) : match.start()]
        return content if _NAME.search(content) and _PREPOSITION.search(before) else _NUMBER
    content = _LAST_IN_BRACKET.sub("", _FIRST_IN_BRACKET.sub("", content))
    return f"{start}{content}{end}"


def _without_numbers(text: str) -> str:
    first, *pieces = _NUMBERS.split(text)
    parts = [first]
    for piece in pieces:
        before = parts[-1].rstrip()
        if phrase := _PHRASE.search(before, max(0, len(before) - _MAX_PHRASE)):
            before = before[: phrase.start()]
        parts[-1] = before
        parts.append(" " + piece if _is_part_of_word(before[-1:]) and _is_part_of_word(piece[:1]) else piece)
    return "".join(parts)


def _apart(match: re.Match[str], name: str) -> str:
    """Return a name, with a space where it would touch a word."""
    start, end = match.span()
    before, after = match.string[max(0, start - 1) : start], match.string[end : end + 1]
    return (" " if _is_part_of_word(before) else "") + name + (" " if _is_part_of_word(after) else "")


def _is_part_of_word(character: str) -> bool:
    return character.isalnum()

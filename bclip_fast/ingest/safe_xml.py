"""Parse untrusted XML: without DTD, custom entities or network access, and with bounded size and depth."""

from __future__ import annotations

import codecs
import html.entities
import re

from lxml import etree

from bclip_fast.io import stand_ins

MAX_XML_BYTES = 32 << 20
# Each node takes about 100 bytes of memory, even if its tag is short.
MAX_TAGS = 2_000_000

_DECLARATION = re.compile(r"\s*<\?xml\b[^>]{0,500}?\?>")
_ENCODING = re.compile(rb"""<\?xml[^>]{0,200}?encoding\s*=\s*["']([A-Za-z0-9._-]{1,40})["']""")
_BEFORE_DOCTYPE = re.compile(r"(?:\s+|<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z))*", re.DOTALL)
# An alternative that is not closed matches to the end of the text, so that the scan takes linear time.
_LITERAL_OR_ENTITY = re.compile(
    r"<!\[CDATA\[.*?(?:\]\]>|\Z)|<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)|&(?P<name>[A-Za-z][\w.-]{0,63});", re.DOTALL
)
_UNDEFINED_ENTITY = re.compile(r"&(?!#|(?:amp|lt|gt|quot|apos);)")
_DOCTYPE_PART = re.compile(r"""<!--.*?(?:-->|\Z)|["'\[\]>]""", re.DOTALL)
_PREDEFINED = {"amp", "lt", "gt", "quot", "apos"}
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff\ud800-\udfff]")
_ENCODINGS_BY_MARK = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Other codecs of Python are slow, or are not character sets (punycode, unicode_escape).
_ENCODING_NAMES = re.compile(
    r"utf-8|utf-16|ascii|iso8859-\d+|cp125\d|cp1252|koi8-r|shift_jis|cp932|euc_(?:jp|kr)|gb2312|gbk|gb18030|big5"
)


class XmlError(ValueError):
    """The document is refused. The message is the reason, in one line."""


def parse(data: bytes) -> etree._Element:
    """Return the root element. Raises XmlError.

    This function removes the document type declaration first, so the parser has nothing to expand or fetch. HTML 5's
    table replaces the DTD's named characters (`&nbsp;`, `&alpha;`): it contains the ISO sets of the JATS DTDs. An
    unknown name stays in the text.
    """
    if len(data) > MAX_XML_BYTES:
        raise XmlError(f"larger than {MAX_XML_BYTES >> 20} MiB")
    text = _without_doctype(_decode(data))
    if text.count("<") > MAX_TAGS:
        raise XmlError(f"more than {MAX_TAGS} tags")
    if _UNDEFINED_ENTITY.search(text):  # few articles have one, and the replacement takes as long as the parser
        text = _LITERAL_OR_ENTITY.sub(_named_character, text)
    parser = etree.XMLParser(
        load_dtd=False, dtd_validation=False, resolve_entities=False, no_network=True, huge_tree=False, recover=False
    )
    try:
        return etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        if reason := stand_ins.describe(data[: stand_ins.NUM_BYTES]):
            raise XmlError(f"broken XML: the file {reason}") from None
        raise XmlError(f"broken XML: {' '.join(str(error).split())[:200]}") from None


def _decode(data: bytes) -> str:
    for mark, name in _ENCODINGS_BY_MARK:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    else:
        declared = _ENCODING.match(data)
        encoding = declared.group(1).decode("ascii") if declared else "utf-8"
    try:
        if not _ENCODING_NAMES.fullmatch(codecs.lookup(encoding).name.removesuffix("-le").removesuffix("-be")):
            raise LookupError
        text = data.decode(encoding)
    except LookupError:
        raise XmlError(f"unknown encoding {encoding!r}") from None
    except UnicodeDecodeError as error:
        raise XmlError(f"broken XML: not {encoding}: byte {error.start}") from None
    if declaration := _DECLARATION.match(text):
        text = text[declaration.end() :]
    if _FORBIDDEN.search(text):
        raise XmlError("broken XML: control characters")
    return text


def _without_doctype(text: str) -> str:
    prolog = _BEFORE_DOCTYPE.match(text)
    start = prolog.end() if prolog else 0
    if not text.startswith("<!DOCTYPE", start):
        return text
    position, depth = start, 0
    for part in _DOCTYPE_PART.finditer(text, start + 1):
        if part.start() < position:
            continue
        symbol = part.group()
        if symbol in "\"'":
            position = text.find(symbol, part.end()) + 1
            if position == 0:
                break
        elif symbol == "[":
            depth += 1
        elif symbol == "]":
            depth -= 1
        elif symbol == ">" and depth == 0:
            if "<!ENTITY" in text[start : part.end()]:
                raise XmlError("declares entities of its own")
            return text[part.end() :]
    raise XmlError("broken XML: the DOCTYPE does not end")


def _named_character(match: re.Match[str]) -> str:
    name = match.group("name")
    if name is None or name in _PREDEFINED:
        return match.group()
    character = html.entities.html5.get(f"{name};")
    if character is None:
        return f"&amp;{name};"
    return "".join(f"&#{ord(part)};" for part in character)

"""The licence of an article or figure: read from addresses and words, and the strictest where they differ.

The rules:
- The statements are the addresses and `license_ref`s of a `license`, its words and its `license-type`. The words of the
  copyright statements count too: older NLM files state the licence there.
- A verdict is a Creative Commons code such as "CC BY-NC", "CC0", "public domain", or the name of another licence.
  "" means that nothing is stated, or that no rule understands it. `Licence.problem` then says which.
- Several statements: their restrictions add up. NC, SA and ND come from any of them, and ND makes SA redundant.
  Another licence by name, or an address that no rule understands, is stricter than every Creative Commons licence.
- A licence for text and data mining only adds rights, so it counts only if it is the only one.
- "All rights reserved" is not a licence, and says nothing against one.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from lxml import etree

from .jats_text import fold, local_name, text_of

MAX_TEXT = 2000
MAX_URL = 256
_MAX_NAME = 100
_XLINK_HREF = "{http://www.w3.org/1999/xlink}href"
_PUBLIC_DOMAIN = ("CC0", "public domain")
_MINING = "text and data mining"
_LIMITS = {"NC": "no commercial use", "ND": "no derivatives", "SA": "share alike"}
_UNKNOWN = "another licence"
_DASHES = re.compile("[\u2010-\u2015\u2212\u00ad_]|%2d", re.IGNORECASE)

# Addresses. Real files have `CC-BY`, `by4.0`, `by_nc`, `licence`, `/deed.de` and misspelt hosts.
_CC_HOST = re.compile(r"creative-?comm?ons?\.[a-z]{2,3}/?([^\s,;)>\]]*)")
_CC_PATH = re.compile(r"(?:^|/)(?:cc-?)?((?:by|nc|nd|sa)(?:[-+]?(?:by|nc|nd|sa))*)(?=[-/\d.\s?#]|$)")
_CC_ZERO_PATH = re.compile(r"publicdomain|licen[cs]es?/(?:cc-?)?zero|(?:^|/)cc-?0")
_CC_OTHER_PATH = re.compile(r"licen[cs]es?/([a-z][a-z+-]*)")
_CC_IN_NAME = re.compile(
    r"(?:^|[^a-z])(?:cc|creative-?commons-?)((?:[\s-]*(?:by|nc|nd|sa))+|[\s-]*0|-?zero)(?![a-z])|authorchoice-cc([a-z]+)-"
)
# Other licences, by address, type or words. The first match gives the name.
_OTHER = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        (_MINING, r"text-?(?:and-?data-?)?mining|\btdm\b|[/-]tdm|tdm[-_]?licen[cs]e"),
        ("Elsevier user licence", r"elsevier\.com/open-access/userlicen[cs]e|elsevier user licen[cs]e"),
        ("Wiley terms of use", r"wiley\.com/terms-?(?:and-?conditions|of-?use)"),
        ("Oxford standard publication model", r"standard-publication-model|standard publication model"),
        ("Springer terms for accepted manuscripts", r"aam-terms-of-use|aam-terms-v1"),
        ("Nature terms", r"nature\.com/authors/(?:editorial-policies/)?licen[cs]e"),
        ("ACS AuthorChoice", r"authorchoice|author choice"),
        ("Open Government Licence", r"open-government-licen[cs]e|open government licen[cs]e"),
        ("arXiv licence", r"arxiv\.org/licen[cs]es"),
        ("COVID-19 emergency terms", r"duration of (?:the )?(?:.{0,40})(?:covid|sars-cov|pandemic|who declaration)"),
        ("fair use and text mining", r"principles of fair use"),
        ("verbatim copying", r"verbatim copying"),
    )
)

# Words. The text is in lower case, with "-" for every dash.
_ADDRESS = re.compile(r"(?:https?://|www\.|\bcreative-?comm?ons?\.)[^\s,;)>\]]+")
_CC_CODE = re.compile(r"\bcc[\s:-]*((?:by|nc|nd|sa)(?:[\s/-]*(?:by|nc|nd|sa))*)\b")
_CC_NAME = re.compile(r"creative\s+commons?|\bcc\b|attribution\s*-?\s*(?:non|share|no)")
_ZERO_WORDS = re.compile(r"\bcc-?0\b|public\s+domain\s+dedication")
_ZERO_FOR_DATA = re.compile(r"(?:\bcc-?0\b|public\s+domain\s+dedication)[^.]{0,200}?\bappl(?:y|ies) to the data")
_DOMAIN_WORDS = re.compile(
    r"\b(?:article|work|paper|publication|material|manuscript|report)s?\b[^.]{0,60}\b(?:is|are) "
    r"(?:in|within|placed in) the public domain|not subject to (?:u\.?\s?s\.? )?copyright|free of all copyright|"
    r"\bwork of the (?:u\.?\s?s\.?|united states) government"
)
_PERMISSIVE = re.compile(
    r"\bcommercial(?:ly)?(?: use)? (?:and|or|as well as|and/or) non-?\s?commercial(?:ly)?|"
    r"non-?\s?commercial(?:ly)?(?: use)? (?:and|or|as well as|and/or) commercial(?:ly)?|"
    r"(?:even|including)(?: for| if)? commercial(?:ly)?|"
    r"\bcommercial (?:re-?)?use (?:is|are) (?:also )?(?:permitted|allowed)"
)
_NONCOMMERCIAL = re.compile(
    r"non-?\s?commercial|\bn(?:ao|\u00e3o)[-\s]comercial|\b(?:sem|sin) (?:fins|fines) comercia|\bno[-\s]?comercial|"
    r"nicht[-\s]?kommerziell|pas d['\u2019]utilisation commerciale|"
    r"\b(?:no|not|cannot|never|neither|nor)\b[^.;]{0,80}\bcommercial|"
    r"\b(?:exclud|prohibit|forbid|forbad|without|except)\w*[^.;]{0,60}\bcommercial|"
    r"\bcommercial(?:ly)?\b[^.;]{0,80}\b(?:(?:is|are|be) not|not (?:be )?(?:permitted|allowed)|prohibited|forbidden|"
    r"excluded|requires?\b[^.;]{0,40}\b(?:permission|consent|licen[cs]e)|contact|apply (?:to|for)|subject to)\b"
)
_NO_DERIVATIVES = re.compile(
    r"no-?\s?deriv|\b(?:sem|sin|pas de|keine) (?:deriv|obras? deriv|modification|bearbeitung)|"
    r"\bno (?:modification|adaptation|alteration|derivative)|"
    r"\b(?:not|cannot|nor|without)\b[^.;]{0,80}\b(?:altered|alteration|transformed|built upon|build upon|adapted|"
    r"modified|modification|derivative)"
)
_SHARE_ALIKE = re.compile(
    r"share-?\s?alike|compart\w+ ?igual|mesma licen\u00e7a|gleichen bedingungen|m\u00eames conditions|"
    r"\b(?:same|identical) (?:licen[cs]e|terms)|licen[cs]ed alike"
)
_ATTRIBUTION = re.compile(r"attribution|atribui\u00e7\u00e3o|atribuci\u00f3n|attribuzione|namensnennung")


@dataclass(frozen=True)
class Licence:
    """A verdict and the statements behind it.

    Attributes:
        code: the verdict. Empty: not stated, or not understood.
        url: address of the licence, at most MAX_URL characters.
        text: the words of the licence, at most MAX_TEXT characters.
        conflict: the statements, if they differ, such as "address: CC BY; words: CC BY-NC".
        says_terms: whether the words state terms, or the address gives no verdict.
    """

    code: str = ""
    url: str = ""
    text: str = ""
    conflict: str = ""
    says_terms: bool = False

    @property
    def problem(self) -> str:
        """The statement that no rule understands, or the conflict. Empty if neither applies."""
        if self.code or self.conflict:
            return self.conflict
        statement = self.url or self.text[:_MAX_NAME]
        return f"not understood: {statement}" if statement else "not stated"


@dataclass(frozen=True)
class _Terms:
    """The terms in one statement. `code`: as in Licence. `limits`: restrictions without a licence, such as {"NC"}."""

    source: str
    code: str
    limits: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return f"{self.source}: {self.code or ', '.join(_LIMITS[limit] for limit in sorted(self.limits))}"


def read_licence(node: etree._Element) -> Licence:
    """Return the licence in a `permissions` element. In NLM 2.x, `node` is the element that has the `license`."""
    notices = list(node.iterfind(".//copyright-statement"))
    notice = fold(" ".join(map(text_of, notices)))
    licences = [(licence, text_of(licence), _links(licence)) for licence in node.iterfind(".//license")]
    readings = [_read_licence_element(*each) for each in licences]
    urls = [link for _, _, links in licences for link in links]
    if len(readings) > 1:
        others = [terms for terms in readings if all(each.code != _MINING for each in terms)]
        readings = others or readings
    statements = [each for terms in readings for each in terms]
    words = _words("copyright statement", notice)
    # NLM 2.x has the address of the licence inside the copyright statement.
    links = [link for each in notices for link in _links(each)]
    statements += _addresses(links)
    if words.code or words.limits:
        statements.append(words)
    text = " ".join(text for _, text, _ in licences if text)
    if not text or any(each.source == "copyright statement" for each in statements):
        text = fold(f"{text} {notice}")
    code = strictest([each.code for each in statements], [each.limits for each in statements])
    if any(each.code == _UNKNOWN for each in statements):
        code = ""
    differs = len({(each.code, each.limits) for each in statements}) > 1
    return Licence(
        code=code,
        url=_deciding_address(urls + links, code)[:MAX_URL],
        text=text[:MAX_TEXT],
        conflict="; ".join(dict.fromkeys(map(str, statements)))[:MAX_URL] if differs else "",
        says_terms=not code or any(each.source != "address" for each in statements),
    )


def with_metadata(licence: Licence, code: str) -> Licence:
    """Return the strictest of an article's licence and `code`, which its source's metadata state. "": not stated."""
    if not code:
        return licence
    own = licence.code if _is_open(code) else ""
    verdict = strictest([code, own])
    differs = f"metadata: {code}; {licence.conflict or f'article: {own}'}" if verdict != code else licence.conflict
    return dataclasses.replace(licence, code=verdict, conflict=differs[:MAX_URL])


def _read_licence_element(licence: etree._Element, text: str, links: list[str]) -> list[_Terms]:
    """Return what the addresses, the words and the type of one `license` say. Statements without terms are left out."""
    kinds = " ".join(licence.get(name, "") for name in ("license-type", "specific-use", "content-type"))
    kinds += " ".join(f" {ref.get('specific-use', '')}" for ref in licence.iter() if local_name(ref) == "license_ref")
    terms = _addresses(links)
    words = _words("words", text)
    if words.code or words.limits:
        terms.append(words)
    if code := _code_in_name(plain(licence.get("license-type", ""))):
        terms.append(_Terms("type", code))
    if any(each.code for each in terms):
        return terms
    name = next((name for each in (*links, kinds) if (name := _other_name(each))), "")
    if name or links:
        return [*terms, _Terms("address" if links else "type", name or _UNKNOWN)]
    return terms


def _links(element: etree._Element) -> list[str]:
    links = [element.get(_XLINK_HREF) or ""]
    links += [child.text or "" for child in element.iter() if local_name(child) == "license_ref"]
    links += [child.get(_XLINK_HREF) or "" for child in element.iter("ext-link", "uri")]
    return [fold(link) for link in links if link.strip()]


def _addresses(links: list[str]) -> list[_Terms]:
    codes = [code for link in links if (code := address_code(link))]
    return [_Terms("address", strictest(codes))] if codes else []


def _words(source: str, text: str) -> _Terms:
    code, limits = words_code(text)
    return _Terms(source, code, limits)


def _deciding_address(links: list[str], code: str) -> str:
    """Return the address whose code is the verdict, else the first one with a code, else the first one."""
    codes = {link: address_code(link) for link in links}
    decides = [link for link in links if code and codes[link] == code]
    return next(iter(decides + [link for link in links if codes[link]] + links), "")


def strictest(codes: Iterable[str], limits: Iterable[frozenset[str]] = ()) -> str:
    """Return the code with the restrictions of all `codes` and `limits`. A licence by name is stricter than all codes.

    "" among the codes says nothing. Limits without a code give "".
    """
    stated = [code for code in codes if code]
    if names := [code for code in stated if not _is_open(code)]:
        return names[0]
    parts = {part for code in stated for part in re.findall("BY|NC|SA|ND", code)} | {
        part for each in limits for part in each
    }
    if not stated:
        return ""
    if not parts:
        return stated[0]
    if "ND" in parts:
        parts.discard("SA")
    return "-".join(["CC BY", *(part for part in ("NC", "SA", "ND") if part in parts)])


def _is_open(code: str) -> bool:
    return code in _PUBLIC_DOMAIN or code.startswith("CC BY")


def plain(text: str) -> str:
    """Return the text in lower case, in compatibility form, with "-" for dashes and underscores."""
    return _DASHES.sub("-", unicodedata.normalize("NFKC", text)).casefold()


def address_code(url: str) -> str:
    """Return the code or the name that an address stands for. Empty if it names no licence."""
    address = plain(url)
    codes = []
    for host in _CC_HOST.finditer(address):
        path = host.group(1)
        if match := _CC_PATH.search(path):
            codes.append(_code(match.group(1)))
        elif _CC_ZERO_PATH.search(path):
            codes.append("CC0")
        elif match := _CC_OTHER_PATH.search(path):
            codes.append(f"Creative Commons {match.group(1)}")
    return strictest(codes) or _code_in_name(address) or _other_name(address)


def _code_in_name(text: str) -> str:
    match = _CC_IN_NAME.search(text)
    return _code(match.group(1) or match.group(2)) if match else ""


def _code(parts: str) -> str:
    return "CC0" if re.search("0|zero", parts) else strictest(["CC BY " + parts.upper()])


def words_code(text: str) -> tuple[str, frozenset[str]]:
    """Return the code or the name that words stand for, and their restrictions where they name no licence."""
    words = plain(text)
    # An address inside the words counts like an address.
    codes = [code for link in _ADDRESS.findall(words) if (code := address_code(link)) and _is_open(code)]
    codes += [_code(match.group(1)) for match in _CC_CODE.finditer(words)]
    words = _PERMISSIVE.sub(" ", words)
    limits = frozenset(
        part
        for part, pattern in (("NC", _NONCOMMERCIAL), ("ND", _NO_DERIVATIVES), ("SA", _SHARE_ALIKE))
        if pattern.search(words)
    )
    if _CC_NAME.search(words) and (_ATTRIBUTION.search(words) or limits):
        codes.append("CC BY")
    if _ZERO_WORDS.search(words) and not _ZERO_FOR_DATA.search(words):
        codes.append("CC0")
    if not codes and _DOMAIN_WORDS.search(words):
        codes.append("public domain")
    if codes:
        return strictest(codes, [limits]), frozenset()
    return _other_name(words), limits


def _other_name(text: str) -> str:
    return next((name for name, pattern in _OTHER if pattern.search(plain(text))), "")

"""Split the caption of a composite figure into the parts of its panels.

A label stands before its text ("(A) a cell. (B) a nucleus") or after it ("a cell (a) and a nucleus (b)"). The caption
is read clause by clause. A clause that starts with a label belongs to it, and so do following sentences without one.
In other clauses, the words and punctuation around the labels decide. A label may name several panels ("(C-E) Venn
diagrams of (C) ..."). Their common text belongs to each.

Labels must be A, B, C, ... in the order of their first text, without a gap. Later labels in a clause of another panel
are references ("the cells in (a)"). Where the grammar leaves it open to which panel a text belongs, the panels are
marked as uncertain.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .caption_labels import LETTERS, MAX_PANELS, Label, Labels, Span, find_labels, split_clauses
from .caption_lists import CONTINUES, INTRODUCES, OPENS, STARTS, divide_after, divide_list, has_shared_end
from .caption_tails import ends_clause, is_for_named, is_missing, num_about_all, refers, refers_to, trimmed

_LEAD = re.compile(r"[\s,;:.]*(?:(?:and|in|the|panels?|figures?|subfigures?)\s+)*", re.IGNORECASE)
# Files that belong to a figure are named after its caption.
_ATTACHED = re.compile(r"\bsource (?:data|code)\s?\d", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """The part of a caption that belongs to one panel.

    Attributes:
        label: "A" to "P", or a place such as "left" or "upper-left".
        text: the caption of the panel, with the text that belongs to all panels.
        spans: start and end of the panel's own text in the caption, also of text that it shares with some panels.
        is_certain: whether the grammar leaves no other way to split the caption.
    """

    label: str
    text: str
    spans: tuple[Span, ...]
    is_certain: bool = True


def split_caption(caption: str) -> dict[str, str]:
    """Return the caption of each panel by its label, as far as it is certain. Empty if the caption names no panels."""
    return {part.label: part.text for part in caption_parts(caption) if part.is_certain}


def caption_parts(caption: str) -> list[Part]:
    """Return the part of each panel that the caption names, in the order of the labels. In doubt, return none."""
    for labels in find_labels(caption):
        parts = _Reader(caption, labels).parts()
        if parts:
            return parts
    return []


class _Refused(Exception):
    """The labels of this style are not those of panels."""


@dataclass
class _Reader:
    """Reads a caption clause by clause."""

    caption: str
    style: Labels
    own: dict[str, list[Span]] = field(default_factory=dict)
    grouped: set[str] = field(default_factory=set)
    group: frozenset[str] = frozenset()
    doubtful: set[str] = field(default_factory=set)
    head: list[Span] = field(default_factory=list)
    tail: list[Span] = field(default_factory=list)
    # Clauses without a label after a label that stands after its text.
    pending: list[Span] = field(default_factory=list)
    current: tuple[str, ...] = ()
    # Whether the last label stands after its text, and at the end of its clause.
    follows: bool = False
    at_end: bool = False

    def parts(self) -> list[Part]:
        try:
            clauses, is_attached = self._clauses(), False
            for index, clause in enumerate(clauses):
                labels = self._labels_in(clause)
                is_led = bool(labels and self._is_led(clause, labels[0]))
                names_file = bool(self.own and _ATTACHED.search(self.caption[clause[0] : clause[1]]))
                if not is_led and (is_attached or (names_file and not labels)):
                    continue
                is_attached = names_file
                self._read(clause, clauses[index + 1] if index + 1 < len(clauses) else None)
        except _Refused:
            return []
        if self.pending and not self.at_end:
            self._give(self.current, *self.pending)
        else:
            self.tail += self.pending
        last = next(reversed(self.own), None)
        if last is not None and not self.tail:
            others = [span for name, spans in self.own.items() if name != last for span in spans]
            start = len(self.own[last]) - num_about_all(self.caption, self.own[last], others)
            self.tail, self.own[last] = self.own[last][start:], self.own[last][:start]
        return self._result()

    def _clauses(self) -> list[Span]:
        """Return the clauses. A label at the end of a sentence, and only there, stands after the whole sentence."""
        joined: list[Span] = []
        for clause in split_clauses(self.caption, self.style.labels):
            labels = self._labels_in(clause) if self.style.may_follow else []
            if (
                len(labels) == 1
                and ends_clause(self.caption, labels[0], clause)
                and not self._is_led(clause, labels[0])
            ):
                while (
                    joined
                    and self.caption[slice(*joined[-1])].rstrip().endswith(";")
                    and not self._labels_in(joined[-1])
                ):
                    clause = joined.pop()[0], clause[1]
            joined.append(clause)
        return joined

    def _result(self) -> list[Part]:
        names = list(self.own)
        is_complete = self.style.are_places or names == list(LETTERS[: len(names)])
        if not 2 <= len(names) <= MAX_PANELS or not is_complete:
            return []
        parts = []
        for name in names:
            spans = trimmed(self.caption, self.own[name])
            text = "".join(re.sub(r"[\W_]", "", self.caption[start:end]) for start, end in spans)
            if len(text) < 2 or text.isdigit():
                return []
            head, tail = trimmed(self.caption, self.head), trimmed(self.caption, self.tail)
            texts = [self.caption[start:end] for start, end in (*head, *sorted(spans), *tail)]
            texts = [text.rstrip(" ;,") if i + 1 < len(texts) else text for i, text in enumerate(texts)]
            parts.append(Part(name, " ".join(texts).strip(), tuple(sorted(spans)), name not in self.doubtful))
        return parts

    def _labels_in(self, clause: Span) -> list[Label]:
        return [label for label in self.style.labels if clause[0] <= label.start < clause[1]]

    def _is_led(self, clause: Span, label: Label) -> bool:
        return _LEAD.fullmatch(self.caption[clause[0] : label.start]) is not None

    def _is_new(self, label: Label) -> bool:
        """Return whether a label names the next panels."""
        if self.style.are_places:
            return label.names[0] not in self.own
        start = len(self.own)
        return label.names == tuple(LETTERS[start : start + len(label.names)])

    def _is_known(self, label: Label) -> bool:
        return all(name in self.own for name in label.names)

    def _give(self, names: Sequence[str], *spans: Span) -> None:
        for name in names:
            self.own.setdefault(name, []).extend(spans)

    def _define(self, names: Sequence[str], span: Span) -> None:
        self._give(names, span)
        self.group = frozenset(names)
        self.grouped = self.grouped | set(names) if len(names) > 1 else self.grouped - set(names)

    def _read(self, clause: Span, following: Span | None) -> None:
        labels = self._labels_in(clause)
        if labels and self._is_led(clause, labels[0]):
            self._read_led(clause, labels)
            return
        labels = [label for label in labels if self.style.may_follow]
        usable: list[Label] = []
        num_known = len(self.own)
        for label in labels:
            names = tuple(name for item in usable for name in item.names if name not in self.own)
            start = num_known + len(names)
            is_next = label.names == tuple(LETTERS[start : start + len(label.names)])
            is_new_place = self.style.are_places and label.names[0] not in (*self.own, *names)
            if is_next or is_new_place or self._is_known(label) or set(label.names) <= set(names):
                usable.append(label)
        if not usable and self.own and any(is_missing(self.caption, label, self.style.labels) for label in labels):
            pass  # a sentence about a panel that has no text of its own
        elif not usable:
            self._read_without_label(clause)
        elif any(not self._is_known(label) for label in usable):
            self._read_definitions(clause, usable, following)
        else:
            self._read_references(clause, usable)

    def _read_led(self, clause: Span, labels: list[Label]) -> None:
        """Read a clause that starts with a label."""
        first = labels[0]
        if not self._is_new(first) and not self._is_known(first):
            raise _Refused
        self._give_pending()
        segments = [(first, first.end)]
        for label in labels[1:]:
            previous, following = self.caption[clause[0] : label.start], self.caption[label.end : clause[1]]
            pending = [name for item, _ in segments for name in item.names if name not in self.own]
            start = len(self.own) + len(pending)
            is_next = label.names == tuple(LETTERS[start : start + len(label.names)])
            is_next |= self.style.are_places and label.names[0] not in (*self.own, *pending)
            is_next |= set(label.names) <= self.grouped and label.names != first.names
            opens = OPENS.search(previous) or re.match(r"\s*[A-Z]", following)
            if is_next and opens and not CONTINUES.match(following):
                segments.append((label, label.end))
                if self.style.may_follow and not OPENS.search(previous) and not STARTS.match(following):
                    # The words before the label may belong to it.
                    self.doubtful |= {*segments[-2][0].names, *label.names}
                if len(first.names) > 1 and len(segments) == 2 and set(labels[1].names) <= set(first.names):
                    # "(A, B) Sizes of (A) cells, (B) nuclei, (C) nucleoli": the words of the group may belong to C.
                    self.doubtful |= set(label.names)
        texts = [(start, following.start) for (_, start), (following, _) in itertools.pairwise(segments)]
        if has_shared_end(self.caption, [*texts, (segments[-1][1], clause[1])]):
            self.doubtful |= {name for label, _ in segments[:-1] for name in label.names}
        for index, (label, start) in enumerate(segments):
            end = segments[index + 1][0].start if index + 1 < len(segments) else clause[1]
            is_defining = not self._is_known(label)
            inner = [item for item in labels if start <= item.start < end and item is not label]
            inner = [item for item in inner if set(item.names) <= set(label.names)]
            self.current = label.names
            if len(label.names) > 1 and inner:
                self._read_group((start, end), inner, label.names, is_defining)
            elif is_defining:
                self._define(label.names, (start, end))
            else:
                self._give(label.names, (start, end))
        self.follows, self.at_end = False, False

    def _read_group(self, span: Span, labels: list[Label], group: tuple[str, ...], is_defining: bool) -> None:
        """Read the text of several panels with labels of single ones: "(A, B) views from above (A) and below (B)"."""
        if is_defining:
            self._define(group, (span[0], span[0]))
        names = [name for label in labels for name in label.names]
        if len(set(names)) < len(names) or (len(labels) == 1 and is_defining and labels[0].start > span[0] + 3):
            single = len(labels) == 1 and not CONTINUES.match(self.caption[labels[0].end : span[1]])
            if not single:
                self._give(group, span)
                self.doubtful |= set(group)
                return
        self.group = frozenset()
        listed = divide_list(self.caption, span, labels)
        if listed.follows and is_defining:
            self._give(group, span)
            self.doubtful |= set(group)
            return
        self._give(group, listed.head)
        for label, own in zip(labels, listed.spans, strict=True):
            self._give(label.names, own)
            self.grouped -= set(label.names)
        self._give(names, listed.tail)
        self.doubtful |= set(group) if not listed.is_certain else set()
        self.doubtful |= set(group) - set(labels[-1].names) if listed.is_end_shared else set()
        if not listed.follows:
            self.current = labels[-1].names

    def _read_without_label(self, clause: Span) -> None:
        if not self.own:
            self.head.append(clause)
        elif self.follows:
            self.pending.append(clause)
        else:
            self._give(self.current, clause)
            # "(A, B) Sizes. (A) Cells. (B) Nuclei. Of three mice." The last sentence may belong to the group.
            self.doubtful |= self.group - set(self.current) if self.group > set(self.current) else set()

    def _read_references(self, clause: Span, labels: list[Label]) -> None:
        """Read a clause that names only panels that are known, and doesn't start with a label."""
        names = {name for label in labels for name in label.names}
        if names == set(self.own) and len(names) > 1 and len(labels) == 1:
            self.tail.append(clause)
        elif len(self.current) > 1 and names <= set(self.current):
            self._read_group(clause, labels, self.current, is_defining=False)
        elif self.follows:
            self._give_pending()
            self._read_more(clause, labels)
        elif is_for_named(self.caption, clause, labels) or names > set(self.current):
            self._give(sorted(names), clause)
        elif names & set(self.current) or all(refers(self.caption, label) for label in labels):
            self._give(self.current, clause)

    def _give_pending(self, names: Sequence[str] = ()) -> None:
        """Give the sentences after a label that stands after its text to its panel. They may belong to the next one."""
        self._give(self.current, *self.pending)
        is_clear = any(refers_to(self.caption[slice(*span)], self.current) for span in self.pending)
        if self.at_end and self.pending and not is_clear:
            self.doubtful |= {*self.current, *names}
        self.pending = []

    def _read_more(self, clause: Span, labels: list[Label]) -> None:
        """Read a clause on panels whose labels stood after their texts: "(a) shows X and (b) Y"."""
        for label, (start, end) in zip(labels, divide_after(self.caption, clause, labels), strict=False):
            self._give(label.names, (start, end))
            if not re.search(r"[^\W_]", self.caption[label.end : end]):
                self.doubtful |= set(label.names)

    def _read_definitions(self, clause: Span, labels: list[Label], following: Span | None) -> None:
        """Read a clause with labels of new panels that doesn't start with a label."""
        labels = [label for label in labels if not self._is_known(label)] if len(labels) > 1 else labels
        names = [name for label in labels for name in label.names]
        if len(set(names)) < len(names):
            # A label that comes again in its own clause refers to its panel.
            labels = [label for i, label in enumerate(labels) if not any(label.names == x.names for x in labels[:i])]
            names = [name for label in labels for name in label.names]
            if len(set(names)) < len(names):
                raise _Refused
            if len(labels) > 1:
                self.doubtful |= set(names)
        text_after = self.caption[labels[0].end : clause[1]]
        if len(labels) == 1:
            following_labels = self._labels_in(following) if following else []
            is_led = bool(following and following_labels and self._is_led(following, following_labels[0]))
            if is_led and not self.own and not CONTINUES.match(text_after):
                before = self.caption[clause[0] : labels[0].start]
                if not (OPENS.search(before) or INTRODUCES.search(before)):
                    self.doubtful |= set(labels[0].names)
                self.head.append((clause[0], labels[0].start))
                self._define(labels[0].names, (labels[0].end, clause[1]))
                self.current, self.follows = labels[0].names, False
                return
            if self.own and not self.follows and STARTS.match(text_after):
                # "... in mice (B) Cells": without a full stop, the words before the label belong to the panel before.
                self._give(self.current, (clause[0], labels[0].start))
                self._define(labels[0].names, (labels[0].end, clause[1]))
                self.current = labels[0].names
                return
            at_end = ends_clause(self.caption, labels[0], clause)
            self._give_pending(labels[0].names)
            self._define(labels[0].names, (clause[0], labels[0].start))
            self._give(labels[0].names, (labels[0].end, clause[1]))
            self.current, self.follows, self.at_end = labels[0].names, True, at_end
            return
        listed = divide_list(self.caption, clause, labels)
        at_end = ends_clause(self.caption, labels[-1], clause)
        self._give_pending(names)
        for label, own in zip(labels, listed.spans, strict=True):
            self._define(label.names, own)
        if listed.head[0] < listed.head[1]:
            if len(names) == len(self.own):
                self.head.append(listed.head)
            else:
                self._give(names, listed.head)
        self._give(names, listed.tail)
        self.doubtful |= set(names) if not listed.is_certain else set()
        self.doubtful |= set(names) - set(labels[-1].names) if listed.is_end_shared else set()
        self.current = labels[-1].names
        self.follows, self.at_end = listed.follows, listed.follows

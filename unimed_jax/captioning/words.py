"""Where a text mentions a term, and whether it denies it.

Terms match whole words, singular or plural, with hyphens as spaces and British spelling as American. Denial follows
NegEx (Chapman et al. 2001, doi:10.1006/jbin.2001.1029): a cue a few words before the term, or after it, with nothing
that ends its reach in between. It is a filter for generated sentences, which can be asked for again, so it rather
refuses too much.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?|[.;:!?,]")
# British spelling, letter for letter where words differ.
_SPELLING = (
    ("aemi", "emi"),
    ("haem", "hem"),
    ("oede", "ede"),
    ("oeso", "eso"),
    ("tumour", "tumor"),
    ("fibre", "fiber"),
)
_STOPS = frozenset(".;:!?")  # a comma does not end a list of what is not there
_END = _STOPS | {
    "but",
    "however",
    "although",
    "though",
    "yet",
    "except",
    "with",
    "showing",
    "shows",
    "demonstrating",
}
_BEFORE = (
    "no", "not", "non", "none", "never", "neither", "nor", "nothing", "without", "absent", "absence of", "lack of",
    "lacks", "lacking", "free of", "free from", "clear of", "devoid of", "negative for", "denies", "fails to",
    "excluding", "excludes", "excluded", "rule out", "rules out", "ruled out", "ruling out", "isn't", "doesn't",
    "cannot", "unlikely", "resolved", "instead of", "rather than", "other than",
)  # fmt: skip
_AFTER = (
    "absent", "is absent", "are absent", "is not", "are not", "was not", "were not", "isn't", "cannot", "not seen",
    "not present", "not visible", "not identified", "ruled out", "excluded", "unlikely", "resolved", "has resolved",
    "free",
)  # fmt: skip
_CUES_BEFORE, _CUES_AFTER = ([tuple(cue.split()) for cue in cues] for cues in (_BEFORE, _AFTER))
_REACH = 6  # words between a cue and the term
_REACH_AFTER = 2


class Span(NamedTuple):
    """Words [start, end) of a text."""

    start: int
    end: int


def words(text: str) -> list[str]:
    """Folded words and punctuation marks of a text.

    Example:
        >>> words("Pulmonary Oedema, left-sided.")
        ['pulmonary', 'edema', ',', 'left', 'sided', '.']
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    for british, american in _SPELLING:
        folded = folded.replace(british, american)
    return _WORD.findall(folded)


@functools.lru_cache(maxsize=4096)
def normalised(text: str) -> str:
    """What two texts share that say the same in the same words: no case, no punctuation, one spelling.

    Example:
        >>> normalised("A chest X-ray, with oedema.") == normalised("a chest x ray with edema")
        True
    """
    return " ".join(w for w in words(text) if w[0].isalnum())


def spans(text: Sequence[str], terms: Iterable[str]) -> list[Span]:
    """Where any of the terms stands in a text of `words`, the longest first at each place.

    Example:
        >>> spans(words("two lung masses"), ["mass", "lung mass"])
        [Span(start=1, end=3), Span(start=2, end=3)]
    """
    lexicon, found = _lexicon(tuple(terms)), set()
    stems = [_singular(w) for w in text]
    for i, stem in enumerate(stems):
        for term in lexicon.get(stem, ()):
            if tuple(stems[i : i + len(term)]) == term:
                found.add(Span(i, i + len(term)))
    return sorted(found, key=lambda s: (s.start, -s.end))


@functools.lru_cache(maxsize=512)
def _lexicon(terms: tuple[str, ...]) -> dict[str, list[tuple[str, ...]]]:
    """Terms in singular by their first word, so that a text is compared with those alone that may stand there."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for term in terms:
        if stems := tuple(_singular(w) for w in normalised(term).split()):
            found.setdefault(stems[0], []).append(stems)
    return found


@functools.lru_cache(maxsize=65536)
def _singular(word: str) -> str:
    for plural, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("ses", "sis")):
        if word.endswith(plural) and len(word) > len(plural) + 1:
            return word[: -len(plural)] + singular
    return (
        word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3 else word
    )


def denied(text: Sequence[str], span: Span) -> bool:
    """Whether a cue before or after denies what stands at a span.

    Example:
        >>> text = words("no sign of pneumonia, but an effusion")
        >>> denied(text, Span(3, 4)), denied(text, Span(7, 8))
        (True, False)
    """
    before = list(text[max(0, span.start - _REACH) : span.start])
    for i in range(len(before) - 1, -1, -1):
        if before[i] in _END:
            before = before[i + 1 :]
            break
    if _holds(before, _CUES_BEFORE):
        return True
    after: list[str] = []
    for word in text[span.end : span.end + _REACH_AFTER + 2]:
        if word in _END or word == ",":
            break
        after.append(word)
    return any(tuple(after[i : i + len(cue)]) == cue for cue in _CUES_AFTER for i in range(_REACH_AFTER + 1))


def _holds(text: Sequence[str], cues: Iterable[tuple[str, ...]]) -> bool:
    return any(tuple(text[i : i + len(c)]) == c for c in cues for i in range(len(text) - len(c) + 1))


def inside(span: Span, others: Iterable[Span]) -> bool:
    """Whether a span lies within one of the others."""
    return any(o.start <= span.start and span.end <= o.end for o in others)

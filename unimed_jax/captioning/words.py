"""Where a text mentions a term, and whether it denies or doubts it.

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
    "but", "however", "although", "though", "yet", "except", "with", "showing", "shows", "demonstrating", "because",
}  # fmt: skip
# What goes on where it seems to end: "not consistent with pneumonia".
_WITH = {"consistent", "inconsistent", "compatible", "incompatible", "keeping", "concordant", "line"}
# After a comma these begin a new thought: "without volume loss, typical of pneumonia".
_ANEW = {
    "typical", "characteristic", "consistent", "compatible", "suggestive", "suggesting", "indicating", "indicative",
    "representing", "in", "due",
}  # fmt: skip
_DENIALS = (
    "no", "none", "never", "neither", "nor", "nothing", "nowhere", "absence of", "lack of", "lacks", "lacking",
    "free of", "free from", "clear of", "devoid of", "negative for", "denies", "excluding", "excludes", "excluded",
    "rule out", "rules out", "ruled out", "ruling out", "unlikely", "resolved", "instead of", "rather than",
    "other than", "against", "little to", "inconsistent", "incompatible", "far from", "wrong to",
)  # fmt: skip
# These deny a part of a sentence, up to its verb: "an opacity that is not sharp suggests pneumonia".
_PARTIAL = ("not", "non", "without", "isn't", "doesn't", "cannot", "fails to")
_VERBS = {"suggests", "indicates", "represents", "reflects", "means", "proves"}
# What is doubtful, past, or only looks like it; nearer to the term than a denial.
_DOUBTS = (
    "absent", "possible", "possibly", "suspected", "questionable", "doubtful", "unlike", "mimic", "mimics", "mimicking",
    "imitates", "imitating", "history of", "previous", "former", "cleared", "versus", "vs",
)  # fmt: skip
_SEEN = (
    "seen", "present", "visible", "identified", "found", "evident", "apparent", "demonstrated", "detected", "noted",
    "shown", "depicted", "there", "confirmed", "observed", "recognised", "recognized", "appreciated", "suspected",
)  # fmt: skip
_AFTER = (
    *(f"not {seen}" for seen in _SEEN), "not be", "not been", "is absent", "are absent", "absent", "lacking", "isn't",
    "cannot", "never", "nowhere", "none", "no longer", "ruled out", "excluded", "unlikely", "resolved", "free",
    "cleared", "gone", "questionable", "doubtful", "suspected", "possible", "versus", "vs",
)  # fmt: skip
_DENIAL_CUES, _PARTIAL_CUES, _DOUBT_CUES, _AFTER_CUES = (
    [tuple(cue.split()) for cue in cues] for cues in (_DENIALS, _PARTIAL, _DOUBTS, _AFTER)
)
REACH = 6  # words between a denial and the term
_REACH_OF_DOUBT = 3
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


def denied(text: Sequence[str], span: Span, reach: int = REACH) -> bool:
    """Whether a cue before or after denies what stands at a span, or doubts it.

    Args:
        text: of `words`.
        span: of the term.
        reach: words before the term in which a denial counts.

    Example:
        >>> text = words("no sign of pneumonia, but an effusion")
        >>> denied(text, Span(3, 4)), denied(text, Span(7, 8))
        (True, False)
    """
    before = text[max(_clause(text, span.start), span.start - reach) : span.start]
    said = next((i for i in range(len(before), 0, -1) if before[i - 1] in _VERBS), 0)
    if (
        _holds(before, _DENIAL_CUES)
        or _holds(before[said:], _PARTIAL_CUES)
        or _holds(before[-_REACH_OF_DOUBT:], _DOUBT_CUES)
    ):
        return True
    after: list[str] = []
    for word in text[span.end : span.end + _REACH_AFTER + 2]:
        if word in _END or word == ",":
            break
        after.append(word)
    return any(tuple(after[i : i + len(cue)]) == cue for cue in _AFTER_CUES for i in range(_REACH_AFTER + 1))


def _clause(text: Sequence[str], end: int) -> int:
    """Where the clause begins that goes on until `end`."""
    for i in range(end - 1, -1, -1):
        before = text[i - 1] if i else ""
        if text[i] in _END and not (text[i] == "with" and before in _WITH):
            return i + 1
        if text[i] in _ANEW and before == ",":
            return i
    return 0


def _holds(text: Sequence[str], cues: Iterable[tuple[str, ...]]) -> bool:
    return any(tuple(text[i : i + len(c)]) == c for c in cues for i in range(len(text) - len(c) + 1))


def inside(span: Span, others: Iterable[Span]) -> bool:
    """Whether a span lies within one of the others."""
    return any(o.start <= span.start and span.end <= o.end for o in others)

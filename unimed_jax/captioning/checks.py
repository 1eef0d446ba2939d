"""What makes a generated caption fit for training: each rule is a name and a reason to ask again."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from unimed_jax.captioning import words
from unimed_jax.data import markers, validate
from unimed_jax.data.label_captions import Key, Triplet
from unimed_jax.data.record import Caption
from unimed_jax.data.sources import modality
from unimed_jax.evaluate import tasks

# Findings that say that there is none; these words say it, and contradict every other finding.
NORMAL = (
    "normal",
    "healthy",
    "unremarkable",
    "no abnormality",
    "no abnormalities",
    "no finding",
    "no disease",
)
_NO_MATTER = frozenset({"tissue", "mucosa", "study", "image", "scan", "appearance", "exam", "examination"})
# Words that begin so say, beside "normal", that something differs from it.
_DIFFERS = ("than", "replac", "distort", "effac", "disrupt", "displac", "destroy", "loss", "lose", "lost")
_REACH_IN_NORMAL = 3  # words: "no effusion in this normal knee" denies the effusion
_ABNORMAL = ("abnormal", "abnormality", "pathologic", "pathological", "diseased")

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
# What says something about one patient or one picture, which no label can know.
_PERSONAL = {
    "age": r"\b\d{1,3}[- ]?(?:years?|yrs?|months?|weeks?|days?)\b|\b\d{1,3}[- ]?y/?o\b"
    r"|\bage[ds]?:? ?\d|\b(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:[- ]\w+)?[- ]years?[- ]old\b"
    r"|\b(?:neonate|newborn|baby|infant|toddler|child|adolescent|teenager|elderly|\w+genarian)s?\b",
    "date": r"\b\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}\b|\b(?:19|20)\d{2}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)? (?:of )?{_MONTH}(?!\w)|\b{_MONTH} \d{{1,2}}\b"
    r"|\b(?:sun|mon|tues|wednes|thurs|fri|satur)day\b",
    # Capital "MR" is a modality and "DR" a disease.
    "name": r"(?-i:\b(?:Mr|Mrs|Ms|Miss|Mister|Dr|Doctor|Prof|Professor|Herr|Frau|Mme|Sra?)\b\.? [A-Z]"
    r"|\b(?:mr|mrs|ms|dr|prof)\. [a-z])|\bpatient(?:'s)? name",
    "id": r"\b(?:mrn|accession|ssn|dob|patient id|record number|case (?:no|number))\b|\d{5,}"
    r"|\b\d{3}-\d{2}-\d{4}\b|\b(?:patient|case|study|subject)[ #:]*\d",
    "contact": r"[\w.+-]+@[\w-]+\.\w|https?:|\bwww\.",
    "side": r"\b(?:left|right)\b(?![ -](?:ventric|atri|heart))",
    "sex": r"\b(?:gentle)?(?:wo)?m[ae]n\b|\b(?:fe)?males?\b|\b(?:boy|girl|lady|ladie)s?\b",
    "size": r"\b\d+(?:[.,]\d+)? ?(?:mm|cm|ml|cc|hu|mg|kg)\b",
}
# Frequent words of German, French, Spanish and Italian that are none in English; one may be part of a name.
_NOT_ENGLISH = {
    "der", "das", "und", "mit", "ist", "ein", "eine", "einer", "im", "den", "dem", "von", "zu", "auf", "les", "des",
    "une", "avec", "dans", "sur", "est", "du", "au", "el", "los", "una", "por", "para", "y", "il", "lo", "gli", "della",
}  # fmt: skip
_META = (
    r"\b(?:as an ai|language model|i (?:cannot|can't|am|will|apologi[sz]e)|i'm|sorry,|here (?:are|is)|sure[,!]"
    r"|captions?\b[ #]*\d|ignore (?:all|any|the|previous|above|prior)|(?:previous|above) instructions?|system prompt"
    r"|json|your request)\b|```|[<>{}]|^\W*\d+[.):]|\\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Limits of a caption."""

    min_words: int = 4
    max_words: int = 60
    max_tokens: int = 0  # special tokens included; 0 = not counted
    count: Callable[[str], int] | None = None  # tokens of a text

    def json(self) -> dict[str, int]:
        """For the file of captions."""
        return {"min_words": self.min_words, "max_words": self.max_words, "max_tokens": self.max_tokens}


@dataclass(slots=True)
class Checker:
    """Judges captions of one table of labels; remembers the accepted ones, since each text may occur once.

    Args:
        triplets: the whole table, for findings that a caption of another label must not name.
        rules: limits.
    """

    triplets: Sequence[Triplet]
    rules: Rules = field(default_factory=Rules)
    _taken: dict[str, str] = field(default_factory=dict)
    _others: dict[Key, tuple[str, ...]] = field(default_factory=dict)

    def fault(self, text: str, triplet: Triplet) -> tuple[str, str] | None:
        """The rule that a caption breaks and one line of detail, or None.

        Example:
            >>> film = Triplet(modality="X-ray", anatomy="chest", finding="pneumonia")
            >>> Checker([film]).fault("A chest film without pneumonia.", film)
            ('contradiction', "it denies 'pneumonia'")
        """
        for rule in (_form, _length, _meta, _personal, self._content, self._repeats):
            if found := rule(text, triplet, self.rules):
                return found
        return None

    def take(self, text: str, triplet: Triplet) -> tuple[str, str] | None:
        """Like `fault`; a caption without one is remembered."""
        found = self.fault(text, triplet)
        if found is None:
            self._taken[words.normalised(text)] = triplet.name
        return found

    def _content(self, text: str, triplet: Triplet, _: Rules) -> tuple[str, str] | None:
        found = words.words(text)
        normal, own = is_normal(triplet), terms(triplet)
        mentions = words.spans(found, own)
        if not mentions:
            return "finding_missing", f"it does not mention {triplet.finding!r}" + (
                " or a synonym" if triplet.synonyms else ""
            )
        reach = _REACH_IN_NORMAL if normal else words.REACH
        for span in mentions:
            # What is itself a denial is not denied by others before it: "nothing abnormal, no finding".
            if found[span.start] != "no" and words.denied(found, span, reach):
                return "contradiction", f"it denies {_quote(found, span)}"
        for span in words.spans(found, _ABNORMAL if normal else NORMAL):
            fine = words.denied(found, span) if normal else _compared(found, span)
            if not fine and not words.inside(span, mentions):
                return "contradiction", f"it says {_quote(found, span)}"
        fine = {triplet.modality, *modality.every(" ; ".join((triplet.anatomy, *own)))}
        if named := [m for m in modality.every(text) if m not in fine]:
            return "contradiction", f"it names {named[0]}"
        for span in words.spans(found, self._terms_of_others(triplet)):
            # A picture without findings has none of the others, so that may be said.
            if not words.inside(span, mentions) and not (normal and words.denied(found, span)):
                return "second_finding", f"it names {_quote(found, span)}"
        return None

    def _terms_of_others(self, triplet: Triplet) -> tuple[str, ...]:
        """What other findings of the same anatomy are called; what is a name of this one, too, is left out."""
        if triplet.key not in self._others:
            own = set(map(words.normalised, terms(triplet)))
            others = [
                t
                for t in self.triplets
                if t.key[1] == triplet.key[1] and t.key[2] != triplet.key[2] and not is_normal(t)
            ]
            self._others[triplet.key] = tuple(
                name for t in others for name in terms(t) if words.normalised(name) not in own
            )
        return self._others[triplet.key]

    def _repeats(self, text: str, triplet: Triplet, _: Rules) -> tuple[str, str] | None:
        same = words.normalised(text)
        if same in evaluation_prompts():
            return "evaluation_prompt", "it is a prompt of the evaluation"
        if (taken := self._taken.get(same)) is not None:
            return "repeated", "it was there before" + ("" if taken == triplet.name else f", for {taken}")
        return None


def is_normal(triplet: Triplet) -> bool:
    """Whether a label says that there is no finding.

    Example:
        >>> is_normal(Triplet(modality="Fundus", anatomy="retina", finding="normal retina"))
        True
    """
    said, where = (words.normalised(x).split() for x in (triplet.finding, triplet.anatomy))
    if said[:1] in (["normal"], ["healthy"]):
        return "pressure" not in said  # normal pressure hydrocephalus
    rest = " ".join(w for w in said if w not in where and w not in _NO_MATTER)
    return rest in map(words.normalised, (*NORMAL, "no findings"))


def terms(triplet: Triplet) -> tuple[str, ...]:
    """What mentions a label's finding: itself, its synonyms and, of a picture without finding, the words for that."""
    return (triplet.finding, *triplet.synonyms, *(NORMAL if is_normal(triplet) else ()))


def _compared(text: Sequence[str], span: words.Span) -> bool:
    """Whether "normal" says what is not there: "larger than normal", "replaces the normal tissue"."""
    near = [*text[max(0, span.start - 3) : span.start], *text[span.end : span.end + 4]]
    return any(word.startswith(_DIFFERS) for word in near)


def _quote(text: Sequence[str], span: words.Span) -> str:
    return repr(" ".join(text[span.start : span.end]))


def _form(text: str, _: Triplet, __: Rules) -> tuple[str, str] | None:
    if fault := validate.caption_fault(Caption(text=text, kind="llm")):
        return "text", fault[1]
    if not text.isprintable():
        return "text", "it has line breaks or invisible characters"
    if text[:1].isspace() or not (text[:1].isalnum() or text[:1] in "\"'“‘("):
        return "text", "it begins with no letter or digit"
    if "?" in text:
        return "text", "it asks"
    if markers.find(text, "") or markers.is_placeholder(text):
        return "text", "it holds a marker or stands for nothing"
    foreign = [c for c in text if c.isalpha() and not unicodedata.name(c, "").startswith(("LATIN", "GREEK"))]
    if foreign:
        return "language", f"it has letters such as {foreign[0]!r}"
    others = sorted(_NOT_ENGLISH.intersection(words.words(text)))
    return ("language", f"it has words such as {others[0]!r}") if len(others) > 1 else None


def _length(text: str, _: Triplet, rules: Rules) -> tuple[str, str] | None:
    n = len(text.split())
    if not rules.min_words <= n <= rules.max_words:
        return "length", f"{n} words, not {rules.min_words} to {rules.max_words}"
    if (different := len(set(words.normalised(text).split()))) < min(rules.min_words, n):
        return "length", f"{different} different words, not {rules.min_words}"
    if rules.count and rules.max_tokens and (n := rules.count(text)) > rules.max_tokens:
        return "length", f"{n} tokens, more than {rules.max_tokens}"
    return None


def _meta(text: str, _: Triplet, __: Rules) -> tuple[str, str] | None:
    found = re.search(_META, text, re.IGNORECASE)
    return ("meta", "it talks about the request, or is markup") if found else None


def _personal(text: str, triplet: Triplet, _: Rules) -> tuple[str, str] | None:
    for term in (*terms(triplet), triplet.anatomy):  # "female pelvis" is the label's own word
        text = re.sub(rf"(?<!\w){re.escape(term)}(?!\w)", "", text, flags=re.IGNORECASE)
    for what, pattern in _PERSONAL.items():
        if re.search(pattern, text, re.IGNORECASE):
            return "patient", f"it holds what looks like the {what} of one patient"
    return None


@functools.cache
def evaluation_prompts() -> frozenset[str]:
    """All texts of this package's evaluation prompts, normalised: none of them may be trained on."""
    found: set[str] = set()
    for file in sorted(tasks.FOLDER.rglob("*.json")):
        task = json.loads(file.read_text(encoding="utf-8"))
        found.update(_texts([task.get("classes"), task.get("findings")]))
    return frozenset(found)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield words.normalised(value)
    elif isinstance(value, (list, dict)):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _texts(x)

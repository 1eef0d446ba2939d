"""What the language model is asked, and how its answer is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from unimed_jax.data.label_captions import Triplet

VERSION = 1
_SYSTEM = """\
You write captions for a collection of medical pictures that an image and text model is trained on. Every caption must \
be true for any picture that carries the label, so you know nothing but the label: no patient, no second disease, no \
side of the body, no measurements, no history, no treatment. Use the words of a radiologist, pathologist or \
ophthalmologist as the modality asks for. Answer with JSON only."""

_TASK = """\
Label
  modality: {modality}
  anatomy: {anatomy}
  finding: {finding}
{synonyms}
Write {n} different captions for pictures with this label. Rules:
- each is one sentence of {min_words} to {max_words} words in English, on one line;
- each names the finding, word for word as above or by another of its names, as present, never as absent or doubtful;
- each describes what the finding looks like in this modality, where that is the same in all such pictures;
- vary the beginning, the length and the details; name the modality in some of them and leave it out in others;
- never mention age, sex, dates, names, numbers of a case, sizes, sides, other diseases or another modality.
{taken}{faults}
Form of the answer: {{"captions": ["...", "..."]}} with exactly {n} texts."""

_ADVICE = {
    "finding_missing": "some did not name the finding in the words given",
    "contradiction": "some denied the finding or doubted it, called the picture normal, or named another modality",
    "second_finding": "some named another disease",
    "patient": "some held facts about one patient, such as age, sex, side, date or size",
    "length": "some were too short or too long",
    "repeated": "some repeated earlier captions",
    "evaluation_prompt": "some were phrases that are too common",
    "meta": "some talked about the request or had numbering or markup",
    "language": "some were not in English",
    "text": "some were no plain one-line text",
}
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
MAX_REPLY_CHARS = 200_000


def messages(
    triplet: Triplet,
    n: int,
    *,
    min_words: int,
    max_words: int,
    taken: Sequence[str] = (),
    faults: Sequence[str] = (),
) -> list[dict[str, str]]:
    """The chat messages that ask for n captions of a label.

    Args:
        triplet: the label.
        n: captions wanted.
        min_words: of a caption.
        max_words: of a caption.
        taken: captions that are there already.
        faults: rules that earlier answers broke.
    """
    lines = lambda title, texts: title + "\n" + "".join(f"- {t}\n" for t in texts) if texts else ""
    task = _TASK.format(
        modality=triplet.modality,
        anatomy=triplet.anatomy,
        finding=triplet.finding,
        synonyms=f"  other names: {'; '.join(triplet.synonyms)}\n" if triplet.synonyms else "",
        n=n,
        min_words=min_words,
        max_words=max_words,
        taken=lines("These exist; write others:", taken),
        faults=lines("Earlier answers were refused:", [_ADVICE[f] for f in faults if f in _ADVICE]),
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": task}]


def digest() -> str:
    """SHA-256 of the prompt's wording."""
    return hashlib.sha256(json.dumps([_SYSTEM, _TASK, _ADVICE], sort_keys=True).encode()).hexdigest()


def response_formats() -> tuple[dict[str, Any] | None, ...]:
    """Ways to ask for JSON, the strictest first; servers that know none of them are asked in words alone."""
    texts = {"type": "array", "items": {"type": "string"}}
    schema = {
        "type": "object",
        "properties": {"captions": texts},
        "required": ["captions"],
        "additionalProperties": False,
    }
    strict = {"name": "captions", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": strict}, {"type": "json_object"}, None


def parse(content: str) -> list[str] | None:
    r"""The captions in an answer, stripped; None where it is no JSON object or list with texts.

    Example:
        >>> parse('```json\n{"captions": ["a", "b "]}\n```'), parse("Sorry.")
        (['a', 'b'], None)
    """
    text = _THOUGHT.sub("", content)
    starts = [i for i in (text.find("{"), text.find("[")) if i >= 0]
    end = max(text.rfind("}"), text.rfind("]")) + 1
    if not starts or not end:
        return None
    try:
        value = json.loads(text[min(starts) : end])
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        value = value.get("captions")
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        return None
    return [x.strip() for x in value]

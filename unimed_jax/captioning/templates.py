"""Captions without any language model: sentences that a label's words are put into, each marked as a template.

They say what the label says and nothing else; their kind is `template`, so that a caption policy can tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unimed_jax.captioning import checks
from unimed_jax.data.label_captions import Label, LabelCaptions, Triplet

VERSION = 1
# How a picture of each modality is called.
_PICTURES = {
    "X-ray": ("X-ray image", "radiograph"),
    "CT": ("CT image", "computed tomography slice"),
    "MRI": ("MRI image", "magnetic resonance slice"),
    "Ultrasound": ("ultrasound image", "sonographic image"),
    "Histopathology": ("histopathology image", "photomicrograph"),
    "Fundus": ("fundus image", "fundus photograph"),
}
_SENTENCES = (
    "{picture} of the {anatomy}, finding: {finding}.",
    "This {picture} of the {anatomy} was labelled {finding}.",
    "{anatomy}, {other}: {finding}.",
    "Label of this {other} of the {anatomy}: {finding}.",
    "The finding in this {picture} of the {anatomy} is {finding}.",
    "A {other} from a collection of {anatomy} pictures, category {finding}.",
    "{finding}, as recorded for this {picture} of the {anatomy}.",
    "{anatomy} {picture} in the category {finding}.",
    "An example of {finding} in the {anatomy}, taken from {modality} data.",
    "{finding} is the label given to this {anatomy} {other}.",
    "{modality} of the {anatomy} with the label {finding}.",
    "Picture of the {anatomy} acquired by {modality}; it is filed under {finding}.",
    "Category {finding}: {other} of the {anatomy}.",
    "What was annotated in this {anatomy} {picture} is {finding}.",
    "One {picture} out of the group {finding}, region {anatomy}.",
    "Annotation of the {anatomy} {other}: {finding}.",
)


def run(triplets: Sequence[Triplet], k: int, rules: checks.Rules) -> LabelCaptions:
    """K captions for each label, of sentences and then of the synonyms; judged by the rules of generated ones.

    Args:
        triplets: the table of labels.
        k: captions of each.
        rules: limits.

    Example:
        >>> film = Triplet(modality="X-ray", anatomy="chest", finding="pneumonia")
        >>> run([film], 1, checks.Rules()).labels[0].captions
        [{'text': 'X-ray image of the chest, finding: pneumonia.', 'kind': 'template'}]
    """
    checker = checks.Checker(triplets, rules)
    labels = [_label(t, k, checker) for t in triplets]
    generator = {
        "kind": "template",
        "templates_version": VERSION,
        "captions_per_label": k,
        "rules": rules.json(),
    }
    return LabelCaptions(labels=labels, generator=generator)


def _label(triplet: Triplet, k: int, checker: checks.Checker) -> Label:
    captions: list[dict[str, Any]] = []
    rejected: dict[str, int] = {}
    details: dict[str, str] = {}
    picture, other = _PICTURES[triplet.modality]
    for name in (triplet.finding, *triplet.synonyms):
        for sentence in _SENTENCES:
            if len(captions) == k:
                break
            text = sentence.format(
                picture=picture,
                other=other,
                modality=triplet.modality,
                anatomy=triplet.anatomy,
                finding=name,
            )
            text = text[:1].upper() + text[1:]
            if fault := checker.take(text, triplet):
                rejected[fault[0]] = rejected.get(fault[0], 0) + 1
                details[fault[0]] = fault[1]
            else:
                captions.append({"text": text, "kind": "template"})
    more: dict[str, Any] = {}
    if missing := k - len(captions):
        more = {"rejected": rejected, "missing": missing, "details": details}
    return Label(triplet=triplet, captions=captions, more=more)

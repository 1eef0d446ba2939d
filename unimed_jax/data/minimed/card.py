"""The data card of `minimed`: what is in it, from where, under which terms, and what it must not be used for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unimed_jax.config import MODALITIES
from unimed_jax.data.minimed.packages import IMAGES
from unimed_jax.errors import DataError

if TYPE_CHECKING:
    from unimed_jax.data.minimed.source import Minimed

SUMMARY = """\
Real medical images of six modalities, taken at run time from files that ordinary Python packages ship as samples and
tests. None is stored in this repository, and no package is installed or run to get them.
It is a small, honest demonstration set: many slices, few people. No number on it is a clinical claim."""

CAVEATS = """\
- The split is by subject. Slices of one volume are near copies of each other, so a random split leaks; the option
  `split="random"` exists only to show by how much.
- The holdout is of subjects from packages added when everything was final (and one file of pydicom-data that no part
  had used), its list fixed by looking at the pictures and not at scores; at most 12 evenly spaced slices of a plane and
  window. It has one radiograph only: no package with more was found. Ten of its twelve ultrasound pictures are frames
  of one clip, and half of its CT slices are of one person. Every STARE photograph counts as an eye of its own, though
  some may be of one person.
- Two holdout files carry burned-in names, apparently made up; those parts and frames are left out.
- Few subjects stand behind many pictures: intervals must be resampled by subject, never by picture.
- Two MRI volumes (MNI152 and pydeface's mean) are averages of many people, nobody's picture, labelled `average:yes`
  and used for training only. Whether their cohorts overlap is unknown.
- 36 X-ray projections are computed from the chest CT: `simulated` is set, their captions say so, they are for
  training only.
- One radiograph shows a cat (`animal:yes`, tuning only).
- Disease labels have one or two patients each: show them, do not score them.
- Body regions were checked by eye. Three of the sample files name a wrong body part in their DICOM header, so no
  caption is made from that header field.
- Organ names come from machine-made masks of one chest CT.
- Ultrasound frames are cropped to the scan, which removes burned-in text. No header value reaches a record; `patient`
  is a hash of the sample's name.
- CT slices appear in up to two display windows; pictures are reduced to at most 512 pixels a side.
- Fixed display: superior or front up, the patient's right on the left of the picture."""


def describe(source: Minimed) -> str:
    """The card in Markdown; with counts when the packages are in the cache."""
    parts = [SUMMARY]
    try:
        parts.append(_counts(source))
    except DataError:
        parts.append("(Counts appear once the packages are fetched.)")
    parts += ["Packages:\n\n" + packages_table(), "Caveats:\n\n" + CAVEATS]
    return "\n\n".join(parts)


def _counts(source: Minimed) -> str:
    table = source.counts()
    splits = [s for s in ("train", "val", "test", "holdout") if any(s in row for row in table.values())]
    lines = [
        "Pictures (subjects):",
        "",
        "| modality | " + " | ".join(splits) + " |",
        "|---" * (len(splits) + 1) + "|",
    ]
    for modality in MODALITIES:
        cells = ["{} ({})".format(*table[modality].get(s, (0, 0))) for s in splits]
        lines.append(f"| {modality} | " + " | ".join(cells) + " |")
    totals = [sum(row.get(s, (0, 0))[0] for row in table.values()) for s in splits]
    lines.append("| all | " + " | ".join(map(str, totals)) + " |")
    return "\n".join(lines)


def packages_table() -> str:
    """The pinned packages as a Markdown table."""
    lines = ["| package | licence | data | sha256 |", "|---|---|---|---|"]
    lines += [f"| {p.project} {p.version} | {p.licence} | {p.terms} | `{p.sha256[:16]}` |" for p in IMAGES]
    return "\n".join(lines)

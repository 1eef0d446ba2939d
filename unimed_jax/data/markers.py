"""Captions of UniMed's web-dataset tars, taken apart: there all captions of a picture are one text with markers.

How such a text is made (the 13 writers of the UniMed repository): each caption without its outer periods, then "."
and the source's marker, one after the other. RadImageNet keeps the outer periods, so its captions may end in "..".
MIMIC-CXR adds a second marker and then the report, or "noreportpresent". So every marker follows a period or another
marker, and splitting leaves empty parts, which the original training code draws as captions (with 3 captions and no
report in 40 % of the draws). Here the parts become separate captions and what stands for nothing is dropped.

Which text is taken apart:

- of a source that the reference joins with a marker: at each of its own markers, and at no other;
- of a source of UniMed that has one free caption a picture: never, since a marker there is the author's word;
- of any other source: at the first marker of the table, in the reference's order, that follows a period or opens the
  text, as all joined ones do. "grade_dr_3.png" is left alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from unimed_jax import config
from unimed_jax.data.record import Caption

# A caption of only such a word stands for a missing one in published annotation files.
PLACEHOLDERS = frozenset(
    ["", "nan", "none", "null", "na", "n/a", "#n/a", "<na>", "noreportpresent", "nothingpresent"]
)


@dataclass(slots=True, frozen=True, kw_only=True)
class Marker:
    """A text that ends each caption of a joined one.

    Attributes:
        text: the marker.
        source: of UniMed that is joined with it; empty where none was released.
        head: kinds of the first parts.
        kind: of the parts after those.
        later: (number, kind): the parts from this number on are of this kind.
        report: whether text after the last marker is the report.
    """

    text: str
    source: str = ""
    head: tuple[str, ...] = ()
    kind: str = "llm"
    later: tuple[int, str] | None = None
    report: bool = False


# In the order in which the reference looks for them; the first that a text holds is its marker.
MARKERS = (
    Marker(text="_radimagenet_", source="radimagenet"),
    Marker(text="_chexpert_", source="chexpert"),
    Marker(text="_chestxray8_", source="chest_xray8"),
    Marker(text="_openi_", source="openi", head=("original",)),
    # Ten captions and then a sentence made from a template, which the reference never draws.
    Marker(text="_all_retina_merged_", source="retina_part1", later=(10, "template")),
    Marker(text="_dr_"),
    Marker(text="_medicat_", kind="original"),
    Marker(text="_mimiccxr_", source="mimic_cxr", report=True),
)


def find(text: str, source: str = "") -> Marker | None:
    """The marker that joins the captions in a text, None for a text that is one caption.

    Example:
        >>> find("A normal chest._chexpert_Clear lungs._chexpert_").text
        '_chexpert_'
        >>> find("A normal chest._chexpert_", source="pmc_clip") is None
        True
    """
    if "_" not in text:
        return None
    own = [m for m in MARKERS if m.source == source] if source else []
    if own or source in config.UNIMED_SOURCES:
        return next((m for m in own if m.text in text), None)
    return next((m for m in MARKERS if len(_cut(text, m.text)) > 1), None)


def split(text: str, source: str = "") -> list[Caption]:
    """The captions in a text, each with its kind and one final period; a text without a marker is one of them.

    Empty parts and placeholders are dropped (`dropped` counts these).

    Args:
        text: as stored in the tars of UniMed, or any caption.
        source: of the text; see the module's rules.

    Example:
        >>> [(c.text, c.kind) for c in split("Big heart._mimiccxr__mimiccxr_FINDINGS: none", source="mimic_cxr")]
        [('Big heart.', 'llm'), ('FINDINGS: none', 'report')]
    """
    return [c for c in _parts(text, source) if not is_placeholder(c.text)]


def dropped(text: str, source: str = "") -> int:
    """How many placeholders `split` drops from a text; the empty parts that the joining leaves are none.

    Example:
        >>> dropped("Big heart._mimiccxr__mimiccxr_noreportpresent", source="mimic_cxr")
        1
    """
    return sum(is_placeholder(c.text) for c in _parts(text, source) if c.text)


def is_placeholder(text: str) -> bool:
    """Whether a caption says nothing: no words, or only one that stands for a missing caption."""
    return text.strip(" .\t\r\n").lower() in PLACEHOLDERS


def tally(captions: Iterable[Caption], source: str = "") -> Counter[str]:
    """Counts what is done to captions: joined texts that are taken apart, and placeholders that are dropped.

    Example:
        >>> tally([Caption(text="A heart._dr_An eye._dr_"), Caption(text="nan")])
        Counter({'joined captions': 1, 'placeholder captions': 1})
    """
    counts: Counter[str] = Counter()
    for caption in captions:
        counts["joined captions"] += find(caption.text, source) is not None
        counts["placeholder captions"] += dropped(caption.text, source)
    return +counts


def _parts(text: str, source: str) -> list[Caption]:
    marker = find(text, source)
    if marker is None:
        return [Caption(text=text)]
    cut = str.split if marker.source and marker.source == source else _cut
    report = ""
    if marker.report:
        text, both, report = text.partition(2 * marker.text)
        if not both:
            text, _, report = text.rpartition(marker.text)
    parts = [Caption(text=one_period(t), kind=_kind(marker, i)) for i, t in enumerate(cut(text, marker.text))]
    if marker.report:
        parts += [Caption(text=t.strip(), kind="report") for t in cut(report, marker.text)]
    # Sources that somebody merged may have one marker inside the captions of another.
    return [inner for p in parts for inner in (_parts(p.text, source) if find(p.text, source) else [p])]


def _cut(text: str, marker: str) -> list[str]:
    """Splits at the markers that open the text or follow a period or a marker; in time linear in the text."""
    first, *others = text.split(marker)
    parts = [[first]]
    ended = _ends(first, blank=True)
    for part in others:
        if ended:
            parts.append([part])
        else:
            parts[-1] += [marker, part]
        ended = _ends(part, blank=ended)
    return ["".join(pieces) for pieces in parts]


def _ends(part: str, *, blank: bool) -> bool:
    """Whether a marker after this part ends a caption; `blank` is the answer for a part without a word."""
    words = part.rstrip()
    return words.endswith(".") if words else blank


def _kind(marker: Marker, number: int) -> str:
    if marker.later and number >= marker.later[0]:
        return marker.later[1]
    return marker.head[number] if number < len(marker.head) else marker.kind


def one_period(text: str) -> str:
    """A text that ends in a period, without white space and further periods around it; another one only stripped.

    Example:
        >>> one_period(" A big heart . .. "), one_period("A heart")
        ('A big heart.', 'A heart')
    """
    words = text.strip(" .\t\r\n")
    return f"{words}." if words and text.rstrip().endswith(".") else text.strip()

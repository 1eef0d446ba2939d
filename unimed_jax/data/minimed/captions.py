"""Captions from facts: every sentence says only what a mask, a table or the curated facts hold for that picture.

A sentence pattern is used only when all the facts it names are known. Organs are drawn from those whose mask the
slice cuts. Which patterns and organs a picture gets is a function of its key.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence

import numpy as np

from unimed_jax.data.minimed.facts import Facts

MOST = 8  # captions a picture
_ORGANS_NAMED = 4

_FORMATTER = string.Formatter()

# Patterns by modality. Names in braces are facts; {organs} is a list in words; a pattern with an unknown fact is
# left out. `a_plane` and `A_plane` carry the article.
PATTERNS: dict[str, tuple[str, ...]] = {
    "CT": (
        "{plane} CT slice of the {region}",
        "computed tomography (CT) of the {region}, {plane} plane, {window} window",
        "{a_plane} computed tomography image of the {region}",
        "CT scan of the {region} displayed in a {window} window",
        "Cross-sectional CT of the {region} in {plane} orientation.",
        "{A_plane} CT section at the level of the {organs}.",
        "CT slice showing the {organs}",
        "This {plane} computed tomography slice cuts the {organs}.",
        "CT in a {window} window: {organs} are visible.",
        "CT of the {region} with a {finding}",
        "{A_plane} CT slice through a {finding}.",
        "a slice of a computed tomography examination ({window} window)",
    ),
    "MRI": (
        "{plane} MRI slice of the {region}",
        "magnetic resonance imaging (MRI) of the {region}, {plane} plane",
        "{a_plane} magnetic resonance image of the {region}",
        "{sequence} MRI of the {region}",
        "{A_plane} {sequence} MR image showing the {region}.",
        "MR scan of the {region} in {plane} orientation",
        "This {plane} section of the {region} was acquired by magnetic resonance imaging.",
        "a slice of an MRI examination of the {region}",
        "MRI of the {region} with a {finding}",
        "{A_plane} MR image through a {finding}.",
        "a magnetic resonance image",
        "{average} of the {region}, {plane} plane",
    ),
    "X-ray": (
        "X-ray radiograph of the {region}",
        "{view} X-ray of the {region}",
        "a plain radiograph showing the {region}",
        "Projection radiography of the {region}; bone is bright.",
        "digital X-ray image of the {region}",
        "Radiograph of the {region}, {view} view.",
        "an X-ray of the {region}",
        "X-ray image",
    ),
    "X-ray/breast": (
        "mammogram of the {side} breast, {view} view",
        "X-ray mammography of the {side} breast",
        "{view} mammogram",
        "a mammogram, the X-ray image of a breast",
        "Radiograph of the {side} breast ({view}).",
        "X-ray image of breast tissue",
        "screen-film mammogram, {side} {view}",
        "an X-ray of the breast",
    ),
    "X-ray/animal": (
        "{view} X-ray of a cat",
        "veterinary radiograph of the {region} of a cat",
        "an X-ray of an animal, {view} view",
        "Radiograph of a cat: {region}, {view} projection.",
        "X-ray image of the {region} of a cat",
        "a plain radiograph from veterinary medicine",
    ),
    "X-ray/simulated": (
        "X-ray projection of the {region} computed from a CT scan",
        "simulated radiograph of the {region}",
        "digitally reconstructed radiograph (DRR) of the {region}",
        "A computed X-ray view of the {region}, not an acquired one.",
        "X-ray-like projection of the {region}",
        "DRR: the {region} as an X-ray would show it",
    ),
    "Ultrasound": (
        "ultrasound image of the {region}",
        "sonogram of the {region}",
        "{mode} ultrasound of the {region}",
        "{view} ultrasound view of the {region}",
        "Ultrasound examination of the {region}, {mode} mode.",
        "a frame of an ultrasound scan",
        "{mode} sonography showing the {region}",
        "an ultrasound picture with speckle",
    ),
    "Ultrasound/heart": (
        "echocardiogram",
        "ultrasound image of the heart",
        "{view} echocardiogram",
        "{mode} echocardiography, {view} view",
        "Ultrasound of the heart, {mode} mode.",
        "a frame of an echocardiography clip",
        "cardiac ultrasound in {mode} mode",
        "sector-shaped ultrasound image of the heart",
    ),
    "Histopathology": (
        "{stain_words} stained histopathology image",
        "microscopy image of tissue stained with {stain_words}",
        "histology section, {stain}",
        "{stain} stained section of {tissue} tissue",
        "Microscopic view of stained tissue with its cell nuclei.",
        "histopathology tile of {tissue} tissue",
        "a tile of a digitised tissue slide",
        "tissue section under the light microscope, {stain} stain",
        "a histopathology image",
    ),
    "Fundus": (
        "color fundus photograph of the retina",
        "retinal fundus image",
        "Photograph of the back of the eye with its blood vessels.",
        "fundus photograph of a {side} eye",
        "fundus photograph: {finding}",
        "retinal photograph of an eye with {finding}",
        "an ophthalmoscopic picture of the retina",
        "a colour photograph of the ocular fundus",
    ),
}
_STAIN_WORDS = {"H&E": "haematoxylin and eosin (H&E)", "IHC": "immunohistochemistry (IHC)"}
# A healthy eye is not "an eye with normal".
_FINDING_WORDS = {"normal": "no disease"}


def family(facts: Facts) -> str:
    """The row of `PATTERNS` for a picture."""
    for special in ("simulated", "animal"):
        if getattr(facts, special):
            return f"{facts.modality}/{special}"
    specific = f"{facts.modality}/{facts.region}"
    return specific if specific in PATTERNS else facts.modality


def words(facts: Facts) -> dict[str, str]:
    """What the braces of a pattern stand for; empty = not known."""
    plane = facts.plane
    article = "an" if plane[:1] in ("a", "o") else "a"
    return {
        "region": facts.region,
        "average": "average of the MRI scans of many people" if facts.average else "",
        "plane": plane,
        "a_plane": f"{article} {plane}" if plane else "",
        "A_plane": f"{article.title()} {plane}" if plane else "",
        "window": facts.window.replace("soft tissue", "soft-tissue"),
        "sequence": facts.sequence + (", skull-stripped" if facts.masked and facts.sequence else ""),
        "view": facts.view,
        "stain": facts.stain,
        "stain_words": _STAIN_WORDS.get(facts.stain, facts.stain),
        "tissue": facts.tissue,
        "finding": _FINDING_WORDS.get(facts.finding, facts.finding),
        "side": facts.side,
        "mode": "colour Doppler" if facts.doppler else "grey-scale",
    }


def in_words(names: Sequence[str]) -> str:
    """Joins names as a sentence does.

    Example:
        >>> in_words(["heart", "aorta", "spine"])
        'heart, aorta and spine'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def captions(facts: Facts, key: str) -> tuple[str, ...]:
    """Four to eight different true sentences about a picture; the same for the same key.

    Example:
        >>> captions(Facts(modality="Fundus", subject="a", package="p", finding="glaucoma"), "k")[0]
        'a colour photograph of the ocular fundus'
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    known = words(facts)
    out: list[str] = []
    patterns = PATTERNS[family(facts)]
    for pattern in (patterns[i] for i in rng.permutation(len(patterns))):
        wanted = [name for _, name, _, _ in _FORMATTER.parse(pattern) if name]
        values = dict(known)
        if "organs" in wanted and len(facts.structures) > 1:
            chosen = rng.choice(
                len(facts.structures), min(_ORGANS_NAMED, len(facts.structures)), replace=False
            )
            values["organs"] = in_words([facts.structures[i] for i in chosen])
        if all(values.get(name) for name in wanted):
            out.append(pattern.format_map(values))
    return tuple(dict.fromkeys(out))[:MOST]

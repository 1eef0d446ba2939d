"""The modality that a caption of the literature names, where it names exactly one of the six."""

from __future__ import annotations

import re

# Words that speak for one modality. Deliberately few: a caption without any of them stays unknown. Small letters are
# any letters, except after (?-i: CTS is a syndrome, and Ct a count of PCR's cycles.
_WORDS = {
    "X-ray": r"x[- ]?rays?(?! (?:diffract|crystal|scatter|fluoresc|photoel|absorp|spectro|struct))"
    r"|radiographs?|radiograms?|plain films?|mammograms?",
    "CT": r"(?-i:CTs?|ct)|computed tomograph\w*|computerized tomograph\w*|cect|hrct|cbct",
    "MRI": r"mri|mris|mr imag\w*|magnetic[- ]resonance|t[12][- ]weighted|t[12]wi?|mrcp",
    "Ultrasound": r"ultrasound|ultrasonograph\w*|ultrasonograms?|sonogra\w+|echocardiogra\w+",
    # "Histologically proven" is said of pictures of any kind.
    "Histopathology": r"histolog(?:y|ic|ical)|histopatholog(?:y|ic|ical)"
    r"|photomicrograph\w*|h ?& ?e|ha?ematoxylin|immunohistochem\w*",
    # Stomach, uterus and gallbladder have a fundus, too.
    "Fundus": r"(?:colou?r|retinal|ocular|eye|optic|normal|dilated) fundus|fundus (?:photo|imag|pictur|camera|exam)\w*"
    r"|fundus of (?:the |an? )?(?:right |left |human )?(?:eye|retina)|fundoscop\w*|funduscop\w*|ophthalmoscop\w*",
}
_PATTERNS = {
    name: re.compile(rf"(?<![\w-])(?:{words})(?![\w])", re.IGNORECASE) for name, words in _WORDS.items()
}
# What combines two, or looks like one of the six and is none.
_OTHERS = re.compile(
    r"(?<![\w-])(?:PET|SPECT|scintigra\w*|angiogra\w*|autofluorescence|endoscop\w*|optical coherence|OCT)(?![\w])",
    re.IGNORECASE,
)


def named(caption: str) -> str:
    """The one modality that a caption names; empty when it names none, several, or one that is not among the six.

    Example:
        >>> named("Axial CT scan of the abdomen"), named("CT and MRI of the same lesion"), named("A red nodule")
        ('CT', '', '')
    """
    found = every(caption)
    return found[0] if len(found) == 1 and found[0] in _PATTERNS else ""


def every(caption: str) -> list[str]:
    """All modalities that a caption names, those that are none of the six by their own word.

    Example:
        >>> every("CT and MRI of the same lesion"), every("An OCT scan")
        (['CT', 'MRI'], ['OCT'])
    """
    found = [name for name, pattern in _PATTERNS.items() if pattern.search(caption)]
    return found + [other[0] for other in _OTHERS.finditer(caption)]

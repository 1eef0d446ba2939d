"""Who is in which part: by subject, fixed before any model was trained, so that no person is on both sides.

Rules, in this order:
1. Pictures of one person stay together (the two visits of one eye; a CT and the projections computed from it).
2. Averages of many people are for training only: the people in them are unknown, so they could be anyone.
3. Computed radiographs are for training only.
4. Test has every modality and only single people (or slides); where a package offers two alike cases, one of
   them is for tuning (val), so that nothing has to be tuned on the test subjects.
"""

from __future__ import annotations

import hashlib

TEST = frozenset(
    {
        # CT
        "pyrad-lung2",
        "CQ500-310",
        "PANCREAS_0001",
        "siemens-spine",
        "1CT1",
        # MRI
        "pyrad-brain2",
        "dipy-S0",
        "NEMA-MR2",
        "gdcm-liver",
        # X-ray
        "NEMA-9RG1",
        "NEMA-11RG3",
        "CBIS-sfm-malign-0",
        "mednet-16bit",
        # Ultrasound
        "philips-echo",
        "philips-adult-echo",
        # Histopathology
        "stardist-HE",
        "skimage-ihc",
        # Fundus
        "topcon",
        "wikimedia-normal",
        "CHASE-12",
        "DRIVE-40",
        "HRF-07dr",
        "rreg-0",
        "rfp-issue_2",
    }
)
VAL = frozenset(
    {"pyrad-lung1", "pyrad-brain1", "deid-cat", "aloka", "DRIVE-22", "rfp-issue_1", "rfp-sample_dark"}
)


def by_subject(subject: str) -> str:
    """The honest split: train, val or test."""
    return "test" if subject in TEST else "val" if subject in VAL else "train"


def at_random(key: str) -> str:
    """A LEAKY split: one picture in five is test, whoever it shows, so neighbouring slices are on both sides.

    Only for the figure that warns of it.
    """
    return "test" if hashlib.sha256(key.encode()).digest()[0] % 5 == 0 else "train"


def final(subject: str) -> str:
    """The honest split after everything was chosen on val: those subjects train, too; test is the same."""
    return "test" if subject in TEST else "train"


SPLITS = {
    "subject": lambda subject, key: by_subject(subject),
    "final": lambda subject, key: final(subject),
    "random": lambda subject, key: at_random(key),
}

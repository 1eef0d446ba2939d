"""What is known about one picture, and the picture's recipe; filled by the modality modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Plane -> axis of a RAS volume that is fixed (0 right, 1 anterior, 2 superior).
PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Statements that hold for one picture, each from a mask, a table, a curated header or the file's own name.

    An empty field means "not known", and then nothing is said about it.
    """

    modality: str  # one of config.MODALITIES
    subject: str  # the person, animal or slide, in the package's words
    package: str
    region: str = ""  # body part, e.g. "chest"
    plane: str = ""  # axial, coronal, sagittal
    window: str = ""  # CT display window: lung, soft tissue, bone, brain
    sequence: str = ""  # MRI
    view: str = ""  # projection or scan view, e.g. "craniocaudal"
    stain: str = ""  # histology
    tissue: str = ""
    finding: str = ""
    side: str = ""  # left, right
    structures: tuple[str, ...] = ()  # seen in the picture according to a mask
    doppler: bool = False
    animal: bool = False
    simulated: bool = False  # computed from another acquisition
    average: bool = False  # of several people, so nobody's picture
    masked: bool = False  # the skull was removed by software

    def labels(self) -> tuple[str, ...]:
        """The facts as "task:value" strings for the record."""
        pairs = [
            ("region", self.region),
            ("plane", self.plane),
            ("window", self.window),
            ("sequence", self.sequence),
            ("view", self.view),
            ("stain", self.stain),
            ("tissue", self.tissue),
            ("finding", self.finding),
            ("side", self.side),
            *(("structure", s) for s in self.structures),
            *((name, "yes") for name in ("doppler", "animal", "average") if getattr(self, name)),
        ]
        return tuple(f"{task}:{value}" for task, value in pairs if value)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """One element of the set: its key, its facts and how to make its pixels (picklable)."""

    key: str
    facts: Facts
    make: Callable[[], np.ndarray]  # -> u8[h w] or u8[h w 3]

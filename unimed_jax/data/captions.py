"""Which of an image's captions a training step reads: a policy by source and caption kind.

An image comes with several captions: the original sentence, a report, templates and rewrites by a language
model. Each time the image is drawn one of them is chosen. The choice is a pure function of (seed, epoch, record),
so a restarted run reads the same sentences again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from unimed_jax.errors import DataError, UsageError, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from unimed_jax.data.record import Caption


def _all(captions: Sequence[Caption]) -> list[int]:
    return [i for i, c in enumerate(captions) if c.text.strip()]


def _first(captions: Sequence[Caption]) -> list[int]:
    return _all(captions)[:1]


def _kind(*kinds: str) -> Callable[[Sequence[Caption]], list[int]]:
    """Captions of these kinds; all of them where the record has none of these kinds."""

    def eligible(captions: Sequence[Caption]) -> list[int]:
        every = _all(captions)
        return [i for i in every if captions[i].kind in kinds] or every

    return eligible


# policy: the captions it may draw from, each with the same probability
POLICIES: dict[str, Callable[[Sequence[Caption]], list[int]]] = {
    "uniform": _all,
    "first": _first,
    "report_first": _kind("report"),
    "original": _kind("original"),
    "llm": _kind("llm"),
    "template": _kind("template"),
}

# The choices of the UniMed training code, by source (its data loader tells the sources apart by markers inside
# the text; here the source's name decides). All other sources have one caption an image, or want all of them.
SOURCE_POLICIES = {
    "openi": "first",  # always the original; its rewrites are stored and never drawn
    "mimic_cxr": "report_first",  # the report whenever there is one, otherwise uniform
    "retina_part1": "llm",  # the sentence made from a template is stored and never drawn
}


def default_policy(source: str) -> str:
    """Returns the caption policy of a source that the config says nothing about.

    Example:
        >>> default_policy("mimic_cxr"), default_policy("my_hospital")
        ('report_first', 'uniform')
    """
    return SOURCE_POLICIES.get(source, "uniform")


def check_policy(policy: str) -> str:
    """Returns a policy's name if there is such a policy.

    Raises:
        UsageError: naming the known ones.
    """
    if policy not in POLICIES:
        raise UsageError(
            f"no caption policy {policy!r}.{did_you_mean(policy, POLICIES)}", f"one of {', '.join(POLICIES)}"
        )
    return policy


def draw(captions: Sequence[Caption], policy: str, rng: np.random.Generator) -> int:
    """Returns the index of the caption to read, uniform over those the policy allows; empty ones never.

    The random generator is used once, whatever the policy, so that a caption more or less in one record leaves
    every other draw alone.

    Args:
        captions: of one record.
        policy: a key of POLICIES.
        rng: seeded by (seed, epoch, record).

    Raises:
        UsageError: for an unknown policy.
        DataError: when no caption has any text.

    Example:
        >>> import numpy as np
        >>> from unimed_jax.data.record import Caption
        >>> pair = (Caption(text="chest film", kind="original"), Caption(text="no effusion", kind="report"))
        >>> draw(pair, "report_first", np.random.default_rng(0))
        1
    """
    eligible = POLICIES[check_policy(policy)](captions)
    if not eligible:
        raise DataError("no caption with any text", "unimed-jax data check finds such records; export again")
    return eligible[int(rng.integers(len(eligible)))]

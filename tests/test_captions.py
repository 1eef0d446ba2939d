from __future__ import annotations

import collections

import numpy as np
import pytest

from unimed_jax.data import captions
from unimed_jax.data.mixture import Draw, generator
from unimed_jax.data.record import Caption
from unimed_jax.errors import DataError, UsageError

REWRITES = [Caption(text=f"rewrite {i}", kind="llm") for i in range(3)]
RETINA = (*REWRITES, Caption(text="a template", kind="template"))
MIMIC = (*REWRITES, Caption(text="the report", kind="report"))
OPENI = (Caption(text="original", kind="original"), *REWRITES)
EMPTY = (Caption(text=" "), Caption(text="real"), Caption(text=""), Caption(text="also real"))


def frequencies(record: tuple[Caption, ...], policy: str, n: int = 6000) -> dict[int, float]:
    rng = np.random.default_rng(1)
    counts = collections.Counter(captions.draw(record, policy, rng) for _ in range(n))
    return {i: c / n for i, c in counts.items()}


@pytest.mark.parametrize(
    ("record", "policy", "allowed"),
    [
        (RETINA, "uniform", {0, 1, 2, 3}),
        (RETINA, "llm", {0, 1, 2}),
        (RETINA, "template", {3}),
        (MIMIC, "report_first", {3}),
        (MIMIC[:3], "report_first", {0, 1, 2}),  # no report: uniform over the rest
        (OPENI, "first", {0}),
        (OPENI, "original", {0}),
        (OPENI, "report_first", {0, 1, 2, 3}),
        (EMPTY, "uniform", {1, 3}),
        (EMPTY, "first", {1}),
    ],
)
def test_each_policy_draws_uniformly_over_what_it_allows(record, policy, allowed):
    found = frequencies(record, policy)
    assert set(found) == allowed
    # Five standard deviations of a binomial share.
    p = 1 / len(allowed)
    assert all(abs(f - p) <= 5 * np.sqrt(p * (1 - p) / 6000) for f in found.values())


def test_default_policies_follow_the_reference():
    assert captions.default_policy("openi") == "first"
    assert captions.default_policy("mimic_cxr") == "report_first"
    assert captions.default_policy("retina_part1") == "llm"
    for source in ("radimagenet", "chexpert", "chest_xray8", "pmc_oa", "somebody's own"):
        assert captions.default_policy(source) == "uniform"
    assert set(captions.SOURCE_POLICIES.values()) <= set(captions.POLICIES)


def test_draw_is_a_function_of_seed_source_epoch_and_record():
    def choice(seed=0, source="a", record=7, epoch=2):
        rng = generator(seed, source, Draw(0, record, epoch), "caption")
        return captions.draw(RETINA, "uniform", rng)

    assert len({choice() for _ in range(20)}) == 1
    for change in ({"seed": 1}, {"source": "b"}, {"record": 8}, {"epoch": 3}):
        (name, start), *_ = change.items()
        values = [{name: f"{start}{i}"} if name == "source" else {name: start + i} for i in range(40)]
        assert {choice(**v) for v in values} == {0, 1, 2, 3}, f"{name} does not change the draw"


def test_streams_of_one_record_are_independent_of_each_other():
    draw = Draw(0, 3, 1)
    a = generator(0, "s", draw, "caption").integers(1 << 32, size=64)
    b = generator(0, "s", draw, "image").integers(1 << 32, size=64)
    assert not np.any(a == b)


def test_unknown_policy_and_record_without_text_are_refused():
    with pytest.raises(UsageError, match='Did you mean "report_first"'):
        captions.check_policy("report_frist")
    with pytest.raises(DataError, match="no caption"):
        captions.draw((Caption(text=" "),), "uniform", np.random.default_rng(0))
    with pytest.raises(DataError, match="no caption"):
        captions.draw((), "uniform", np.random.default_rng(0))

"""Position tables at other grid sizes: three rules, each equal to PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest

from unimed_jax.convert import positions
from unimed_jax.errors import DataError

TORCH = {
    "bicubic": {"align_corners": True},
    "antialias": {"align_corners": False, "antialias": True},
    "half_pixel": {"align_corners": False},
}


GRIDS = [(37, 16), (14, 24), (24, 14), (5, 4), (4, 9), (3, 2), (7, 8), (16, 2)]


def table(n: int, width: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1 + n * n, width)).astype(np.float32)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("n", "m", "rule"),
    [
        *((n, m, r) for n, m in GRIDS for r in positions.RULES),
        (4, 1, "antialias"),  # one sample has no corners to align
    ],
)
def test_resize_equals_torch(n, m, rule):
    torch = pytest.importorskip("torch")
    pos = table(n)
    grid = torch.from_numpy(pos[1:].reshape(1, n, n, 6)).permute(0, 3, 1, 2)
    for kind, atol in ((grid.double(), 1e-6), (grid, 2e-5)):  # in float32 torch itself loses 1.3e-5
        want = torch.nn.functional.interpolate(kind, size=(m, m), mode="bicubic", **TORCH[rule])
        got = positions.resize_positions(pos, m, rule)
        np.testing.assert_array_equal(got[0], pos[0])
        np.testing.assert_allclose(got[1:], want.permute(0, 2, 3, 1).reshape(m * m, 6).numpy(), atol=atol)


@pytest.mark.parametrize("rule", positions.RULES)
def test_a_constant_table_stays_constant(rule):
    got = positions.resize_positions(np.full((1 + 36, 2), 3, np.float32), 11, rule)
    np.testing.assert_allclose(got, 3, rtol=1e-6)


def test_the_rules_differ():
    """On random tables by a quarter of the norm: a name for the rule is needed."""
    pos = table(16, 64)
    old, new, _ = (positions.resize_positions(pos, 24, rule)[1:] for rule in positions.RULES)
    assert 0.15 < np.linalg.norm(old - new) / np.linalg.norm(old) < 0.35
    np.testing.assert_allclose(old[0], pos[1], atol=1e-6)  # corners are kept
    assert np.abs(new[0] - pos[1]).max() > 0.01


def test_resize_keeps_equal_grids_and_refuses_others():
    pos = table(4, 3)
    assert positions.resize_positions(pos, 4) is pos
    with pytest.raises(DataError, match="16 rows"):
        positions.resize_positions(pos[:16], 4)


def test_text_positions_are_never_resized():
    positions.refuse_other_text_length(77, 77)
    for rows, wanted in ((77, 256), (512, 77)):
        with pytest.raises(DataError, match=f"{rows} text positions, the model {wanted}"):
            positions.refuse_other_text_length(rows, wanted)

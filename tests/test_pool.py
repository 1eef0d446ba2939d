"""Worker processes: what they give back, and that none is left."""

from __future__ import annotations

import multiprocessing
import operator
import os
import time

import pytest

from unimed_jax.data import pool
from unimed_jax.errors import Fault


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_gives_its_result(workers):
    assert sorted(pool.run(operator.mul, (3,), [5, 7, 9], workers)) == [(5, 15), (7, 21), (9, 27)]


def test_no_worker_outlives_an_error():
    """A worker that still wrote after the caller had cleaned up would leave a half-written file."""
    start = time.monotonic()
    with pytest.raises(TypeError):
        list(pool.run(time.sleep, (), ["no number", 300.0, 300.0, 300.0], 2))
    assert multiprocessing.active_children() == []
    assert time.monotonic() - start < 100


def test_no_worker_outlives_a_caller_that_stops():
    results = pool.run(time.sleep, (), [0.0, 300.0, 300.0], 2)
    assert next(results) == (0.0, None)
    results.close()
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_is_said():
    with pytest.raises(Fault, match="worker process died"):
        list(pool.run(os._exit, (), [9, 9], 2))
    assert multiprocessing.active_children() == []

"""A folder that nobody may list, also for a superuser, whom no permission holds back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listing the folder fails as it does without permission."""
    scandir = os.scandir

    def refuse(path="."):
        if Path(os.fspath(path)) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)

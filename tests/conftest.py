"""Fixtures shared by all tests: where real data lie, if they are there."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, tiles and questions that are not part of the project; skips where they are missing."""
    if not SHARED.is_dir():
        pytest.skip("the development data (../shared/data) are not on this machine")
    return SHARED

"""The short form of chaos.py: `make chaos` has the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.chaos import KINDS, run_chaos

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def test_five_kills_at_random_moments_lose_no_complete_checkpoint_and_change_no_loss(tmp_path: Path) -> None:
    result = run_chaos(tmp_path, kills=5, seed=20261126)
    assert result["kills"] == dict.fromkeys(KINDS, 1)

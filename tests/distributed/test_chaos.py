"""The short form of chaos.py: `make chaos` has the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.chaos import KINDS, run_chaos

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.parametrize("kills", [2, pytest.param(len(KINDS), marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_no_complete_checkpoint_and_change_no_loss(tmp_path: Path, kills: int) -> None:
    result = run_chaos(tmp_path, kills=kills, seed=20261126)
    assert result["kills"] == {kind: int(number < kills) for number, kind in enumerate(KINDS)}

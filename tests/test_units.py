"""Numbers as people read and write them."""

from __future__ import annotations

import pytest

from dsllm.errors import UserError
from dsllm.units import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45m", 2700), ("3h50m", 13_800), ("1d2h", 93_600), ("1d2h3m4s", 93_784), ("600", 600)],
)
def test_a_time_is_read_as_people_write_it(text: str, seconds: float) -> None:
    assert parse_duration(text, "--stop-after") == seconds


@pytest.mark.parametrize("text", ["", "0", "0h", "soon", "3h50", "50m3h", "-5m", "1.5h", "3 h", "3h50m!"])
def test_another_time_is_refused_with_what_was_given_and_what_works(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_duration(text, "--stop-after")
    assert str(refusal.value) == f"--stop-after: given '{text}'; must be a time such as 90s, 45m, 3h50m or 1d2h"

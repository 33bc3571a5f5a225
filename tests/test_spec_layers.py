"""Lists of layers: what they mean, and what is refused before any model is there."""

from __future__ import annotations

import pytest

from dsllm.errors import SpecError, UserError
from dsllm.spec.layers import layer_numbers, parse_layers
from dsllm.spec.load import load_spec

START = "model.init={kind: pretrained, name: out/small, layers: '%s'}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-7,4-11", [*range(8), *range(4, 12)]),
        ("0-4,7-11", [*range(5), *range(7, 12)]),
        ("3", [3]),
        ("2,1,0", [2, 1, 0]),
        ("0-1, 0-1", [0, 1, 0, 1]),
    ],
)
def test_a_list_of_ranges_is_their_layers_in_order(text: str, expected: list[int]) -> None:
    assert list(layer_numbers(parse_layers(text, "--layers"))) == expected


@pytest.mark.parametrize("text", ["", "0-", "-3", "0..7", "0-7;4-11", "0-7,,8", "a-b", "0-99999999"])
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_layers(text, "--layers")
    assert str(refusal.value) == (
        f"--layers: given '{text}'; must be ranges of layers, counted from 0, such as 0-7,4-11"
    )


def test_a_range_that_goes_down_is_refused_with_the_one_that_goes_up() -> None:
    with pytest.raises(
        UserError, match=r"^--layers: given '0-3,7-4', where 7-4 goes down; .* write 4-7, or each layer"
    ):
        parse_layers("0-3,7-4", "--layers")


def test_a_spec_says_how_many_layers_its_list_has() -> None:
    overrides = ["model.num_layers=6", START % "0-7,4-11"]
    with pytest.raises(SpecError) as refusal:
        load_spec("quickstart", overrides)
    assert refusal.value.problems == [
        "model.num_layers: given 6; model.init.layers lists 16 layers, '0-7,4-11'; set model.num_layers to 16, or list "
        "others"
    ]
    assert load_spec("quickstart", ["model.num_layers=16", START % "0-7,4-11"]).model.num_layers == 16


def test_a_spec_with_a_list_that_is_none_is_refused_before_any_model_is_read() -> None:
    with pytest.raises(SpecError, match=r"model\.init\.layers: given '0-'; must be ranges of layers"):
        load_spec("quickstart", [START % "0-"])


def test_without_a_list_any_number_of_layers_may_be_right() -> None:
    assert load_spec("quickstart", ["model.init={kind: pretrained, name: out/small}"]).model.init.layers is None

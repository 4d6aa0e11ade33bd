"""One guard for every list of prompts: a text is no list."""

import numpy as np
import pytest

from psa_diffusers.presets.values import check_prompts


@pytest.mark.parametrize("given", [["a cat"], ("a cat", "a dog"), np.array(["a cat", "a dog"]), (p for p in ["a cat"])])
def test_lists_of_texts_are_taken(given):
    found = check_prompts(given, "prompts")
    assert found[0] == "a cat"
    assert type(found) is list


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("a cat", r"prompts must be a list of at least one prompt, got one text: write \['a cat'\]"),
        ("", r"got one text: write \[''\]"),
        (b"a cat", "got one text"),
        ({"a cat": 1}, "got .*, a dict"),
        ({"a cat"}, "got .*, a set"),
        (None, "got None, a NoneType"),
        (7, "got 7, an? int"),
        ([], "got 0"),
        (["a cat", 3], r"prompts\[1\] must be a text, got 3, a int"),
        (["a cat", ["a dog"]], r"prompts\[1\] must be a text, got \['a dog'\], a list"),
        ([None], r"prompts\[0\] must be a text"),
    ],
)
def test_everything_else_is_told(given, says):
    with pytest.raises(ValueError, match=says):
        check_prompts(given, "prompts")


def test_a_list_may_be_allowed_to_be_empty():
    assert check_prompts([], "held_out", least=0) == []
    with pytest.raises(ValueError, match="held_out must be a list of prompts, got one text"):
        check_prompts("a cat", "held_out", least=0)

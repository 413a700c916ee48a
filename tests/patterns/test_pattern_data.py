# SPDX-License-Identifier: Apache-2.0
"""Patterns as data: names, ratios, plain dicts, gentler ones, obstacles, and what bad ones say."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim import ConfigError
from fxslim.patterns import NM, Block, Unstructured, as_pattern, check, pattern_from_dict

ratios = st.floats(0, 1, exclude_max=True)
some_ratio = st.none() | ratios
n_of_m = st.builds(
    lambda n, more, axis: NM(n, n + more, axis), st.integers(1, 9), st.integers(0, 9), st.sampled_from([0, 1])
)
blocks = st.builds(
    lambda cin, cout, per_position, ratio: Block(cin=cin, cout=cout, per_position=per_position, ratio=ratio),
    st.integers(1, 99), st.integers(1, 99), st.booleans(), some_ratio,
)  # fmt: skip
anywhere = st.builds(Unstructured, some_ratio, st.booleans())


@given(pattern=n_of_m | blocks | anywhere)
def test_plain_data_and_back(pattern) -> None:
    data = json.loads(json.dumps(pattern.to_dict()))
    assert pattern_from_dict(data) == pattern
    assert hash(pattern_from_dict(data)) == hash(pattern)


@pytest.mark.parametrize(
    "name, pattern, text",
    [
        ("2:4", NM(2, 4), "2:4"),
        (" 4:8 ", NM(4, 8), "4:8"),
        ("cin32cout64", Block(), "cin32cout64"),
        ("Cin32Cout32", Block(cout=32), "cin32cout32"),
        ("unstructured", Unstructured(), "unstructured"),
        (NM(1, 4, 0), NM(1, 4, 0), "1:4 along outputs"),
        (Block(per_position=False, ratio=0.5), Block(per_position=False, ratio=0.5), "cin32cout64 whole kernels 50%"),
        (Unstructured(0.25, per_output=True), Unstructured(0.25, True), "unstructured per output 25%"),
    ],
    ids=str,
)
def test_names(name, pattern, text: str) -> None:
    assert as_pattern(name) == pattern
    assert str(pattern) == text


@given(pattern=n_of_m, ratio=ratios)
def test_gentler_n_of_m_removes_the_most_that_is_allowed(pattern: NM, ratio: float) -> None:
    gentle = pattern.gentler(ratio)
    assert (gentle.m, gentle.axis) == (pattern.m, pattern.axis)
    assert gentle.removed() <= ratio + 1e-8
    assert gentle.removed() + 1 / gentle.m > ratio - 1e-8
    assert pattern.gentler(pattern.removed()) == pattern


@given(pattern=blocks | anywhere, ratio=ratios)
def test_gentler_patterns_by_ratio_have_that_ratio(pattern, ratio: float) -> None:
    assert pattern.gentler(ratio).removed() == ratio
    assert pattern.at(pattern.removed()) == pattern


@given(ratio=ratios)
def test_gentler_masks_are_nested(ratio: float) -> None:
    """Of the same scores a gentler pattern keeps all that the pattern keeps."""
    scores = torch.rand(8, 12, 2)
    for pattern in (NM(1, 4), Block(cin=4, cout=4, ratio=0.75), Unstructured(0.75), Unstructured(0.75, True)):
        gentle = pattern.gentler(ratio * 0.75).mask(scores)
        assert torch.equal(gentle | pattern.mask(scores), gentle)
        assert check(gentle, pattern.gentler(ratio * 0.75)).ok


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: as_pattern("2:5:4"), "2:5:4"),
        (lambda: as_pattern("unstructred"), "did you mean.*unstructured"),
        (lambda: as_pattern(0.5), r"a name such as '2:4', or NM, Block, Unstructured; got 0.5"),
        (lambda: as_pattern("0:4"), "n=0, m=4: n kept of m needs 1 <= n <= m"),
        (lambda: as_pattern("5:4"), "n=5, m=4"),
        (lambda: as_pattern("cin0cout64"), "cin must be an integer >= 1, got 0"),
        (lambda: NM(True, 4), "n must be an integer, got True"),
        (lambda: NM(2, 4.0), "m must be an integer, got 4.0"),
        (lambda: NM(2, 4, 2), r"axis=2 must be 1 \(input channels\) or 0"),
        (lambda: Block(cout=-1), "cout must be an integer >= 1, got -1"),
        (lambda: Block(per_position=1), "per_position must be True or False, got 1"),
        (lambda: Block(ratio=1.0), r"ratio=1.0 must be in \[0, 1\)"),
        (lambda: Unstructured(-0.1), r"ratio=-0.1 must be in \[0, 1\)"),
        (lambda: Unstructured(float("nan")), r"ratio must be a number in \[0, 1\), got nan"),
        (lambda: Unstructured(True), "ratio must be a number.*got True"),
        (lambda: Unstructured("0.5"), "ratio must be a number.*got '0.5'"),
        (lambda: Unstructured(0.5, per_output=None), "per_output must be True or False, got None"),
        (lambda: NM(2, 4).at(0.6), "ratio=0.6 contradicts 2:4, which removes 0.5"),
        (lambda: NM(2, 4).at(2), r"ratio=2 must be in \[0, 1\)"),
        (lambda: Unstructured(0.5).at(0.6), "ratio=0.6 contradicts unstructured 50%: give the ratio once"),
        (lambda: Block(ratio=0.5).at(0.25), "ratio=0.25 contradicts cin32cout64 50%"),
        (lambda: pattern_from_dict({"kind": "n:n"}), "n:n"),
        (lambda: pattern_from_dict("2:4"), "a dict with 'kind', got '2:4'"),
        (lambda: pattern_from_dict({}), "kind of pattern"),
        (lambda: pattern_from_dict({"kind": "block", "cim": 3}), "pattern 'block'.*cim"),
        (lambda: pattern_from_dict({"kind": "n:m", "n": 2}), "pattern 'n:m'.*'m'"),
    ],
)  # fmt: skip
def test_bad_patterns(call, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    "pattern, shape, groups, obstacle",
    [
        ("2:4", (8, 3, 3, 3), 1, ""),
        ("2:4", (8, 2, 3, 3), 1, "2 input channels: 2:4 would remove nothing"),
        ("2:4", (8, 1, 3, 3), 8, "1 input channels in each group: 2:4 would remove nothing"),
        (NM(2, 4, 0), (2, 64), 1, "2 output channels: 2:4 along outputs would remove nothing"),
        (NM(2, 4, 0), (3, 1), 1, ""),
        (NM(4, 4), (8, 1), 1, ""),
        (Block(ratio=0.5), (64, 1, 3, 3), 64, "it has 64 groups: blocks run over all input channels"),
        (Block(ratio=0.5), (64, 32), 1, "1 blocks of cin32cout64 50%: none would go"),
        (Block(ratio=0.5), (64, 64), 1, ""),
        (Unstructured(0.1), (1, 4), 1, "4 entries: unstructured 10% would remove none"),
        (Unstructured(0.1, True), (100, 4), 1, "4 entries: unstructured per output 10% would remove none"),
        (Unstructured(0.1), (100, 4), 1, ""),
    ],
    ids=str,
)  # fmt: skip
def test_obstacles_are_found_where_nothing_would_go(pattern, shape, groups: int, obstacle: str) -> None:
    pattern = as_pattern(pattern)
    found = pattern.obstacle(shape, groups)
    assert found.startswith(obstacle) if obstacle else found == ""
    if groups == 1 and pattern.removed():
        assert bool(found) == pattern.mask(torch.rand(shape)).all()

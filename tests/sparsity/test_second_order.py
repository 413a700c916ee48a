# SPDX-License-Identifier: Apache-2.0
"""Pruning by the Hessian: counts, errors beside magnitude's, optima that can be enumerated, odd data."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxslim.patterns import NM, Block, Pattern, Unstructured, check
from fxslim.sparsity.column_order import order_columns
from fxslim.sparsity.second_order import prune_by_hessian
from tests.sparsity.oracles import best_row, correlated_gram, damped_gram, output_error, refit_row, textbook_row

KINDS = ["decaying", "relu", "outliers"]
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 11)).flatmap(
    lambda two: st.sampled_from([two, (*two, 3), (*two, 2, 2)])
)
SPARSE = st.one_of(
    st.builds(
        lambda m, n, axis: NM(min(n, m), m, axis), st.integers(1, 10), st.integers(1, 10), st.integers(0, 1)
    ),
    st.builds(Unstructured, st.floats(0, 0.95), st.booleans()),
    st.builds(
        lambda cin, cout, whole, ratio: Block(cin=cin, cout=cout, per_position=whole, ratio=ratio),
        st.integers(1, 5), st.integers(1, 5), st.booleans(), st.floats(0, 0.95),
    ),
)  # fmt: skip


def num_kept(mask: Tensor, pattern: Pattern) -> list[int]:
    """Of each group, row or weight, or blocks that are not wholly removed."""
    if isinstance(pattern, NM):
        groups = mask.movedim(pattern.axis, -1).split(pattern.m, -1)
        return torch.cat([group.sum(-1).flatten() for group in groups]).tolist()
    if isinstance(pattern, Block):
        blocks = pattern.any_in_block(mask)
        assert torch.equal(blocks, ~pattern.any_in_block(~mask)), "a block is removed in part"
        return [int(blocks.sum())]
    assert isinstance(pattern, Unstructured)
    return mask.reshape(mask.shape[0] if pattern.per_output else 1, -1).sum(1).tolist()


def num_wanted(shape: tuple[int, ...], pattern: Pattern) -> list[int]:
    if isinstance(pattern, NM):
        whole = torch.ones(shape, dtype=torch.bool)
        return [min(full, pattern.n) for full in num_kept(whole, pattern)]
    if isinstance(pattern, Block):
        return [pattern.num_blocks(shape) - pattern.num_removed(shape)]
    assert isinstance(pattern, Unstructured)
    rows = shape[0] if pattern.per_output else 1
    size = torch.Size(shape).numel() // rows
    return [size - round((pattern.ratio or 0) * size)] * rows


@given(SHAPES, SPARSE, st.integers(1, 20), st.sampled_from(KINDS))
def test_counts_are_exact_in_every_group(shape: tuple[int, ...], pattern: Pattern, block_size: int, kind: str) -> None:
    weight = torch.randn(shape)
    gram = correlated_gram(weight[0].numel(), kind=kind, dtype=torch.float32)
    mask, new = prune_by_hessian(weight, gram, pattern, block_size=block_size)
    assert mask.shape == new.shape == weight.shape
    assert mask.dtype == torch.bool
    assert new.dtype == weight.dtype
    assert torch.equal(new != 0, mask)
    assert num_kept(mask, pattern) == num_wanted(shape, pattern)
    assert check(new, pattern).ok


PATTERNS: list[Pattern] = [
    NM(2, 4), NM(1, 4), NM(4, 8), NM(8, 12), NM(2, 4, axis=0), Unstructured(0.5), Unstructured(0.5, per_output=True),
    Unstructured(0.8), Block(cin=8, cout=8, ratio=0.5), Block(cin=4, cout=4, per_position=False, ratio=0.5),
]  # fmt: skip


def masked_by_magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    if not isinstance(pattern, Block):
        return weight * pattern.mask(weight.abs())
    # By the mean of squares: the error where inputs are alike and have nothing in common.
    squares = weight.square().unflatten(1, (-1, pattern.cin)).unflatten(0, (-1, pattern.cout))
    means = squares.flatten(4).mean((1, 3)) if weight.dim() > 2 else squares.mean((1, 3))
    if weight.dim() > 2 and not pattern.per_position:
        means = means.mean(-1, keepdim=True)
    limit = means.flatten().kthvalue(pattern.num_removed(tuple(weight.shape))).values
    kept = (means > limit).repeat_interleave(pattern.cout, 0).repeat_interleave(pattern.cin, 1)
    return (weight.reshape(*weight.shape[:2], -1) * kept.view(*weight.shape[:2], -1)).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_error_is_below_that_of_magnitude(pattern: Pattern, kind: str) -> None:
    for seed in range(6):
        shape = (16, 64) if seed % 2 else (16, 16, 3)
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        gram = correlated_gram(weight[0].numel(), seed, kind)
        _, new = prune_by_hessian(weight, gram, pattern)
        plain = output_error(weight, masked_by_magnitude(weight, pattern), gram)
        assert 0 < output_error(weight, new, gram) < 0.95 * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 4), NM(4, 8), NM(7, 8)], ids=str)
def test_one_group_is_the_optimum_over_all_masks(pattern: NM, kind: str) -> None:
    weight, gram = torch.randn(5, pattern.m, dtype=torch.float64), correlated_gram(pattern.m, kind=kind)
    damped = damped_gram(gram)
    _, new = prune_by_hessian(weight, gram, pattern)
    masks = [
        torch.ones(pattern.m, dtype=torch.bool).index_fill(0, torch.tensor(removed), False)
        for removed in combinations(range(pattern.m), pattern.m - pattern.n)
    ]
    for row, found in zip(weight, new, strict=True):
        _, wanted = best_row(row, damped, masks)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_the_first_group_goes_as_is_best_when_all_later_columns_make_up_for_it() -> None:
    strength = torch.tensor([5.0] * 4 + [1.0] * 8).double()
    weight, gram = torch.randn(6, 12, dtype=torch.float64), correlated_gram(12) * strength * strength.unsqueeze(1)
    mask, _ = prune_by_hessian(weight, gram, NM(2, 4))
    for row, found in zip(weight, mask, strict=True):
        masks = [torch.tensor([*some, *[True] * 8]) for some in product([True, False], repeat=4) if sum(some) == 2]
        _, wanted = best_row(row, damped_gram(gram), masks)
        assert torch.equal(found[:4], wanted[:4] != 0)


@pytest.mark.parametrize("block_size", [1, 8, 11, 128])
@pytest.mark.parametrize("pattern", PATTERNS[:8], ids=str)
def test_compensation_is_the_textbook_loop(pattern: Pattern, block_size: int, device: torch.device) -> None:
    weight, gram = torch.randn(3, 10, 2, dtype=torch.float64), correlated_gram(20, kind="relu")
    found = prune_by_hessian(weight.to(device), gram.to(device), pattern, block_size=block_size)
    mask, new = (each.cpu() for each in found)
    order, runs = order_columns(gram.diagonal(), 10, pattern)
    assert sorted(order.tolist()) == list(range(20))
    gram = damped_gram(gram)[order][:, order]
    if not (isinstance(pattern, NM) and pattern.axis == 1):
        runs = [(column, column + 1) for column in range(20)]
    for row, kept, found in zip(weight.flatten(1), mask.flatten(1), new.flatten(1), strict=True):
        wanted = textbook_row(row[order], gram, runs, lambda start, stop, kept=kept[order]: kept[start:stop])
        torch.testing.assert_close(found[order], wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS[:8], ids=str)
def test_sweeps_lower_the_error_of_each_row_down_to_least_squares(pattern: Pattern, kind: str) -> None:
    weight, gram = torch.randn(5, 20, dtype=torch.float64), correlated_gram(20, kind=kind)
    damped = damped_gram(gram)
    mask, before = prune_by_hessian(weight, gram, pattern)
    for sweeps in (1, 2, 300):
        same, new = prune_by_hessian(weight, gram, pattern, sweeps=sweeps, block_size=7)
        assert torch.equal(mask, same)
        for row, first, second in zip(weight, before, new, strict=True):
            assert output_error(row[None], second[None], damped) <= output_error(row[None], first[None], damped)
        before = new
    wanted = torch.stack([refit_row(row, kept, damped) for row, kept in zip(weight, mask, strict=True)])
    torch.testing.assert_close(before, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_blocks", [2, 3, 4, 6])
def test_one_block_is_the_best_one_and_the_fit_is_exact(num_blocks: int) -> None:
    weight, gram = torch.randn(4, 3 * num_blocks, dtype=torch.float64), correlated_gram(3 * num_blocks)
    damped = damped_gram(gram)
    _, new = prune_by_hessian(weight, gram, Block(cin=3, cout=4, ratio=1 / num_blocks))
    fitted = []
    for removed in range(num_blocks):
        kept = torch.ones(3 * num_blocks, dtype=torch.bool)
        kept[3 * removed : 3 * removed + 3] = False
        fitted.append(torch.stack([refit_row(row, kept, damped) for row in weight]))
    best = min(fitted, key=lambda candidate: output_error(weight, candidate, damped))
    torch.testing.assert_close(new, best, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_several_blocks_are_fitted_exactly_and_of_few_the_best_go(ratio: float, device: torch.device) -> None:
    """They are chosen one by one, which need not find the best set; of six it does."""
    pattern, distances = Block(cin=2, cout=3, ratio=ratio), []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        gram = correlated_gram(6, seed)
        damped = damped_gram(gram)
        mask, new = (each.cpu() for each in prune_by_hessian(weight.to(device), gram.to(device), pattern))
        exact = torch.stack([refit_row(row, kept, damped) for row, kept in zip(weight, mask, strict=True)])
        torch.testing.assert_close(new, exact, rtol=1e-8, atol=1e-10)
        errors = []
        for removed in combinations(range(6), pattern.num_removed((6, 6))):
            blocks = torch.ones(6, dtype=torch.bool).index_fill(0, torch.tensor(removed), False).view(2, 3)
            kept = blocks.repeat_interleave(3, 0).repeat_interleave(2, 1)
            refitted = [refit_row(row, stays, damped) for row, stays in zip(weight, kept, strict=True)]
            errors.append(output_error(weight, torch.stack(refitted), damped))
        distances.append(output_error(weight, new, damped) / min(errors))
    assert distances == pytest.approx([1] * 12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_diagonal_gram_changes_no_kept_weight(pattern: Pattern) -> None:
    weight = torch.randn(16, 32)
    mask, new = prune_by_hessian(weight, torch.eye(32), pattern)
    torch.testing.assert_close(new, masked_by_magnitude(weight, pattern), rtol=1e-6, atol=0)
    torch.testing.assert_close(new[mask], weight[mask], rtol=1e-6, atol=0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_dead_inputs_go_first_and_become_0(pattern: Pattern) -> None:
    weight, gram = torch.randn(16, 32), correlated_gram(32, kind="relu", dtype=torch.float32)
    dead = torch.tensor([0, 8, 16])
    if isinstance(pattern, Block):
        dead = torch.arange(pattern.cin)
    gram[dead], gram[:, dead] = 0, 0
    mask, new = prune_by_hessian(weight, gram, pattern)
    assert (new[:, dead] == 0).all()
    if not (isinstance(pattern, NM) and pattern.axis == 0):
        assert not mask[:, dead].any()
    assert num_kept(mask, pattern) == num_wanted((16, 32), pattern)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fewer_samples_than_inputs(pattern: Pattern, dtype: torch.dtype, damping: float) -> None:
    weight, x = torch.randn(16, 32), torch.randn(5, 32, dtype=dtype)
    mask, new = prune_by_hessian(weight, x.t() @ x, pattern, damping=damping)
    assert new.isfinite().all()
    assert num_kept(mask, pattern) == num_wanted((16, 32), pattern)
    assert new.norm() < 4 * weight.norm()
    assert output_error(weight, new, x.t() @ x) < 0.5 * output_error(
        weight, masked_by_magnitude(weight, pattern), x.t() @ x
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_nothing_to_tell_weights_or_inputs_apart(pattern: Pattern) -> None:
    gram = correlated_gram(32, dtype=torch.float32)
    for weight, products in ((torch.zeros(16, 32), gram), (torch.randn(16, 32), torch.zeros(32, 32))):
        mask, new = prune_by_hessian(weight, products, pattern)
        assert not new.any()
        assert num_kept(mask, pattern) == num_wanted((16, 32), pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_scale_of_inputs_and_the_dtype_of_weights_do_not_matter(pattern: Pattern) -> None:
    weight, gram = torch.randn(16, 32), correlated_gram(32)
    mask, new = prune_by_hessian(weight, gram, pattern)
    for factor in (2.0**-140, 2.0**140):
        again, same = prune_by_hessian(weight, gram * factor, pattern)
        assert torch.equal(mask, again)
        assert torch.equal(new, same)
    half = weight.bfloat16()
    mask, new = prune_by_hessian(half, gram, pattern)
    again, whole = prune_by_hessian(half.float(), gram, pattern)
    assert new.dtype == torch.bfloat16
    assert torch.equal(mask, again)
    assert torch.equal(new, whole.bfloat16())


def test_arguments_stay_as_they_are() -> None:
    weight, gram = torch.randn(8, 8), correlated_gram(8, dtype=torch.float32)
    before = weight.clone(), gram.clone()
    for pattern in (NM(2, 4), Unstructured(0.5), Block(cin=4, cout=4, ratio=0.5)):
        prune_by_hessian(weight, gram, pattern)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram, before[1])

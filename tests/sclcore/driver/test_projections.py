"""Projections against the conditions that make a point the nearest, solved in another way."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sclcore.driver.projections import BALLS, matrix_of, project_vectors, weight_of

# In double, sums of some hundred terms: rounding is 1e-14 of them.
ROUNDING = 1e-12


def matrix(rows: int = 7, columns: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def bisected(shrunk: Callable[[float], Tensor], radius: float, norm: Callable[[Tensor], float]):
    """`shrunk(τ)` of the τ at which its norm, which falls with τ, is `radius`."""
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if norm(shrunk(middle)) > radius else (low, middle)
    return shrunk((low + high) / 2)


def soft(values: Tensor, tau: float) -> Tensor:
    return values.sign() * (values.abs() - tau).clamp(min=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
def test_l1_and_l21_meet_their_duals_bisected(seed: int, share: float) -> None:
    """The dual variable τ is one number: of l1 what elements lose, of l2,1 what norms lose."""
    w = matrix(seed=seed)
    for ball, shrunk in (
        ("l1", lambda tau: soft(w, tau)),
        ("l21", lambda tau: w * soft(w.norm(dim=1), tau)[:, None] / w.norm(dim=1)[:, None]),
    ):
        norm, project = BALLS[ball].norm, BALLS[ball].project
        radius = share * norm(w)
        assert torch.allclose(
            project(w, radius), bisected(shrunk, radius, norm), rtol=0, atol=ROUNDING
        )


def nearest_by_supports(values: Tensor, radius: float) -> Tensor:
    """Brute force: for each set of elements that stay, the nearest point of that face; the best."""
    found: list[tuple[float, Tensor]] = []
    for live in itertools.product([False, True], repeat=len(values)):
        on = torch.tensor(live)
        if not on.any():
            continue
        sizes = torch.where(on, values.abs(), 0.0)
        point = torch.where(on, sizes - (sizes.sum() - radius) / on.sum(), 0.0)
        if (point >= 0).all():
            found.append((float((values.abs() - point).norm()), values.sign() * point))
    return min(found, key=lambda each: each[0])[1]


@pytest.mark.parametrize("seed", range(10))
def test_l1_is_the_nearest_of_all_faces(seed: int) -> None:
    values = matrix(1, 8, seed)[0]
    radius = 0.4 * float(values.abs().sum())
    mine = BALLS["l1"].project(values, radius)
    assert torch.allclose(mine, nearest_by_supports(values, radius), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("ball", ["l1", "l21"])
def test_no_point_of_the_ball_is_nearer(ball: str) -> None:
    """For a convex ball that is ⟨w − p, q − p⟩ ≤ 0 for every q of it."""
    norm, project = BALLS[ball].norm, BALLS[ball].project
    w = matrix()
    radius = 0.3 * norm(w)
    p = project(w, radius)
    for seed in range(1, 300):
        q = matrix(seed=seed)
        q *= radius / norm(q)
        assert float(((w - p) * (q - p)).sum()) <= ROUNDING


@pytest.mark.parametrize("seed", range(5))
def test_the_bi_level_ones_are_two_levels_of_l1(seed: int) -> None:
    """Row by row with bisections, in place of vectors."""
    w = matrix(seed=seed)
    sums, heights = w.abs().sum(1), w.abs().amax(1)

    def on_ball(values: Tensor, radius: float) -> Tensor:
        inside = float(values.abs().sum()) <= radius
        norm = BALLS["l1"].norm
        return values if inside else bisected(lambda tau: soft(values, tau), radius, norm)

    left = on_ball(sums, 0.3 * float(sums.sum()))
    rows = [on_ball(row, float(share)) for row, share in zip(w, left, strict=True)]
    mine = BALLS["l11"].project(w, 0.3 * float(sums.sum()))
    assert torch.allclose(mine, torch.stack(rows), rtol=0, atol=ROUNDING)

    left = on_ball(heights, 0.3 * float(heights.sum()))
    rows = [row.clamp(-float(u), float(u)) for row, u in zip(w, left, strict=True)]
    mine = BALLS["l1inf"].project(w, 0.3 * float(heights.sum()))
    assert torch.allclose(mine, torch.stack(rows), rtol=0, atol=ROUNDING)


def test_bi_level_l11_is_on_the_boundary_of_l1_with_whole_rows_gone() -> None:
    w = matrix(40, 30)
    radius = 0.05 * BALLS["l1"].norm(w)
    nearest, other = BALLS["l1"].project(w, radius), BALLS["l11"].project(w, radius)
    assert BALLS["l1"].norm(other) == pytest.approx(radius, rel=ROUNDING)
    assert (w - other).norm() > (w - nearest).norm()
    assert int((other == 0).all(1).sum()) > int((nearest == 0).all(1).sum())


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outside_ends_on_the_boundary_and_inside_stays(ball: str, dtype: torch.dtype) -> None:
    """In float32 each of 3,000 elements is rounded by up to 6e-8 of itself, and so their sum."""
    norm, project = BALLS[ball].norm, BALLS[ball].project
    w = matrix(50, 60).to(dtype)
    tolerance = ROUNDING if dtype == torch.float64 else 1e-7
    for share in (0.002, 0.1, 0.5, 0.999):
        once = project(w, share * norm(w))
        assert once.dtype == dtype
        assert norm(once) == pytest.approx(share * norm(w), rel=tolerance)
        assert not torch.signbit(once[once == 0]).any()
        assert once.any() and not (once * w < 0).any() and (once.abs() <= w.abs()).all()
        twice = project(once, share * norm(w))
        assert torch.allclose(once, twice, rtol=0, atol=tolerance * float(w.abs().max()))
        assert torch.equal(project(once, norm(w)), once)
    assert torch.equal(project(w, norm(w)), w)
    assert torch.equal(project(w, 2 * norm(w)), w)
    assert not project(w, 0.0).any()
    assert not project(torch.zeros_like(w), 1.0).any()


def test_each_vector_has_its_own_radius() -> None:
    w = matrix()
    sums = w.abs().sum(1)
    radii = sums * torch.linspace(0, 2, len(w), dtype=torch.float64)
    found = project_vectors(w, radii)
    assert torch.allclose(found.abs().sum(1), torch.minimum(radii, sums), rtol=0, atol=ROUNDING)
    for row, other, radius in zip(w, found, radii, strict=True):
        assert torch.allclose(BALLS["l1"].project(row, float(radius)), other, rtol=0, atol=ROUNDING)


def test_ties_are_shrunk_alike() -> None:
    equal = torch.ones(2, 4)
    assert torch.equal(BALLS["l1"].project(equal, 2.0), equal / 4)
    assert torch.allclose(BALLS["l21"].project(equal, 2.0), equal / 2)
    assert torch.equal(BALLS["l11"].project(equal, 2.0), equal / 4)
    assert torch.equal(BALLS["l1inf"].project(equal, 1.0), equal / 2)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(3, 5), (4, 6, 3, 2)])
def test_features_are_the_places_in_a_dimension(axis: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    matrix = matrix_of(weight, axis)
    assert len(matrix) == shape[axis]
    assert torch.equal(matrix[2], weight.select(axis, 2).flatten())
    assert torch.equal(weight_of(matrix, weight, axis), weight)

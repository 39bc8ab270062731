"""Sums over rows, and the results derived from them, against the plain formulas."""
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact import regression


@pytest.mark.parametrize("columns", [7, regression.WIDE + 3])
def test_a_gram_matrix_in_parts_equals_the_product(columns):
  x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
  np.testing.assert_allclose(regression.gram(jnp.asarray(x)), x.T @ x, atol=1e-5)


def test_sums_of_a_layer_match_those_of_its_output():
  rng = np.random.default_rng(0)
  x, kernel, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
                     for shape in ((2, 30, 6), (6, 4), (4,)))
  got = regression.sums_of_layer(x, kernel, bias)
  for mine, expected in zip(got, regression.sums_of(x, x @ kernel + bias[None, None]), strict=True):
    np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)


def test_the_spectrum_gives_the_errors_of_the_best_factors():
  """For every rank: the fit's error in the metric of x, with its largest directions kept."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((400, 8)) * np.geomspace(1, 0.1, 8)
  y = x @ rng.standard_normal((8, 5)) + 0.1 * rng.standard_normal((400, 5)) + 1
  sums = regression.Sums(*(np.asarray(part, np.float64) for part in regression.sums_of(
      jnp.asarray(x), jnp.asarray(y))))
  centred, target = x - x.mean(axis=0), y - y.mean(axis=0)
  fitted = centred @ np.linalg.lstsq(centred, target)[0]
  left, singular, right = np.linalg.svd(fitted, full_matrices=False)
  expected = [np.sum((target - left[:, :rank] * singular[:rank] @ right[:rank]) ** 2)
              / np.sum(target ** 2) for rank in range(1, 6)]
  curve = regression.spectrum(regression.Regression.from_sums(sums))
  np.testing.assert_allclose(curve, expected, atol=2e-4)   # it includes a ridge of 1e-4


def test_a_negative_variance_from_rounding_keeps_the_solution_stable():
  """If it is too negative for the ridge to compensate, that variance is taken as zero."""
  turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
  cov, right = (turn * [2.0, 1.0, -0.5]) @ turn.T, np.arange(6.0).reshape(3, 2)
  expected = np.linalg.solve((turn * [2.1, 1.1, 0.1]) @ turn.T, right)
  np.testing.assert_allclose(regression.solver(cov, 0.1)(right), expected, rtol=1e-9)


def regression_of(x, y):
  sums = regression.sums_of(jnp.asarray(x), jnp.asarray(y))
  return regression.Regression.from_sums(
      regression.Sums(*(np.asarray(part, np.float64) for part in sums)))


def test_the_error_of_factors_is_that_of_their_stacked_products():
  rng = np.random.default_rng(0)
  data = regression_of(rng.standard_normal((50, 6)) + 1, rng.standard_normal((50, 4)) - 2)
  factors = [rng.standard_normal((3, 2)), rng.standard_normal((3, 1))], \
      [rng.standard_normal((2, 4)), rng.standard_normal((1, 4))]
  matrix, bias = regression.product(factors), rng.standard_normal(4)
  assert matrix.shape == (6, 4)
  for given in (None, bias):
    assert data.error_of_factors(*factors, given) == pytest.approx(data.error(matrix, given))


@pytest.mark.parametrize("best, tries", [(0, (2, 3, 1, 0)), (1, (2, 3, 1, 0)), (2, (2, 3, 1)),
                                         (3, (2, 3, 4)), (4, (2, 3, 4))])
def test_the_ridge_search_finds_the_best_one_on_held_out_rows(best, tries):
  """It starts in the middle, and does not try weaker ridges once a stronger one did better."""
  rng = np.random.default_rng(0)
  x, matrix = rng.standard_normal((20, 4)), rng.standard_normal((4, 2))
  held_out, data = (regression_of(x, x @ matrix) for _ in range(2))
  tried = []

  def fit(ridge):
    tried.append(regression.RIDGES.index(ridge))
    return [matrix * (1 + 0.1 * abs(tried[-1] - best))], [np.eye(2)]

  error, ridge, factors = regression.choose_ridge(data, held_out, fit)
  assert ridge == regression.RIDGES[best] and error == pytest.approx(0, abs=1e-6)
  np.testing.assert_array_equal(regression.product(factors), matrix)
  assert tuple(tried) == tries


def test_without_held_out_rows_the_strongest_ridge_is_used():
  data = regression_of(np.eye(4), np.eye(4)[:, :2])
  found = regression.choose_ridge(data, data, lambda ridge: ([np.eye(4)], [np.eye(4)[:, :2]]))
  assert found[1] == regression.RIDGES[-1]

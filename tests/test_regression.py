"""Sums over rows, and what is read off them, against the plain formulas."""
import jax.numpy as jnp
import numpy as np
import pytest

from vitcompact import regression


@pytest.mark.parametrize("columns", [7, regression.WIDE + 3])
def test_a_gram_matrix_in_parts_is_the_product(columns):
  x = np.random.default_rng(0).standard_normal((5, columns)).astype(np.float32)
  np.testing.assert_allclose(regression.gram(jnp.asarray(x)), x.T @ x, atol=1e-5)


def test_sums_of_a_layer_are_those_of_its_output():
  rng = np.random.default_rng(0)
  x, kernel, bias = (jnp.asarray(rng.standard_normal(shape), jnp.float32)
                     for shape in ((2, 30, 6), (6, 4), (4,)))
  got = regression.sums_of_layer(x, kernel, bias)
  for mine, wanted in zip(got, regression.sums_of(x, x @ kernel + bias[None, None]), strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-4)


def test_the_spectrum_is_what_the_best_factors_leave():
  """Of every rank: the error of the fit in the metric of x, its largest directions kept."""
  rng = np.random.default_rng(0)
  x = rng.standard_normal((400, 8)) * np.geomspace(1, 0.1, 8)
  y = x @ rng.standard_normal((8, 5)) + 0.1 * rng.standard_normal((400, 5)) + 1
  sums = regression.Sums(*(np.asarray(part, np.float64) for part in regression.sums_of(
      jnp.asarray(x), jnp.asarray(y))))
  centred, target = x - x.mean(axis=0), y - y.mean(axis=0)
  fitted = centred @ np.linalg.lstsq(centred, target)[0]
  left, singular, right = np.linalg.svd(fitted, full_matrices=False)
  wanted = [np.sum((target - left[:, :rank] * singular[:rank] @ right[:rank]) ** 2)
            / np.sum(target ** 2) for rank in range(1, 6)]
  curve = regression.spectrum(regression.Regression.of(sums))
  np.testing.assert_allclose(curve, wanted, atol=2e-4)   # a ridge of 1e-4 is in it

"""Least squares in closed form, from sums over many rows: float64 on the host.

    y ~ x M + b,   x (rows, p), y (rows, q)

A ridge pulls M towards a known matrix, such as the weights of a dense layer; its strength is
relative to the mean variance of x. The best matrix of a low rank is the best one *in the metric of
x*: it minimises the error of the outputs.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

HIGH = jax.lax.Precision.HIGHEST
WIDE = 1024     # with at least this many columns, x^T x is computed in parts
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)   # candidates; held-out rows decide


class Sums(NamedTuple):
  """Sums over the rows of x, with a constant 1 as its first column, and of y."""
  xx: jax.Array   # (1 + p, 1 + p)
  xy: jax.Array   # (1 + p, q)
  yy: jax.Array   # ()

  def __add__(self, other):
    return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def sums_of(x, y, step: int = 1) -> Sums:
  """Returns `Sums` of x (..., p) and y (..., q), in float32 on the device. With a step, both are
  (images, tokens, channels), and only every `step`-th token is used."""
  x, y = _rows(x, step), _rows(y, step)
  cross = jnp.concatenate([jnp.sum(y, axis=0, keepdims=True),
                           jnp.matmul(x.T, y, precision=HIGH)])
  return Sums(_moments(x), cross, jnp.sum(y * y))


def sums_of_layer(x, kernel, bias, step: int = 1) -> Sums:
  """Returns `sums_of(x, x @ kernel + bias)`, computed from the products of x alone."""
  matrix = jnp.concatenate([bias[None], kernel]).astype(jnp.float32)
  xx = _moments(_rows(x, step))
  xy = jnp.matmul(xx, matrix, precision=HIGH)
  return Sums(xx, xy, jnp.sum(matrix * xy))


def _rows(x, step: int):
  """Returns x as (rows, p), float32. Tokens are skipped within images, so that no rows move between
  devices."""
  x = x if step == 1 else x[:, ::step]
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _moments(x):
  """Returns x^T x (1 + p, 1 + p) of rows with a constant 1 in front."""
  total = jnp.sum(x, axis=0)
  return jnp.block([[jnp.full((1, 1), len(x), jnp.float32), total[None]],
                    [total[:, None], gram(x)]])


def gram(x):
  """Returns x^T x of (rows, p); if p is large, in 4 x 4 parts, 10 of which are computed."""
  if x.shape[1] < WIDE:
    return jnp.matmul(x.T, x, precision=HIGH)
  parts = jnp.array_split(x, 4, axis=1)
  above = {(i, j): jnp.matmul(parts[i].T, parts[j], precision=HIGH)
           for i in range(4) for j in range(i, 4)}
  return jnp.block([[above[i, j] if i <= j else above[j, i].T for j in range(4)]
                    for i in range(4)])


class Regression(NamedTuple):
  """Means and centred second moments of x and y, from which all fits below are computed."""
  rows: float
  mean_x: np.ndarray    # (p,)
  mean_y: np.ndarray    # (q,)
  cov: np.ndarray       # (p, p)
  cross: np.ndarray     # (p, q)
  energy: float         # E |y - mean|^2

  @classmethod
  def from_sums(cls, sums: Sums) -> "Regression":
    rows = float(sums.xx[0, 0])
    mean_x, mean_y = sums.xx[0, 1:] / rows, sums.xy[0] / rows
    cov, cross = sums.xx[1:, 1:] / rows, sums.xy[1:] / rows
    cov -= mean_x[:, None] * mean_x
    cross -= mean_x[:, None] * mean_y
    return cls(rows, mean_x, mean_y, cov, cross,
               max(float(sums.yy / rows - mean_y @ mean_y), 0.0))

  def bias(self, matrix) -> np.ndarray:
    """Returns the best b for a given M."""
    return self.mean_y - self.mean_x @ matrix

  def error(self, matrix, bias=None) -> float:
    """Returns E |y - x M - b|^2 / E |y - mean|^2; bias=None: with the best b."""
    error = self.energy - 2 * np.sum(matrix * self.cross) + np.sum(matrix * (self.cov @ matrix))
    if bias is not None:
      error += np.sum((self.bias(matrix) - bias) ** 2)
    return self._relative(error)

  def error_of_factors(self, lefts, rights, bias=None) -> float:
    """Returns `error` of the matrix in which the products lefts[k] @ rights[k] are stacked, without
    computing with its p rows. lefts: (p / n, r) each, n of them; rights (r, q)."""
    size = len(self.cov) // len(lefts)
    slices = [slice(at, at + size) for at in range(0, len(self.cov), size)]
    cov_left = np.concatenate([self.cov[:, at] @ left for left, at in
                               zip(lefts, slices, strict=True)], axis=1)
    # Moments of the values x A of all factors, and of these with y.
    value_cov, value_cross = (np.concatenate([left.T @ moments[at] for left, at in
                                              zip(lefts, slices, strict=True)])
                              for moments in (cov_left, self.cross))
    right = np.concatenate(rights)
    error = self.energy - 2 * np.sum(right * value_cross) + np.sum(right * (value_cov @ right))
    if bias is not None:
      means = np.concatenate([self.mean_x[at] @ left for left, at in
                              zip(lefts, slices, strict=True)])
      error += np.sum((self.mean_y - means @ right - bias) ** 2)
    return self._relative(error)

  def _relative(self, error) -> float:
    return max(float(error), 0.0) / max(self.energy, np.finfo(np.float32).tiny)

  def strength(self, ridge: float) -> float:
    """Returns what a relative ridge adds to each variance of x."""
    return ridge * max(float(np.trace(self.cov)) / len(self.cov), np.finfo(np.float32).tiny)


def cholesky(cov, ridge: float) -> np.ndarray:
  """Returns the lower Cholesky factor of cov + ridge; negative eigenvalues of cov count as 0."""
  eye = ridge * np.eye(len(cov))
  try:
    return scipy.linalg.cholesky(cov + eye, lower=True)
  except np.linalg.LinAlgError:   # rounding of float32 sums can make it indefinite
    values, vectors = np.linalg.eigh(cov)
    return scipy.linalg.cholesky((vectors * np.maximum(values, 0)) @ vectors.T + eye, lower=True)


def solver(cov, ridge: float):
  """Returns the function right -> (cov + ridge)^-1 right."""
  factor = cholesky(cov, ridge)
  return lambda right: scipy.linalg.cho_solve((factor, True), right)


def closest_factors(matrix, cov_matrix, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns A (p, rank), B (rank, q) whose product is closest to M (p, q) in the metric C of x.

  cov_matrix: C M. M is projected on the leading eigenvectors of M^T C M, its outputs' moments.
  """
  outputs = matrix.T @ cov_matrix
  leading = np.linalg.eigh((outputs + outputs.T) / 2)[1][:, -rank:]
  return balance_factors(matrix @ leading, leading.T)


def balance_factors(a, b) -> tuple[np.ndarray, np.ndarray]:
  """Returns factors of A B with small entries: large ones that cancel lose digits in float32."""
  (left, r), (right, s) = np.linalg.qr(a), np.linalg.qr(b.T)
  u, singular, v = np.linalg.svd(r @ s.T)
  half = np.sqrt(singular)
  return left @ (u * half), (half[:, None] * v) @ right.T


class Factors(NamedTuple):
  """x A B + b; fitted, held_out: relative errors on the rows of the fit and on those held out."""
  a: np.ndarray
  b: np.ndarray
  bias: np.ndarray
  fitted: float
  held_out: float


def fit_held_out_and_all(sums) -> tuple[Regression, Regression, Regression]:
  """Returns the `Regression` of the rows to fit, of those held out, and of both together. All three
  are the same if none are held out."""
  fit = Regression.from_sums(sums[0])
  if sums[0] is sums[1]:
    return fit, fit, fit
  return fit, Regression.from_sums(sums[1]), Regression.from_sums(sums[0] + sums[1])


def spectrum(data: Regression) -> np.ndarray:
  """Returns the least relative squared error of y with factors of rank 1, 2, ...."""
  half = scipy.linalg.solve_triangular(cholesky(data.cov, data.strength(RIDGES[0])), data.cross,
                                       lower=True)
  # Eigenvalues of the fitted y's covariance, from the smaller of two matrices that share them.
  product = half @ half.T if half.shape[0] < half.shape[1] else half.T @ half
  variances = np.maximum(np.linalg.eigvalsh(product)[::-1], 0)
  return np.maximum(data.energy - np.cumsum(variances), 0) / max(data.energy, 1e-30)


def choose_ridge(data: Regression, held_out: Regression, fit):
  """Returns (error, ridge, factors) of the ridge with the least error on the held-out rows; of the
  strongest ridge if no rows are held out (`held_out` is `data`).

  fit: a function ridge -> factors (see `error_of_factors`) fitted to `data`. The error falls with
  ridges and then rises, so the search starts in the middle, and tries weaker ridges only if the
  next stronger one does worse.
  """
  def tried(ridge):
    factors = fit(ridge)
    return held_out.error_of_factors(*factors, data.bias(product(factors))), ridge, factors

  if held_out is data:
    return tried(RIDGES[-1])
  middle = len(RIDGES) // 2
  start = best = tried(RIDGES[middle])
  for ridges in (RIDGES[middle + 1:], RIDGES[:middle][::-1]):
    for ridge in ridges:
      found = tried(ridge)
      if found[0] >= best[0]:
        break
      best = found
    if best is not start:
      break
  return best


def product(factors) -> np.ndarray:
  """Returns the matrix in which the products of each pair of (lefts, rights) are stacked."""
  return np.concatenate([left @ right for left, right in zip(*factors, strict=True)])


def low_rank(sums, old, rank: int) -> tuple[Factors, Regression]:
  """Returns (factors of rank `rank` fitted to y, moments of all rows). The ridge that does best on
  the held-out rows pulls the fit towards `old` (p, q).

  sums: `Sums` (of the rows to fit, of those held out), as `Calibration.sums` returns them.
  """
  fit, held_out, both = fit_held_out_and_all(sums)

  def fitted(ridge):
    a, b = _low_rank_factors(fit, old, rank, ridge)
    return [a], [b]

  held_out_error, ridge, factors = choose_ridge(fit, held_out, fitted)
  error, ((a,), (b,)) = fit.error_of_factors(*factors), factors
  if both is not fit:   # finally fit all rows
    a, b = _low_rank_factors(both, old, rank, ridge)
  return Factors(a, b, both.bias(a @ b), error, held_out_error), both


def _low_rank_factors(data: Regression, old, rank: int, ridge: float):
  ridge = data.strength(ridge)
  right = data.cross + ridge * old
  return closest_factors(solver(data.cov, ridge)(right), right, rank)

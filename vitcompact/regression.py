"""Least squares in closed form, from sums over many rows: float64 on the host.

    y ~ x M + b,   x (rows, p), y (rows, q)

A ridge pulls M towards a matrix that is known already, such as the weights of a dense layer, with
a strength relative to the mean variance of x. The best matrix of a low rank is the best one *in the
metric of x*: errors count as they show in the outputs.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

HIGH = jax.lax.Precision.HIGHEST
WIDE = 1024     # columns of which products are worth computing in parts
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)   # tried, and chosen among by rows held out


def ridges(sums) -> tuple[float, ...]:
  """Those to try for (fit, held): where nothing is held out to choose by, the strongest alone."""
  return RIDGES if sums[0] is not sums[1] else RIDGES[-1:]


class Sums(NamedTuple):
  """Over the rows of x and y, which come with the constant 1 in front."""
  xx: jax.Array   # (1 + p, 1 + p)
  xy: jax.Array   # (1 + p, q)
  yy: jax.Array   # ()

  def __add__(self, other):
    return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def sums_of(x, y, step: int = 1) -> Sums:
  """Of rows (..., p) and (..., q), in float32 on the device; of every `step`-th token where these
  are (images, tokens, ...)."""
  x, y = _rows(x, step), _rows(y, step)
  cross = jnp.concatenate([jnp.sum(y, axis=0, keepdims=True),
                           jnp.matmul(x.T, y, precision=HIGH)])
  return Sums(_moments(x), cross, jnp.sum(y * y))


def sums_of_layer(x, kernel, bias, step: int = 1) -> Sums:
  """`sums_of` of x and x @ kernel + bias, from the products of x alone."""
  matrix = jnp.concatenate([bias[None], kernel]).astype(jnp.float32)
  xx = _moments(_rows(x, step))
  xy = jnp.matmul(xx, matrix, precision=HIGH)
  return Sums(xx, xy, jnp.sum(matrix * xy))


def _rows(x, step: int):
  """(rows, p), float32. Every image keeps as many, so that those on a device stay there."""
  x = x if step == 1 else x[:, ::step]
  return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


def _moments(x):
  """(1 + p, 1 + p) of rows that the constant 1 is put in front of."""
  total = jnp.sum(x, axis=0)
  return jnp.block([[jnp.full((1, 1), len(x), jnp.float32), total[None]],
                    [total[:, None], gram(x)]])


def gram(x):
  """x^T x of (rows, p): of four parts of many columns, those above the diagonal, and no more."""
  if x.shape[1] < WIDE:
    return jnp.matmul(x.T, x, precision=HIGH)
  parts = jnp.array_split(x, 4, axis=1)
  above = {(i, j): jnp.matmul(parts[i].T, parts[j], precision=HIGH)
           for i in range(4) for j in range(i, 4)}
  return jnp.block([[above[i, j] if i <= j else above[j, i].T for j in range(4)]
                    for i in range(4)])


class Regression(NamedTuple):
  """Means and centred second moments of x and y: what every fit below needs."""
  rows: float
  mean_x: np.ndarray    # (p,)
  mean_y: np.ndarray    # (q,)
  cov: np.ndarray       # (p, p)
  cross: np.ndarray     # (p, q)
  energy: float         # E |y - mean|^2

  @classmethod
  def of(cls, sums: Sums) -> "Regression":
    rows = float(sums.xx[0, 0])
    second, cross = sums.xx / rows, sums.xy / rows
    mean_x, mean_y = second[0, 1:], cross[0]
    return cls(rows, mean_x, mean_y, second[1:, 1:] - np.outer(mean_x, mean_x),
               cross[1:] - np.outer(mean_x, mean_y),
               max(float(sums.yy / rows - mean_y @ mean_y), 0.0))

  def bias(self, matrix) -> np.ndarray:
    """The b that goes with M."""
    return self.mean_y - self.mean_x @ matrix

  def error(self, matrix, bias=None) -> float:
    """E |y - x M - b|^2 / E |y - mean|^2; without a bias, with the best one."""
    miss = self.energy - 2 * np.sum(matrix * self.cross) + np.sum(matrix * (self.cov @ matrix))
    if bias is not None:
      miss += np.sum((self.bias(matrix) - bias) ** 2)
    return max(float(miss), 0.0) / max(self.energy, np.finfo(np.float32).tiny)

  def strength(self, ridge: float) -> float:
    """What a relative ridge adds to each variance of x."""
    return ridge * max(float(np.trace(self.cov)) / len(self.cov), np.finfo(np.float32).tiny)


def solver(cov, ridge: float):
  """A function right -> (cov + ridge)^-1 right."""
  eye = ridge * np.eye(len(cov))
  try:
    factor = scipy.linalg.cho_factor(cov + eye)
  except np.linalg.LinAlgError:   # sums in float32 are positive but for rounding
    values, vectors = np.linalg.eigh(cov)
    factor = scipy.linalg.cho_factor((vectors * np.maximum(values, 0)) @ vectors.T + eye)
  return lambda right: scipy.linalg.cho_solve(factor, right)


def closest_factors(matrix, seen, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """A (p, rank), B (rank, q) whose product is closest to M (p, q) in the metric C of x.

  seen: C M. M is projected on the leading eigenvectors of M^T C M, the moments of its outputs.
  """
  outputs = matrix.T @ seen
  leading = np.linalg.eigh((outputs + outputs.T) / 2)[1][:, -rank:]
  return balanced(matrix @ leading, leading.T)


def balanced(a, b) -> tuple[np.ndarray, np.ndarray]:
  """The factors of A B with the least entries: in float32, large ones that cancel lose digits."""
  (left, r), (right, s) = np.linalg.qr(a), np.linalg.qr(b.T)
  u, singular, v = np.linalg.svd(r @ s.T)
  half = np.sqrt(singular)
  return left @ (u * half), (half[:, None] * v) @ right.T


class Factors(NamedTuple):
  """x A B + b; fitted, held_out: relative errors, the second on rows that A and B never saw."""
  a: np.ndarray
  b: np.ndarray
  bias: np.ndarray
  fitted: float
  held_out: float


def split(sums) -> tuple[Regression, Regression, Regression]:
  """Of the rows to fit, of those held out, and of both together; alike where none are held out."""
  fit, held = (Regression.of(part) for part in sums)
  return fit, held, fit if sums[0] is sums[1] else Regression.of(sums[0] + sums[1])


def spectrum(data: Regression) -> np.ndarray:
  """Relative squared error of y that factors of rank 1, 2, ... leave at best."""
  cov = data.cov + data.strength(RIDGES[0]) * np.eye(len(data.cov))
  # The variances of the fitted y: singular values of its rows, squared, without its rows.
  fitted = data.cross.T @ scipy.linalg.solve(cov, data.cross, assume_a="sym")
  variances = np.maximum(np.linalg.eigvalsh(fitted)[::-1], 0)[:min(data.cross.shape)]
  return np.maximum(data.energy - np.cumsum(variances), 0) / max(data.energy, 1e-30)


def chosen(sums, fit):
  """(error on the rows held out, ridge, factors) of the ridge that does best there.

  fit: a function of a ridge that gives factors and the matrix that they make, from the first of
  `sums`. The error falls with the ridge and then rises: what comes after is not tried.
  """
  first, held, _ = split(sums)
  best = None
  for ridge in ridges(sums):
    factors, matrix = fit(ridge)
    error = held.error(matrix, first.bias(matrix))
    if best is not None and error >= best[0]:
      break
    best = error, ridge, factors
  return best


def low_rank(sums, old, rank: int) -> tuple[Factors, Regression]:
  """The fit of a rank to y, pulled towards `old` (p, q) as strongly as held-out rows want it, and
  the moments of all rows, of which it is made.

  sums: (of the rows to fit, of those to choose the ridge by), as `Calibration.sums` returns them.
  """
  fit, _, both = split(sums)

  def fitted(ridge):
    a, b = _low_rank(fit, old, rank, ridge)
    return (a, b), a @ b

  held_out, ridge, (a, b) = chosen(sums, fitted)
  error = fit.error(a @ b)
  if both is not fit:   # else these are the factors of all rows already
    a, b = _low_rank(both, old, rank, ridge)
  return Factors(a, b, both.bias(a @ b), error, held_out), both


def _low_rank(data: Regression, old, rank: int, ridge: float):
  ridge = data.strength(ridge)
  right = data.cross + ridge * old
  return closest_factors(solver(data.cov, ridge)(right), right, rank)

"""cFFN: factorises the FFN's output matrix; trains several branches, deploys two matrices.

Our reconstruction of compact-FFN (Xu et al., arXiv 2306.10875), of which only the abstract is
public. With H the activated hidden layer (m wide), r the rank and d the output width:

    train:   u = sum_i BN_i(H A_i) + mean_groups(H) * alpha,    y = sum_j BN'_j(u B_j)
    deploy:  y = (H A) B + b

There is no activation between the factors, so every branch folds into A, B and b.
"""
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype

from vitcompact.layers import (
  GATED,
  Dense,
  Mlp,
  ffn_layer,
  fold_dense_norm,
  linear,
  unfold_dense_norm,
)
from vitcompact.methods.ffn.branch_norms import EPSILON, Norm, sum_of_norms
from vitcompact.methods.protocol import Site
from vitcompact.regression import (
    Factors,
    Regression,
    low_rank,
    spectrum,
    sums_of,
    sums_of_layer,
)
from vitcompact.torch_names import Entry
from vitcompact.torch_names import linear as linear_entries
from vitcompact.tracing import param
from vitcompact.trees import Leaf


@dataclasses.dataclass(frozen=True)
class CFFN:
  """FFN axis: factorise, re-parameterise.

  rank_ratio: rank / width of the block, in (0, 1].
  branches: number of parallel copies of each factor in training; folded into one for deployment.
  rep: what follows each branch: "bn" batch norm, "scale" a learned scale, "none" nothing (parallel
    branches then add no expressive power).
  avg_skip: adds group averages of the hidden layer, scaled by alpha, to the bottleneck (only if the
    rank divides the hidden width).
  apply_to: "all" blocks, or only "attention_blocks" (hybrids have blocks without attention).
  factor: which matrices to factorise: "output", or "both" (ours: the input matrix too, at the same
    rank).
  """
  axis: ClassVar[str] = "ffn"
  provenance: ClassVar = ("arXiv 2306.10875, of which only the abstract is public",
                          "our reconstruction: everything except that the output matrix is "
                          "factorised and trained with re-parameterisation")
  rules: ClassVar = [
      (r".*/fc1/a\d?/kernel", Leaf(("embed", "rank"), decay=True)),
      (r".*/fc1/b\d?/kernel", Leaf(("rank", "mlp"), decay=True)),
      (r".*/fc2/a\d?/kernel", Leaf(("mlp", "rank"), decay=True)),
      (r".*/fc2/b\d?/kernel", Leaf(("rank", "embed"), decay=True)),
      (r".*/fc[12]/(alpha|[ab]\d_scale)", Leaf()),
  ]

  rank_ratio: float = 0.5
  branches: int = 2
  rep: str = "bn"
  avg_skip: bool = True
  apply_to: str = "all"
  factor: str = "output"

  def __post_init__(self):
    number = isinstance(self.rank_ratio, (int, float)) and not isinstance(self.rank_ratio, bool)
    if not number or not 0 < self.rank_ratio <= 1:
      raise ValueError(f"CFFN(rank_ratio={self.rank_ratio!r}): must be in (0, 1]")
    is_int = isinstance(self.branches, int) and not isinstance(self.branches, bool)
    if not is_int or self.branches < 1:
      raise ValueError(f"CFFN(branches={self.branches!r}): must be a whole number of at least 1")
    for field, allowed in (("rep", ("bn", "scale", "none")), ("avg_skip", (True, False)),
                           ("apply_to", ("all", "attention_blocks")),
                           ("factor", ("output", "both"))):
      if getattr(self, field) not in allowed:
        raise ValueError(f"CFFN({field}={getattr(self, field)!r}): must be one of {allowed}")

  def rank(self, width: int) -> int:
    return max(1, int(self.rank_ratio * width + 0.5))

  def acts(self, site: Site) -> bool:
    return self.apply_to == "all" or "attention" in site.provides

  def factorised(self, site: Site) -> dict[str, "CompactDense"]:
    """Returns {layer: its factorised form}, without layers that are deployed as one matrix."""
    if site.ffn_norm:
      rms = 1.0
    elif site.ffn_batch_norm:
      rms = hidden_rms(site.act, UNIT_FAN_IN)
    else:
      rms = hidden_rms(site.act, site.ffn_width, site.mixer_gain)
    sizes = {"fc2": (site.ffn_width, rms)}
    if self.factor == "both":
      sizes["fc1"] = (site.fc1_width, 1.0)
    return {layer: CompactDense(
        features, self.rank(site.ffn_width), branches=self.branches, rep=self.rep,
        avg_skip=self.avg_skip, deploy=site.deploy, input_rms=input_rms, dtype=site.dtype,
        parent=None) for layer, (features, input_rms) in sizes.items()
            if not (site.deploy and layer in site.merged)}

  def mergeable(self, site: Site) -> tuple[str, ...]:
    del site
    return ("fc1", "fc2") if self.factor == "both" else ("fc2",)

  def merge(self, site: Site, params):
    """Returns the parameters of one dense layer that computes what two deployed factors do."""
    del site
    kernel = _matmul(params["a"]["kernel"], params["b"]["kernel"])
    return {"kernel": kernel, "bias": params["b"]["bias"]}

  def check(self, site: Site):
    """Warns if factors m x r and r x d are no smaller than m x d: r >= m d / (m + d)."""
    rank, m = self.rank(site.ffn_width), site.ffn_width
    for layer in self.factorised(site):
      d = site.fc1_width if layer == "fc1" else site.hidden
      if rank * (m + d) >= m * d:
        rows, columns = (m, d) if layer == "fc1" else (d, m)
        warnings.warn(f"blocks_{site.block}/mlp/{layer}: rank {rank} saves nothing on a {rows} x "
                      f"{columns} matrix; break-even is rank {m * d / (m + d):.0f}, lower "
                      "rank_ratio", stacklevel=4)

  def make(self, site: Site, **kwargs) -> nn.Module:
    layers = {name: ffn_layer(site, name) for name in ("fc1", "fc2")} | self.factorised(site)
    return Mlp(**layers, **site.mlp_options(), **kwargs)

  def from_dense(self, site: Site, params, stats, data):
    """Factorises fc1 before fc2, so that fc2 is fitted to the hidden layer that it will get. A
    batch norm after a layer is folded into its factors."""
    mlp, mlp_stats = params["mlp"], dict(stats.get("mlp", {}))
    new = dict(mlp)
    for layer, module in sorted(self.factorised(site).items()):
      old_stats = mlp_stats.pop(layer, {})
      old = fold_dense_norm(mlp[layer], old_stats)
      # The FFN is fitted last: what comes before the layer does not change any more.
      final = ("attn/out", "mlp/fc1") if layer == "fc2" else ("attn/out",)
      fit = data and module.fit(old, data.sums(SUMS[layer], mlp[layer], final=final))
      new[layer], new_stats = module.from_dense(old, fit)
      mlp_stats |= {layer: new_stats} if new_stats else {}
      if fit is not None:
        data.note(f"ffn {layer}", fitted=fit.factors.fitted, held_out=fit.factors.held_out)
        a, b, bias = (jnp.asarray(x, jnp.float32) for x in fit.factors[:3])
        mlp = {**mlp, layer: unfold_dense_norm(mlp[layer], old_stats, _matmul(a, b), bias)}
        data = data.with_params({**params, "mlp": mlp})
    stats = {name: leaf for name, leaf in stats.items() if name != "mlp"}
    return {**params, "mlp": new}, {**stats, "mlp": mlp_stats} if mlp_stats else stats

  @classmethod
  def options(cls, site: Site) -> list["CFFN"]:
    """Returns ranks, for the output matrix and for both, that save at least a tenth of a matrix."""
    m, d = site.hidden, site.ffn_width
    ranks = {ratio: cls(rank_ratio=ratio).rank(d) for ratio in RATIOS}
    return [cls(rank_ratio=ratio, factor=factor) for factor in ("output", "both")
            for ratio, rank in ranks.items() if rank * (m + d) < 0.9 * m * d]

  @classmethod
  def statistics(cls, params):
    """Returns the function that sums over inputs and outputs of both layers."""
    return dense_layer_sums, (params["mlp"],)

  @classmethod
  def estimate(cls, options, site: Site, sums):
    """Returns errors of the layers' outputs at each rank, summed if both are factorised; and the
    curves of error over rank, as a share of full rank."""
    curves = {layer: spectrum(Regression.from_sums(part)) for layer, part in sums.items()}
    errors = [sum(curves[layer][method.rank(site.ffn_width) - 1]
                  for layer in (("fc1", "fc2") if method.factor == "both" else ("fc2",)))
              for method in options]
    return errors, {f"{layer}_error": sample_curve(curve) for layer, curve in curves.items()}

  def fold(self, site: Site, params, stats):
    mlp, mlp_stats = params["mlp"], stats.get("mlp", {})
    for layer, module in self.factorised(site).items():
      folded, _ = module.fold(mlp[layer], mlp_stats.get(layer, {}))
      mlp = {**mlp, layer: self.merge(site, folded) if layer in site.merged else folded}
    return {**params, "mlp": mlp}, {name: leaf for name, leaf in stats.items() if name != "mlp"}

  def torch_entries(self, site: Site, torch: str, ours: str) -> list[Entry]:
    """Returns entries of the factors as linear layers, of which only the second has a bias."""
    factors = self.factorised(site) if site.deploy else {}
    entries = []
    for layer in ("fc1", "fc2"):
      theirs, path = f"{torch}.mlp.{layer}", f"{ours}/mlp/{layer}"
      if layer in factors:
        entries += linear_entries(f"{theirs}.a", f"{path}/a", use_bias=False)
        entries += linear_entries(f"{theirs}.b", f"{path}/b")
      else:
        entries += linear_entries(theirs, path)
    return entries


def group_mean(x, groups: int):
  """Returns means over equal groups of neighbouring channels: (..., m) -> (..., groups)."""
  return x.reshape(*x.shape[:-1], groups, -1).mean(axis=-1)


def skip_kernel(alpha_r, m: int):
  """Returns the matrix (m, r) for which x times it is group_mean(x, r) * alpha."""
  r = alpha_r.shape[0]
  return jnp.repeat(jnp.diag(alpha_r) * (r / m), m // r, axis=0)


class Kernel(nn.Module):
  """Owns the matrix of one branch, and returns it."""
  features: int
  std: float

  @nn.compact
  def __call__(self, x):
    return param(self, "kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))


def hidden_rms(act: Callable | None, fan_in: int, gain: float = 1) -> float:
  """Returns the root mean square of act(x W) for x of unit variance and W ~ N(0, 0.02^2), by
  Gauss-Hermite quadrature. gain: the factor by which a mixer between W and act multiplies the
  variance (of the gate, if act is gated).
  """
  points, weights = np.polynomial.hermite_e.hermegauss(32)
  spread = 0.02 * (gain * fan_in) ** 0.5
  if act in GATED:   # a gate and a value, independent of each other
    points = np.stack(np.meshgrid(points, points), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).reshape(-1, 1)
    spread = np.array([[spread, 0.02 * fan_in ** 0.5]])
  z = spread * points
  if act is not None:
    # Evaluated at trace time even inside jit: only the number is needed. Jitted, because otherwise
    # a surrounding vmap would trace a function with a custom gradient.
    with jax.ensure_compile_time_eval():
      z = np.asarray(jax.jit(act)(jnp.asarray(z, jnp.float32)))
  return float(np.sqrt(np.sum(weights * z ** 2) / np.sum(weights)))


class CompactDense(nn.Module):
  """y = (x A) B + b: several branches of A and B in training, one of each once folded (`deploy`).

  Leaves: a0.. and b0.. kernels with a0_norm.. or a0_scale.. depending on `rep`, alpha, bias; when
  deployed: a/kernel, b/kernel, b/bias.

  input_rms: the expected root mean square of the input. It scales the initial weights so that the
    output has the standard deviation of a dense layer with weights N(0, 0.02^2).
  """
  features: int
  rank: int
  branches: int = 2
  rep: str = "bn"
  avg_skip: bool = True
  deploy: bool = False
  input_rms: float = 1.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, x, train: bool = False):
    if self.deploy:
      return self._linear("b", self.features, use_bias=True)(self._linear("a", self.rank)(x))
    m, n = x.shape[-1], self.branches
    out_std = 0.02 * m ** 0.5 * self.input_rms      # of a dense layer
    normed = self.rep == "bn"
    # The scale of the batch norm sets the std; with this a_std, its input has unit variance, as its
    # initial statistics say.
    a_std = 1 / (m ** 0.5 * self.input_rms) if normed else 0.02 / n ** 0.5
    b_std = (n * self.rank) ** -0.5
    skip = None
    if self.avg_skip and m % self.rank == 0:
      skip = param(self, "alpha", nn.initializers.zeros, (self.rank,))
    u = self._factor("a", x, self.rank, a_std, 1.0, train, skip=skip)
    bias = None
    if not normed:
      bias = param(self, "bias", nn.initializers.zeros, (self.features,))
    return self._factor("b", u, self.features, b_std, out_std / n ** 0.5, train, bias=bias)

  def _linear(self, name, features, use_bias=False):
    return Dense(features, use_bias=use_bias, dtype=self.dtype, name=name,
                 kernel_init=nn.initializers.normal(0.02))

  def _factor(self, factor, x, features, std, gamma, train, skip=None, bias=None):
    """Returns the sum of the branches of one factor, plus the group means of x times `skip`."""
    kernels = [Kernel(features, std, name=f"{factor}{i}")(x) for i in range(self.branches)]
    if self.rep == "bn":
      norms = [Norm(features, gamma, name=f"{factor}{i}_norm") for i in range(self.branches)]
      if train:
        # Not concatenated along a sharded axis: for few tokens, the partitioner of jax 0.10 would
        # compute a wrong result.
        joined = jnp.stack(kernels, axis=1).reshape(x.shape[-1], -1)
        y = sum_of_norms(_product(x, joined, None, self.dtype), norms)
        return y if skip is None else y + group_mean(x, features).astype(y.dtype) * _like(skip, y)
      affine = [norm.running() for norm in norms]
      kernels = [kernel * scale[None] for kernel, (scale, _) in zip(kernels, affine, strict=True)]
      bias = sum(shift for _, shift in affine)
    elif self.rep == "scale":
      kernels = [kernel * param(self, f"{factor}{i}_scale", nn.initializers.ones, (features,))[None]
                 for i, kernel in enumerate(kernels)]
    # The branches are summed directly: one product with the sum of the kernels.
    kernel = sum(kernels)
    return _product(x, kernel if skip is None else kernel + skip_kernel(skip, x.shape[-1]), bias,
                    self.dtype)

  @nn.nowrap
  def fold(self, params, stats):
    """Sums the branches into one A, one B and one bias; returns (params, {}) of the deployed
    module."""
    if self.deploy:
      return params, stats
    a, a_shift = self._sum_branches("a", params, stats)
    b, b_shift = self._sum_branches("b", params, stats)
    if "alpha" in params:
      m = a.shape[0]
      a = a + skip_kernel(params["alpha"], m)
    bias = _matmul(a_shift, b) + b_shift + params.get("bias", 0)
    return {"a": {"kernel": a}, "b": {"kernel": b, "bias": bias}}, {}

  def _sum_branches(self, factor, params, stats):
    """Returns sum_i K_i diag(s_i), and the shift sum_i (beta_i - mean_i s_i)."""
    kernel, shift = 0, 0
    for i in range(self.branches):
      name = f"{factor}{i}"
      branch = params[name]["kernel"]
      if self.rep == "bn":
        norm, norm_stats = params[f"{name}_norm"], stats[f"{name}_norm"]
        scale = norm["scale"] / jnp.sqrt(norm_stats["var"] + EPSILON)
        branch = branch * scale[None]
        shift = shift + norm["bias"] - norm_stats["mean"] * scale
      elif self.rep == "scale":
        branch = branch * params[f"{name}_scale"][None]
      kernel = kernel + branch
    return kernel, shift + jnp.zeros(kernel.shape[1], kernel.dtype)

  @nn.nowrap
  def fit(self, params, sums) -> "Fit":
    """Returns the factors that come closest to a layer's target outputs. sums: (of the images to
    fit to, of the held-out images), see `calibration.Calibration.sums`."""
    old = np.asarray(params["kernel"], np.float64)
    factors, both = low_rank(sums, old, min(self.rank, *old.shape))
    return Fit(factors, both.mean_x, both.cov)

  @nn.nowrap
  def from_dense(self, params, fit=None):
    """Returns (params, stats) that approximate a dense layer at this rank.

    Args:
      params: {"kernel": (m, d), "bias": (d,) or absent}.
      fit: the result of `fit`, whose input statistics also initialise the batch norms. None: uses
        the truncated singular value decomposition, and batch norms with running variance
        1 - epsilon, so that inference is exact, but training differs at first.
    """
    kernel = params["kernel"]
    if fit is None:
      a, b = truncated_factors(kernel, self.rank)
      bias = params.get("bias", 0) + jnp.zeros(kernel.shape[1], kernel.dtype)
    else:
      a, b, bias = (jnp.asarray(x, kernel.dtype) for x in fit.factors[:3])
    if self.deploy:
      return {"a": {"kernel": a}, "b": {"kernel": b, "bias": bias}}, {}
    moments = None if fit is None else tuple(jnp.asarray(x, jnp.float32)
                                             for x in (fit.mean, fit.cov))
    return _to_branches(self.clone(parent=None, name=None), a, b, bias, moments)

  @nn.nowrap
  def _to_branches(self, a, b, bias, moments):
    """Returns (params, stats) of the training form of x A B + b; moments: mean and covariance of x.
    """
    mean = cov = u_mean = u_cov = None
    if moments is not None:
      mean, cov = moments
      u_mean, u_cov = _matmul(mean, a), _matmul(_matmul(a.T, cov), a)
    a_params, a_stats = self._split("a", a, mean, cov)
    b_params, b_stats = self._split("b", b, u_mean, u_cov)
    out = {**a_params, **b_params}
    if self.rep == "bn":
      for j in range(self.branches):
        norm = out[f"b{j}_norm"]
        out[f"b{j}_norm"] = {**norm, "bias": norm["bias"] + bias / self.branches}
    else:
      out["bias"] = bias
    if self.avg_skip and a.shape[0] % self.rank == 0:
      out["alpha"] = jnp.zeros(self.rank, a.dtype)
    return out, {**a_stats, **b_stats}

  @nn.nowrap
  def _split(self, factor, kernel, mean, cov):
    """Splits `kernel` into branches that sum to it, with noise: equal ones would stay equal."""
    n, out, stats = self.branches, {}, {}
    noise = jax.random.normal(jax.random.key(0), (n, *kernel.shape), kernel.dtype)
    noise = (noise - noise.mean(axis=0, keepdims=True)) * kernel.std() if n > 1 else noise * 0
    for i in range(n):
      name, branch = f"{factor}{i}", kernel / n + noise[i] * (0.5 / n)
      out[name] = {"kernel": branch}
      if self.rep == "scale":
        out[f"{name}_scale"] = jnp.ones(kernel.shape[1], kernel.dtype)
      elif self.rep == "bn":
        centre, var = jnp.zeros(kernel.shape[1]), jnp.full(kernel.shape[1], 1 - EPSILON)
        if cov is not None:
          centre = _matmul(mean, branch)
          var = jnp.maximum(jnp.sum(branch * _matmul(cov, branch), axis=0), 0)
        out[f"{name}_norm"] = {"scale": jnp.sqrt(var + EPSILON), "bias": centre}
        stats[f"{name}_norm"] = {"mean": centre, "var": var}
    return out, stats


class Fit(NamedTuple):
  """The factors of a layer, and the mean (m,) and covariance (m, m) of its inputs."""
  factors: Factors
  mean: np.ndarray
  cov: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _to_branches(layer: CompactDense, a, b, bias, moments):
  """Jits the method, so that equal blocks share one program instead of compiling each operation."""
  return layer._to_branches(a, b, bias, moments)


def fc1_sums(seen, params):
  """Returns sums over the inputs of fc1 and the dense layer's outputs."""
  return _layer_sums(seen.inputs, seen.fc1, params, seen.step)


def _layer_sums(x, y, params, step: int):
  if "norm" in params:
    return sums_of(x, y, step)
  bias = params.get("bias", jnp.zeros(params["kernel"].shape[-1]))
  return sums_of_layer(x, params["kernel"], bias, step)


def fc2_sums(seen, params):
  """Returns sums over the inputs of fc2 and the target outputs of the FFN."""
  del params
  return sums_of(seen.hidden, seen.target_ffn, seen.step)


def sample_curve(curve) -> list[list[float]]:
  """Returns [[share of full rank, error], ...] at about 32 ranks."""
  ranks = np.unique(np.linspace(1, len(curve), 33, dtype=int)).tolist()
  return [[round(rank / len(curve), 4), float(f"{curve[rank - 1]:.3g}")] for rank in ranks]


def dense_layer_sums(seen, params):
  """Returns sums over the inputs and outputs of both layers of a dense FFN."""
  return {"fc1": fc1_sums(seen, params["fc1"]),
          "fc2": _layer_sums(seen.hidden, seen.ffn, params["fc2"], seen.step)}


SUMS = {"fc1": fc1_sums, "fc2": fc2_sums}
UNIT_FAN_IN = 0.02 ** -2   # the fan-in for which outputs have unit variance, as after a norm
RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625)   # rank / width of the proposed options


def truncated_factors(kernel, rank: int):
  """Returns A (m, r) and B (r, d) that minimise ||W - A B||."""
  left, singular, right = jnp.linalg.svd(kernel, full_matrices=False)
  root = jnp.sqrt(singular[:rank])
  return left[:, :rank] * root[None], root[:, None] * right[:rank]


def _product(x, kernel, bias, dtype):
  return linear(*promote_dtype(x, kernel, bias, dtype=dtype))


def _matmul(x, y):
  """Multiplies in full float32, for folding and factorising, whatever the platform's default."""
  return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _like(vector, x):
  """Returns the vector in the dtype of x, with leading axes of size 1 to match its rank."""
  return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

"""Batch norms of branches that are summed: computed in one pass, with a custom backward pass."""
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import optimization_barrier

from vitcompact.tracing import param, traced_once

EPSILON, MOMENTUM = 1e-5, 0.9


@jax.custom_vjp
def batch_norms(z_nk, gamma_br, beta_br):
  """Splits z's last axis, k = branches * r, into branches, normalises each over n, and sums them.

  Returns y (n, r), in z's dtype, and mean and var (branches, r), which have no gradient. All is
  computed in float32.
  """
  return _batch_norms_forward(z_nk, gamma_br, beta_br)[0]


def _branches(z_nk, branches: int):
  """Returns the branches as slices: XLA:CPU is several times slower with an axis of size two."""
  return [part.astype(jnp.float32) for part in jnp.split(z_nk, branches, axis=1)]


def _batch_norms_forward(z_nk, gamma_br, beta_br):
  branches_nr = _branches(z_nk, len(gamma_br))
  mean_br = jnp.stack([part.mean(axis=0) for part in branches_nr])
  var_br = jnp.stack([jnp.mean((part - mean[None]) ** 2, axis=0)
                      for part, mean in zip(branches_nr, mean_br, strict=True)])
  inverse_br = jax.lax.rsqrt(var_br + EPSILON)
  scale_br = gamma_br * inverse_br
  y_nr = (beta_br - mean_br * scale_br).sum(axis=0)[None]
  for part, scale in zip(branches_nr, scale_br, strict=True):
    y_nr = y_nr + part * scale[None]
  return (y_nr.astype(z_nk.dtype), mean_br, var_br), (z_nk, mean_br, inverse_br, gamma_br)


def _batch_norms_backward(saved, cotangents):
  z_nk, mean_br, inverse_br, gamma_br = saved
  dy_nr = optimization_barrier(cotangents[0]).astype(jnp.float32)
  n, dbeta_r = len(z_nk), dy_nr.sum(axis=0)
  dz, dgamma = [], []
  branches_nr = _branches(z_nk, len(gamma_br))
  for part, mean, inverse, gamma in zip(branches_nr, mean_br, inverse_br, gamma_br, strict=True):
    centred = part - mean[None]
    dgamma_r = (dy_nr * centred).sum(axis=0) * inverse
    scale = gamma * inverse
    dz.append(scale[None] * dy_nr - (scale * dbeta_r / n)[None] -
              (scale * inverse * dgamma_r / n)[None] * centred)
    dgamma.append(dgamma_r)
  dbeta_br = jnp.broadcast_to(dbeta_r[None], gamma_br.shape)
  return (jnp.concatenate(dz, axis=1).astype(z_nk.dtype),
          jnp.stack(dgamma).astype(gamma_br.dtype), dbeta_br.astype(gamma_br.dtype))


batch_norms.defvjp(_batch_norms_forward, _batch_norms_backward)
batch_norms = traced_once(batch_norms)


class Norm(nn.Module):
  """The leaves of one branch's batch norm, with the names of nn.BatchNorm."""
  features: int
  gamma: float

  def setup(self):
    shape = (self.features,)
    self.scale = param(self, "scale", nn.initializers.constant(self.gamma), shape)
    self.bias = param(self, "bias", nn.initializers.zeros, shape)
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
    self.var = self.variable("batch_stats", "var", jnp.ones, shape)

  def affine(self):
    """Returns (scale, bias) as used in training."""
    return self.scale, self.bias

  def running(self):
    """Returns (scale, shift) of the affine map that it computes in inference."""
    scale = self.scale / jnp.sqrt(self.var.value + EPSILON)
    return scale, self.bias - self.mean.value * scale

  def update(self, mean, var):
    """Moves the running statistics towards those of a batch."""
    if not self.is_initializing():
      self.mean.value = MOMENTUM * self.mean.value + (1 - MOMENTUM) * mean
      self.var.value = MOMENTUM * self.var.value + (1 - MOMENTUM) * var


def sum_of_norms(z, norms):
  """Applies one batch norm to each equal slice of z's last axis, in training; returns the sum."""
  gamma_br, beta_br = (jnp.stack(leaves) for leaves in zip(*(norm.affine() for norm in norms),
                                                           strict=True))
  y_nr, mean_br, var_br = batch_norms(z.reshape(-1, z.shape[-1]), gamma_br, beta_br)
  for norm, mean, var in zip(norms, mean_br, var_br, strict=True):
    norm.update(mean, var)
  return y_nr.reshape(*z.shape[:-1], y_nr.shape[1])

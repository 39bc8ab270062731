"""Losses, one number per image, computed in float32 whatever the dtype of the logits."""
import jax
import jax.numpy as jnp


def cross_entropy(logits_bk: jax.Array, targets_bk: jax.Array) -> jax.Array:
  """-sum_k y_k log softmax(z)_k: (B,). Targets are probabilities: one-hot, smoothed or mixed."""
  return -jnp.sum(targets_bk * jax.nn.log_softmax(logits_bk.astype(jnp.float32)), axis=-1)


def hard_distillation(student_bk: jax.Array, teacher_bk: jax.Array) -> jax.Array:
  """Cross entropy with the teacher's prediction, neither smoothed nor mixed (DeiT): (B,)."""
  choice_bk = jax.nn.one_hot(jnp.argmax(teacher_bk, axis=-1), teacher_bk.shape[-1])
  return cross_entropy(student_bk, choice_bk)


def soft_distillation(student_bk: jax.Array, teacher_bk: jax.Array, temperature) -> jax.Array:
  """tau^2 KL(teacher / tau || student / tau) / K: (B,).

  The division by K is DeiT's: its loss is the sum over images and classes, divided by both counts.
  """
  student_bk = jax.nn.log_softmax(student_bk.astype(jnp.float32) / temperature)
  teacher_bk = jax.nn.log_softmax(teacher_bk.astype(jnp.float32) / temperature)
  divergence_bk = jnp.exp(teacher_bk) * (teacher_bk - student_bk)
  return temperature**2 * jnp.mean(divergence_bk, axis=-1)


def divergence(student_bk: jax.Array, teacher_bk: jax.Array) -> jax.Array:
  """KL(teacher || student) of logits (..., K): (...). Its mean equals PyTorch's "batchmean"."""
  student_bk = jax.nn.log_softmax(student_bk.astype(jnp.float32))
  teacher_bk = jax.nn.log_softmax(teacher_bk.astype(jnp.float32))
  return jnp.sum(jnp.exp(teacher_bk) * (teacher_bk - student_bk), axis=-1)


def token_square(student_bpw: jax.Array, teacher_bpw: jax.Array, keep_bp: jax.Array) -> jax.Array:
  """Squared error of the features of surviving patches: (B,); see `over_survivors`."""
  error_bpw = student_bpw.astype(jnp.float32) - teacher_bpw.astype(jnp.float32)
  return over_survivors(jnp.mean(error_bpw ** 2, axis=-1), keep_bp)


def token_divergence(student_bpk: jax.Array, teacher_bpk: jax.Array,
                     keep_bp: jax.Array) -> jax.Array:
  """KL(teacher || student) of the logits of surviving patches: (B,); see `over_survivors`."""
  return over_survivors(divergence(student_bpk, teacher_bpk), keep_bp)


def mean_maps(student_bhnm: jax.Array, teacher_bhnm: jax.Array) -> jax.Array:
  """|S - T|^2 / |T|^2: (B,), where S and T are the maps of student and teacher averaged over heads.

  Averaged because compacting a model permutes, merges and removes heads. Ours, not from a paper.
  """
  student_bnm, teacher_bnm = (maps.astype(jnp.float32).mean(axis=1)
                              for maps in (student_bhnm, teacher_bhnm))
  error_b = jnp.sum((student_bnm - teacher_bnm) ** 2, axis=(1, 2))
  return error_b / jnp.sum(teacher_bnm ** 2, axis=(1, 2))


def over_survivors(loss_bp: jax.Array, keep_bp: jax.Array) -> jax.Array:
  """(B,), whose mean is the mean of `loss_bp` over all patches of the batch with keep mask 1.

  The keep mask gets no gradient. If no patch survives, the result is 0.
  """
  keep_bp = jax.lax.stop_gradient(keep_bp)
  # Not a product with the mask: 0 times the NaN of a dropped patch would be NaN.
  total_b = jnp.sum(jnp.where(keep_bp > 0, loss_bp, 0), axis=1)
  return total_b / jnp.maximum(jnp.mean(jnp.sum(keep_bp, axis=1)), 1 / keep_bp.shape[0])

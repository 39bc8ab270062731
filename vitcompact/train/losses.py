"""Losses, one number per image, in float32 whatever the dtype of the logits."""
import jax
import jax.numpy as jnp

from vitcompact.models.lvvit import TokenLogits


def cross_entropy(logits_bk: jax.Array, targets_bk: jax.Array) -> jax.Array:
  """-sum_k y_k log softmax(z)_k: (B,). Targets are probabilities, smoothed or mixed or one-hot."""
  return -jnp.sum(targets_bk * jax.nn.log_softmax(logits_bk.astype(jnp.float32)), axis=-1)


def classification(outputs, targets_bk: jax.Array, token_weight: float = 1.0):
  """What a model returns in training against the labels: (mean loss, logits of the class guess).

  Of several linear heads (distilled DeiT without a teacher), each learns from the labels. LV-ViT's
  class token learns from the mixture that MixToken made of its image, its patches from their own
  image's label; `token_weight` is 1 in the authors' code.
  """
  if isinstance(outputs, TokenLogits):
    mixed_bk = outputs.share * targets_bk + (1 - outputs.share) * targets_bk[::-1]
    by_token_bn = cross_entropy(outputs.token_logits, targets_bk[:, None])
    loss_b = cross_entropy(outputs.logits, mixed_bk) + token_weight * by_token_bn.mean(axis=-1)
    return loss_b.mean(), outputs.logits
  heads = outputs if isinstance(outputs, tuple) else (outputs,)
  loss = sum(cross_entropy(logits, targets_bk).mean() for logits in heads) / len(heads)
  return loss, sum(logits.astype(jnp.float32) for logits in heads)


def hard_distillation(student_bk: jax.Array, teacher_bk: jax.Array) -> jax.Array:
  """Cross entropy with the teacher's choice, neither smoothed nor mixed (DeiT): (B,)."""
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

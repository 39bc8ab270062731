"""Losses of Sparsifiner's two phases (Wei et al., arXiv 2303.13755), one number per image.

Phase 1 (`plan.with_links(masked=False)`, attention dense, backbone frozen): 0.01 times
`attention_reconstruction`, summed over the images of a batch as published. Phase 2: cross entropy +
0.5 `logit_distillation` + 0.5 `token_distillation`, where predictors get no gradient.
"""
import jax
import jax.numpy as jnp

RECONSTRUCTION_WEIGHT = 0.01
LOGIT_WEIGHT = 0.5
TOKEN_WEIGHT = 0.5


def attention_reconstruction(links) -> jax.Array:
  """(1 / L) sum over L blocks, heads, queries and keys of (score - target)^2: (B,).

  links: the collection "links" that `model.apply(..., mutable=["links"])` returns: for each block
    its predictor's "score" and the "target", the block's own dense attention, both (B, heads, N, M)
    (of blocks of tokens where links are).
  """
  pairs = [block["links"] for block in links.values()]
  if not pairs:
    raise ValueError("no block of this model has a predictor of links: give its plan "
                     "links=Sparsifiner(...), with min_tokens below its number of tokens")
  errors = [jnp.sum((pair["score"][0] - pair["target"][0]) ** 2, axis=(1, 2, 3)) for pair in pairs]
  return sum(errors) / len(errors)


def logit_distillation(student_bk: jax.Array, teacher_bk: jax.Array) -> jax.Array:
  """KL(teacher || student) over classes, at temperature 1: (B,)."""
  student_bk = jax.nn.log_softmax(student_bk.astype(jnp.float32))
  teacher_bk = jax.nn.log_softmax(teacher_bk.astype(jnp.float32))
  return jnp.sum(jnp.exp(teacher_bk) * (teacher_bk - student_bk), axis=-1)


def token_distillation(student_bnw: jax.Array, teacher_bnw: jax.Array) -> jax.Array:
  """Mean squared difference of patch tokens after the last norm (LV-ViT: of their logits): (B,)."""
  difference = student_bnw.astype(jnp.float32) - teacher_bnw.astype(jnp.float32)
  return jnp.mean(difference ** 2, axis=(1, 2))

"""What Sparsifiner's two phases learn from (Wei et al., arXiv 2303.13755).

Phase 1 (`plan.with_links(masked=False)`, attention dense, backbone frozen): 0.01 times
`attention_reconstruction`, summed over the images of a batch as published. Phase 2: cross entropy +
0.5 `losses.divergence` of the logits + 0.5 `losses.token_square` of the patches after the last norm
(LV-ViT: of their logits); predictors get no gradient.
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

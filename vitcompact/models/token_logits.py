"""What a model that classifies each patch too returns in training."""
import flax.struct
import jax


@flax.struct.dataclass
class TokenLogits:
  """The output in training of a model that classifies each patch too (LV-ViT).

  logits: (B, K) of the class token, whose target is share * t + (1 - share) * t[::-1].
  token_logits: (B, N, K), each at the place of its patch in its own image, so that the targets of
    patches need no mixing.
  share: (), the part of the grid that stayed with its own image.
  keep_mask: (B, N), 0 for patches that a reducer dropped or fused, whose token_logits are
    meaningless, else 1 (a merged patch has the logits of the token that holds it).

  loss = soft cross entropy of logits + weight * mean over kept patches of the soft cross entropy of
  token_logits (the authors' weight is 1).
  """
  logits: jax.Array
  token_logits: jax.Array
  share: jax.Array
  keep_mask: jax.Array

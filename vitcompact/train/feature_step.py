"""Evaluation of a model without a classifier: its features beside those of a teacher."""
import jax.numpy as jnp

from vitcompact.data import batch as device_batch


def make_feature_eval_step(model, teacher, mean, std):
  """As `step.make_eval_step`, of a model without a classifier: a function ((variables, the
  teacher's), batch) -> sums. loss: |features - teacher's|^2 as a share of |teacher's|^2, of each
  image. batch: "image" (B, H, W, C) uint8 and "mask" (B,), which says what images count."""
  def eval_step(both, batch):
    images = device_batch.normalise(batch["image"], mean, std)
    got, wanted = (network.apply(variables, images).reshape(len(images), -1)
                   for network, variables in zip((model, teacher), both, strict=True))
    error = jnp.sum((got - wanted) ** 2, axis=-1) / jnp.sum(wanted ** 2, axis=-1)
    return {"loss": jnp.sum(error * batch["mask"]), "count": jnp.sum(batch["mask"])}
  return eval_step

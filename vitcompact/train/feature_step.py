"""Evaluates a model without a classifier: compares its features with those of a teacher."""
import jax.numpy as jnp

from vitcompact.data import batch as device_batch


def make_feature_eval_step(model, teacher, mean, std):
  """Like `step.make_eval_step`, for a model without a classifier: a function ((variables, teacher
  variables), batch) -> sums. The loss of an image is |features - teacher's|^2 / |teacher's|^2.
  batch: "image" (B, H, W, C) uint8 and "mask" (B,), 1 for the images that count."""
  def eval_step(both, batch):
    images = device_batch.normalise(batch["image"], mean, std)
    features, target = (network.apply(variables, images).reshape(len(images), -1)
                        for network, variables in zip((model, teacher), both, strict=True))
    error = jnp.sum((features - target) ** 2, axis=-1) / jnp.sum(target ** 2, axis=-1)
    return {"loss": jnp.sum(error * batch["mask"]), "count": jnp.sum(batch["mask"])}
  return eval_step

"""What a model does with a batch of images before its layers see it."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vitcompact import attention


def check_images(model, images_bhwc):
  """Raises ValueError, one line, where images are not of the one size that a model takes."""
  height, width, channels = *np.broadcast_to(model.image_size, 2), model.in_chans
  if images_bhwc.shape[1:] != (height, width, channels):
    raise ValueError(f"images of shape {images_bhwc.shape}: this model takes (B, {height}, "
                     f"{width}, {channels}); create it with image_size= and in_chans=")


def in_parts(call):
  """A model's `__call__`, which in inference computes `plan.at_a_time` images after another, for
  what these need may fit a processor's caches.

  The same function of each image. Training, whose batch norms see a batch, calls from which
  something is collected besides the logits, such as features, batches that lie on several devices
  and those of no fixed size (`jax.export`) run all at once.
  """
  @functools.wraps(call)
  def wrapped(self, images_bhwc, train: bool = False):
    many, batch = self.plan.at_a_time, images_bhwc.shape[0]
    whole_batch = train or self.is_initializing() or self.scope.mutable or attention.split()
    if many is None or whole_batch or not isinstance(batch, int) or batch <= many:
      return call(self, images_bhwc, train)
    whole, alone = batch - batch % many, self.clone(parent=None, name=None)

    def apply(images):
      return alone.apply(self.variables, images)

    parts = jax.lax.map(apply, images_bhwc[:whole].reshape(-1, many, *images_bhwc.shape[1:]))
    out = parts.reshape(whole, *parts.shape[2:])
    return out if whole == batch else jnp.concatenate([out, apply(images_bhwc[whole:])])

  return wrapped

"""What happens to a whole batch on the device: jittable, static shapes, float32, keyed.

The published order (DeiT) is: normalise, erase, then mix with smoothed targets, so that each of
two mixed images was erased before. An erased box is filled with N(0, 1) in network units, which
is why it comes after normalising.
"""
import math

import jax
import jax.numpy as jnp


def normalise(images_u8, mean, std):
  """(x / 255 - mean) / std: uint8 (B, H, W, 3) and two triples -> float32 (B, H, W, 3)."""
  mean, std = (jnp.asarray(t, jnp.float32).reshape(1, 1, 1, -1) for t in (mean, std))
  return (images_u8.astype(jnp.float32) / 255 - mean) / std


def one_hot_smooth(labels, num_classes: int, smoothing: float):
  """int (B,) -> float32 (B, K): 1 - s + s/K for the label, s/K elsewhere."""
  return jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes


def erase(key, images, probability: float):
  """Random erasing: with `probability` a box of an image becomes N(0, 1), per pixel and channel.

  Its area is 2 % to 1/3 of the image and its aspect 0.3 to 1/0.3, in ten attempts to be strictly
  smaller than the image in both directions. images: (B, H, W, C), normalised.
  """
  b, height, width, _ = images.shape
  fire_key, area_key, aspect_key, top_key, left_key, fill_key = jax.random.split(key, 6)
  fires = jax.random.bernoulli(fire_key, probability, (b,))
  area = jax.random.uniform(area_key, (b, 10), minval=0.02, maxval=1 / 3) * (height * width)
  log_aspect = jax.random.uniform(aspect_key, (b, 10), minval=math.log(0.3),
                                  maxval=math.log(1 / 0.3))
  h = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
  w = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits, axis=1, keepdims=True)
  h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
  fires &= jnp.any(fits, axis=1)
  top = jax.random.randint(top_key, (b,), 0, jnp.maximum(height - h, 0) + 1)
  left = jax.random.randint(left_key, (b,), 0, jnp.maximum(width - w, 0) + 1)
  inside = jax.vmap(box_mask, (0, 0, 0, 0, None, None))(top, top + h, left, left + w, height, width)
  box = (inside & fires[:, None, None])[..., None]
  return jnp.where(box, jax.random.normal(fill_key, images.shape, images.dtype), images)


def box_mask(top, bottom, left, right, height: int, width: int):
  """bool (height, width), true in rows top..bottom-1 and columns left..right-1."""
  rows, columns = jnp.arange(height), jnp.arange(width)
  return (((rows >= top) & (rows < bottom))[:, None] &
          ((columns >= left) & (columns < right))[None, :])


def cut_box(lam, centre_y, centre_x, height: int, width: int):
  """CutMix's box of about (1 - lam) of the area: (top, bottom, left, right), clipped.

  Half of an odd side is rounded down on both sides of the centre, so it loses a pixel.
  """
  half_h = (height * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
  half_w = (width * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
  return (jnp.clip(centre_y - half_h, 0, height), jnp.clip(centre_y + half_h, 0, height),
          jnp.clip(centre_x - half_w, 0, width), jnp.clip(centre_x + half_w, 0, width))


def _draw_keep(key, height, width, mixup_alpha, cutmix_alpha, switch_prob):
  """How much of its own image each pixel keeps, float32 (height, width): one draw.

  Constant for mixup, 0 in the box and 1 around it for cutmix. The mean is the weight of the
  image's own target: cutmix's lam after its box was clipped.
  """
  switch_key, lam_key, y_key, x_key = jax.random.split(key, 4)
  if not mixup_alpha or not cutmix_alpha:
    switch_prob = float(not mixup_alpha)
  cuts = jax.random.bernoulli(switch_key, switch_prob)
  alpha = jnp.where(cuts, cutmix_alpha, mixup_alpha)
  lam = jax.random.beta(lam_key, alpha, alpha)
  box = cut_box(lam, jax.random.randint(y_key, (), 0, height),
                jax.random.randint(x_key, (), 0, width), height, width)
  return jnp.where(cuts, ~box_mask(*box, height, width), lam)


def mix(key, images, targets, *, mixup_alpha: float, cutmix_alpha: float,
        switch_prob: float = 0.5, groups: int = 1):
  """Mixup or cutmix of each image with its partner: the batch, or each group of it, reversed.

  images: float (B, H, W, C); targets: float32 (B, K), already smoothed. Each of `groups` runs of
  B / groups images draws once: cutmix with switch_prob, else mixup. lam ~ Beta(alpha, alpha); an
  alpha of 0 turns that mix off, both 0 return the inputs. ValueError unless groups are even.
  """
  if not mixup_alpha and not cutmix_alpha:
    return images, targets
  b, height, width, _ = images.shape
  if b % (2 * groups):
    raise ValueError(f"a batch of {b} in {groups=} has {b / groups:g} images a group: mixing "
                     "pairs each image with another, so it must be an even number")
  keep = jax.vmap(lambda k: _draw_keep(k, height, width, mixup_alpha, cutmix_alpha, switch_prob))(
      jax.random.split(key, groups))

  def blend(x, weight):
    x = x.reshape(groups, b // groups, *x.shape[1:])
    mixed = weight * x + (1 - weight) * x[:, ::-1]
    return mixed.reshape(b, *x.shape[2:])

  lam = jnp.mean(keep, axis=(1, 2))[:, None, None]
  return blend(images, keep[:, None, :, :, None].astype(images.dtype)), blend(targets, lam)


def microbatches(batch, count: int, groups: int):
  """(B, ...) -> (count, B / count, ...), leaf by leaf: microbatch j has groups j, j + count, ...

  Whole groups, so that who mixes with whom does not depend on `count`; strided, so that each device
  keeps its own images. Where `count` does not divide the groups, images are dealt out one by one.
  """
  def split(array):
    runs = groups if groups % count == 0 else array.shape[0]
    dealt = array.reshape(runs // count, count, array.shape[0] // runs, *array.shape[1:])
    return jnp.moveaxis(dealt, 1, 0).reshape(count, -1, *array.shape[1:])
  return jax.tree.map(split, batch)


def roi_weights(start, end, cells: int, bins: int):
  """RoIAlign along one axis: float32 (bins, cells), how much each bin takes of each cell.

  start, end: of the window, in cells, where a cell's centre is a whole number. The window is at
  least one cell long (the unaligned form). A bin is the mean of ceil(length / bins) points at equal
  distances, each interpolated linearly between two cells; beyond the borders by up to one cell the
  border counts, and further out nothing does.
  """
  length = jnp.maximum(end - start, 1)
  most = -(-cells // bins)  # a window is not longer than the axis, but for rounding
  count = jnp.minimum(jnp.ceil(length / bins), most)
  point = jnp.arange(most, dtype=jnp.float32)
  at = start + length / bins * (jnp.arange(bins)[:, None] + (point[None, :] + 0.5) / count)
  counts = (point[None, :] < count) & (at >= -1) & (at <= cells)
  near = jnp.clip(at, 0, cells - 1)[..., None]
  share = jnp.maximum(0, 1 - jnp.abs(near - jnp.arange(cells, dtype=jnp.float32)[None, None, :]))
  return jnp.sum(jnp.where(counts[..., None], share, 0), axis=1) / count


def label_targets(label_map, label_box, num_classes: int, smoothing: float, grid: tuple[int, int]):
  """LV-ViT's targets: of the class token, float32 (B, K), and of the patches, (B, N, K).

  label_map: (B, 2, 5, h, w), five logits at each place of the whole image and their classes; other
  classes have 0. label_box: (B, 4), the crop's (left, top, right, bottom) as shares of the image.
  grid: rows and columns of patches, N in all.
  The window's logits are pooled to 1 x 1 and to the grid by RoIAlign, then softmax, then smoothed:
  t (1 - s + s/K) + s/K, which sums to 1 + s/K, as published.
  """
  h, w = label_map.shape[-2:]
  logits, classes = label_map[:, 0].astype(jnp.float32), label_map[:, 1].astype(jnp.int32)
  scale = jnp.array([w, h, w, h], jnp.float32).reshape(1, 4)
  left, top, right, bottom = (label_box.astype(jnp.float32) * scale - 0.5).T

  # Place by place: the sum over its five, 0 for all other classes. (B, h, w, K).
  is_class = classes[..., None] == jnp.arange(num_classes).reshape(1, 1, 1, 1, -1)
  dense_bijk = jnp.sum(jnp.where(is_class, logits[..., None], 0), axis=1)
  off = smoothing / num_classes

  def target(rows, columns):
    from_rows = jax.vmap(lambda a, b: roi_weights(a, b, h, rows))(top, bottom)
    from_columns = jax.vmap(lambda a, b: roi_weights(a, b, w, columns))(left, right)
    pooled = jnp.einsum("bri,bcj,bijk->brck", from_rows, from_columns, dense_bijk,
                        precision=jax.lax.Precision.HIGHEST)
    pooled = pooled.reshape(-1, rows * columns, num_classes)
    return jax.nn.softmax(pooled, axis=-1) * (1 - smoothing + off) + off

  return target(1, 1)[:, 0], target(*grid)

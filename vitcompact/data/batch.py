"""Augmentation of a batch on the device: jittable functions of a key, static shapes, float32.

DeiT's published order is: normalise, random erasing, then mixing with smoothed targets. Erasing
comes after normalising because it fills a box with N(0, 1) in normalised units.
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
  """Random erasing: with `probability`, fills a box of an image with N(0, 1) noise.

  The box has 2 % to 1/3 of the image's area and an aspect of 0.3 to 1/0.3: the first of ten draws
  that is strictly smaller than the image in both directions. images: (B, H, W, C), normalised.
  """
  b, height, width, _ = images.shape
  erase_key, area_key, aspect_key, top_key, left_key, fill_key = jax.random.split(key, 6)
  erased = jax.random.bernoulli(erase_key, probability, (b,))
  area = jax.random.uniform(area_key, (b, 10), minval=0.02, maxval=1 / 3) * (height * width)
  log_aspect = jax.random.uniform(aspect_key, (b, 10), minval=math.log(0.3),
                                  maxval=math.log(1 / 0.3))
  h = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
  w = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits, axis=1, keepdims=True)
  h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
  erased &= jnp.any(fits, axis=1)
  top = jax.random.randint(top_key, (b,), 0, jnp.maximum(height - h, 0) + 1)
  left = jax.random.randint(left_key, (b,), 0, jnp.maximum(width - w, 0) + 1)
  inside = jax.vmap(box_mask, (0, 0, 0, 0, None, None))(top, top + h, left, left + w, height, width)
  box = (inside & erased[:, None, None])[..., None]
  return jnp.where(box, jax.random.normal(fill_key, images.shape, images.dtype), images)


def box_mask(top, bottom, left, right, height: int, width: int):
  """bool (height, width): true in rows top..bottom-1 and columns left..right-1."""
  rows, columns = jnp.arange(height), jnp.arange(width)
  return (((rows >= top) & (rows < bottom))[:, None] &
          ((columns >= left) & (columns < right))[None, :])


def cut_box(lam, centre_y, centre_x, height: int, width: int):
  """CutMix's box with about (1 - lam) of the area: (top, bottom, left, right), clipped.

  Half a side is rounded down, so a box with an odd side is one pixel smaller.
  """
  half_h = (height * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
  half_w = (width * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
  return (jnp.clip(centre_y - half_h, 0, height), jnp.clip(centre_y + half_h, 0, height),
          jnp.clip(centre_x - half_w, 0, width), jnp.clip(centre_x + half_w, 0, width))


def _draw_keep(key, height, width, mixup_alpha, cutmix_alpha, switch_prob):
  """Draws the weight of an image's own pixels in its mix, float32 (height, width).

  It is constant for mixup; for cutmix 0 in the box and 1 outside. Its mean is the weight of the
  image's own target, which for cutmix is lam after the box was clipped.
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
  """Mixup or cutmix of each image with its partner in the group's reverse order.

  images: float (B, H, W, C); targets: float32 (B, K), already smoothed. The batch is split into
  `groups` slices of consecutive images, and each slice draws once: cutmix with switch_prob, else
  mixup. lam ~ Beta(alpha, alpha); an alpha of 0 turns that mix off, and with both 0 the inputs are
  returned. ValueError unless each slice has an even number of images.
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
  """(B, ...) -> (count, B / count, ...) for each leaf: microbatch j has groups j, j + count, ...

  Groups are not split, so that mixing pairs do not depend on `count`; they are strided, so that no
  image has to change its device. If `count` does not divide `groups`, images are strided instead.
  """
  def split(array):
    slices = groups if groups % count == 0 else array.shape[0]
    strided = array.reshape(slices // count, count, array.shape[0] // slices, *array.shape[1:])
    return jnp.moveaxis(strided, 1, 0).reshape(count, -1, *array.shape[1:])
  return jax.tree.map(split, batch)


def roi_weights(start, end, cells: int, bins: int):
  """The weights of RoIAlign along one axis: float32 (bins, cells), of each cell in each bin.

  start, end: the window in cells, with cell centres at whole numbers. The window is at least one
  cell long (the unaligned form). A bin is the mean of ceil(length / bins) equidistant points, each
  interpolated linearly between two cells; points up to one cell outside take the value at the
  border, and those further out count as 0.
  """
  length = jnp.maximum(end - start, 1)
  max_count = -(-cells // bins)  # except for rounding, a window is not longer than the axis
  count = jnp.minimum(jnp.ceil(length / bins), max_count)
  point = jnp.arange(max_count, dtype=jnp.float32)
  at = start + length / bins * (jnp.arange(bins)[:, None] + (point[None, :] + 0.5) / count)
  valid = (point[None, :] < count) & (at >= -1) & (at <= cells)
  clipped = jnp.clip(at, 0, cells - 1)[..., None]
  share = jnp.maximum(0, 1 - jnp.abs(clipped - jnp.arange(cells, dtype=jnp.float32)[None, None, :]))
  return jnp.sum(jnp.where(valid[..., None], share, 0), axis=1) / count


def label_targets(label_map, label_box, num_classes: int, smoothing: float, grid: tuple[int, int]):
  """LV-ViT's targets: of the class token, float32 (B, K), and of the patches, (B, N, K).

  label_map: (B, 2, 5, h, w), five logits at each position of the whole image and their classes;
  other classes have logit 0. label_box: (B, 4), the crop's (left, top, right, bottom) as shares of
  the image. grid: rows and columns of patches, N in all.
  RoIAlign pools the crop's logits to 1 x 1 and to the grid; then softmax and smoothing:
  t (1 - s + s/K) + s/K, which sums to 1 + s/K, as published.
  """
  h, w = label_map.shape[-2:]
  logits, classes = label_map[:, 0].astype(jnp.float32), label_map[:, 1].astype(jnp.int32)
  scale = jnp.array([w, h, w, h], jnp.float32).reshape(1, 4)
  left, top, right, bottom = (label_box.astype(jnp.float32) * scale - 0.5).T

  # Dense logits (B, h, w, K): those of the five classes at each position, else 0.
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

"""Losses, one number per image, in float32 whatever the dtype of the logits."""
import jax
import jax.numpy as jnp


def cross_entropy(logits_bk: jax.Array, targets_bk: jax.Array) -> jax.Array:
  """-sum_k y_k log softmax(z)_k: (B,). Targets are probabilities, smoothed or mixed or one-hot."""
  return -jnp.sum(targets_bk * jax.nn.log_softmax(logits_bk.astype(jnp.float32)), axis=-1)


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


def divergence(student_bk: jax.Array, teacher_bk: jax.Array) -> jax.Array:
  """KL(teacher || student) of logits (..., K): (...). Its mean is PyTorch's "batchmean"."""
  student_bk = jax.nn.log_softmax(student_bk.astype(jnp.float32))
  teacher_bk = jax.nn.log_softmax(teacher_bk.astype(jnp.float32))
  return jnp.sum(jnp.exp(teacher_bk) * (teacher_bk - student_bk), axis=-1)


def kept_ratio(keep_mask, shares) -> jax.Array:
  """DynamicViT: mean over stages s of (mean_i keep^s_i - shares_s)^2: (B,).

  keep_mask: a list with (B, P) of each stage, 1 where a patch is kept; shares: `DynamicViT.shares()`.
  """
  squares = [(jnp.mean(keep_bp, axis=1) - share) ** 2
             for keep_bp, share in zip(keep_mask, shares, strict=True)]
  return sum(squares) / len(squares)


def token_square(student_bpw: jax.Array, teacher_bpw: jax.Array, keep_bp: jax.Array) -> jax.Array:
  """Squared error of the features of surviving patches: (B,); see `over_survivors`."""
  error_bpw = student_bpw.astype(jnp.float32) - teacher_bpw.astype(jnp.float32)
  return over_survivors(jnp.mean(error_bpw ** 2, axis=-1), keep_bp)


def token_divergence(student_bpk: jax.Array, teacher_bpk: jax.Array,
                     keep_bp: jax.Array) -> jax.Array:
  """KL(teacher || student) of the logits of surviving patches: (B,); see `over_survivors`."""
  return over_survivors(divergence(student_bpk, teacher_bpk), keep_bp)


def over_survivors(loss_bp: jax.Array, keep_bp: jax.Array) -> jax.Array:
  """(B,), whose mean is the mean of `loss` over all patches of the batch with keep_mask = 1.

  Who survives is not taught by it: keep_mask gets no gradient. Without survivors it is 0.
  """
  keep_bp = jax.lax.stop_gradient(keep_bp)
  # A loss of 0 times a NaN of somebody dropped would be NaN.
  total_b = jnp.sum(jnp.where(keep_bp > 0, loss_bp, 0), axis=1)
  return total_b / jnp.maximum(jnp.mean(jnp.sum(keep_bp, axis=1)), 1 / keep_bp.shape[0])


def consistency(student_bw: jax.Array, teacher_bw: jax.Array, student_bk: jax.Array,
                labels_b: jax.Array, threshold: float = 0.4) -> jax.Array:
  """MCTF: squared error of normalised class tokens where the student is right already: (B,).

  The mean is that over the images whose true class has more than `threshold` of the student's
  probability, 0 if none has. The teacher (the same network, less reduced) gets no gradient.

  student_bk: the student's logits; labels_b: int, the true classes.
  """
  probability_bk = jax.nn.softmax(student_bk.astype(jnp.float32))
  passing_b = jnp.take_along_axis(probability_bk, labels_b[:, None], axis=1)[:, 0] > threshold
  error_bw = student_bw.astype(jnp.float32) - jax.lax.stop_gradient(teacher_bw.astype(jnp.float32))
  share = jnp.maximum(jnp.mean(passing_b), 1 / passing_b.shape[0])
  return jnp.where(passing_b, jnp.mean(error_bw ** 2, axis=-1), 0) / share


def attention_reconstruction(links) -> jax.Array:
  """Sparsifiner: (1 / L) sum over L blocks, heads, queries, keys of (score - target)^2: (B,).

  links: the collection "attention" that `model.apply(..., mutable=["attention"])` returns: for each
    block its predictor's "score" and the "target", the block's own dense attention, both (B, heads,
    N, M) (of blocks of tokens where links are).
  """
  pairs = [block["links"] for block in links.values()]
  if not pairs:
    raise ValueError("no block of this model has a predictor of links: give its plan "
                     "links=Sparsifiner(...), with min_tokens below its number of tokens")
  errors = [jnp.sum((pair["score"][0] - pair["target"][0]) ** 2, axis=(1, 2, 3)) for pair in pairs]
  return sum(errors) / len(errors)

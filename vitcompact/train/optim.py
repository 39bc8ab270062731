"""AdamW as DeiT uses it: warm-up and cosine per step, decay by name, clipping by global norm."""
import jax
import jax.numpy as jnp
import optax

from vitcompact import trees


def warmup_cosine(step, *, peak, warmup_steps, total_steps, start, final):
  """The learning rate of step 0, 1, ... (an array or a number).

  Linear from `start` to `peak`, then a half cosine to `final`. As in DeiT the cosine counts from
  step 0, so it takes over slightly below the peak. DeiT changes its rate once an epoch; with
  epochs for steps this function gives DeiT's values.
  """
  warmup = start + step * (peak - start) / max(warmup_steps, 1)
  cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * step / total_steps))
  return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, final))


def schedule(optim, total_steps: int):
  """step -> learning rate, from the config's `optim` section."""
  return lambda step: warmup_cosine(
      step, peak=optim.learning_rate, warmup_steps=optim.warmup_steps, total_steps=total_steps,
      start=optim.warmup_learning_rate, final=optim.final_learning_rate)


def decay_mask(params, rules):
  """A tree of bool: which parameters decay. By name: a head's bias is 2-D here, and so are taps."""
  leaves = trees.first_match(rules, params, may_be_idle=True)
  return jax.tree.map(lambda leaf: leaf.decay, leaves, is_leaf=lambda x: isinstance(x, trees.Leaf))


def make_optimizer(optim, total_steps: int, mask) -> optax.GradientTransformation:
  """Clip, then p <- p - lr (adam(g) + weight_decay p). `clip_norm` 0: no clipping."""
  adamw = optax.adamw(schedule(optim, total_steps), b1=optim.b1, b2=optim.b2, eps=optim.eps,
                      weight_decay=optim.weight_decay, mask=mask)
  if not optim.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(optim.clip_norm), adamw)


def ema_decay(half_life: float, total_steps: int) -> float:
  """The decay whose half-life is that fraction of the run, so that it fits a run of any length.

  DeiT's 0.99996 over 375,300 steps is a half-life of 0.0462 of the run.
  """
  return 0.5 ** (1 / (half_life * total_steps))

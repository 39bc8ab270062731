"""A DeiT in plain Flax Linen and Optax, as a user would write it: the baseline of our benchmarks.

  python -m experiments.plain_deit        # checks that it computes what ours does

It has only stock layers: nn.Dense, nn.MultiHeadDotProductAttention, nn.LayerNorm, nn.gelu (the
exact form). Its parameters have the names and shapes of ours, so both run on the same weights.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

EPSILON = 1e-6


class PatchEmbed(nn.Module):
  width: int
  patch_size: int

  @nn.compact
  def __call__(self, images_bhwc):
    size = (self.patch_size, self.patch_size)
    x_bhwc = nn.Conv(self.width, size, strides=size, padding="VALID", name="proj")(images_bhwc)
    return x_bhwc.reshape(len(x_bhwc), -1, self.width)


class Mlp(nn.Module):
  hidden: int

  @nn.compact
  def __call__(self, x_bnw):
    width = x_bnw.shape[-1]
    x_bnm = nn.gelu(nn.Dense(self.hidden, name="fc1")(x_bnw), approximate=False)
    return nn.Dense(width, name="fc2")(x_bnm)


class Block(nn.Module):
  heads: int
  mlp_ratio: float
  drop_path: float

  @nn.compact
  def __call__(self, x_bnw, train: bool):
    def drop(y_bnw):
      return nn.Dropout(self.drop_path, broadcast_dims=(1, 2))(y_bnw, deterministic=not train)
    y_bnw = nn.LayerNorm(epsilon=EPSILON, name="norm1")(x_bnw)
    x_bnw = x_bnw + drop(nn.MultiHeadDotProductAttention(self.heads, name="attn")(y_bnw))
    y_bnw = nn.LayerNorm(epsilon=EPSILON, name="norm2")(x_bnw)
    return x_bnw + drop(Mlp(int(self.mlp_ratio * x_bnw.shape[-1]), name="mlp")(y_bnw))


class PlainDeiT(nn.Module):
  """Images (B, H, W, C) -> logits (B, num_classes). The defaults are DeiT-S."""
  width: int = 384
  depth: int = 12
  heads: int = 6
  mlp_ratio: float = 4.0
  patch_size: int = 16
  num_classes: int = 1000
  drop_path_rate: float = 0.1

  @nn.compact
  def __call__(self, images_bhwc, train: bool = False):
    x_bnw = PatchEmbed(self.width, self.patch_size, name="patch_embed")(images_bhwc)
    init = nn.initializers.normal(0.02)
    cls = self.param("cls_token", init, (1, 1, self.width))
    positions = self.param("pos_embed", init, (1, x_bnw.shape[1] + 1, self.width))
    x_bnw = jnp.concatenate([jnp.repeat(cls, len(x_bnw), axis=0), x_bnw], axis=1) + positions
    for i in range(self.depth):
      rate = self.drop_path_rate * i / max(1, self.depth - 1)
      x_bnw = Block(self.heads, self.mlp_ratio, rate, name=f"blocks_{i}")(x_bnw, train)
    x_bnw = nn.LayerNorm(epsilon=EPSILON, name="norm")(x_bnw)
    return nn.Dense(self.num_classes, name="head")(x_bnw[:, 0])


def train_step(model: nn.Module, optimizer: optax.GradientTransformation):
  """Returns a function (params, opt_state, images, labels, key) -> (params, opt_state, loss).

  Jit it with its first two arguments donated. It works for any model without batch statistics.
  """
  def step(params, opt_state, images, labels, key):
    def mean_loss(params):
      logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    loss, gradients = jax.value_and_grad(mean_loss)(params)
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss
  return step


def main():
  import vitcompact as vc
  ours = vc.create_model("deit_small_patch16_224")
  images = jax.random.normal(jax.random.key(0), (1, 224, 224, 3))
  variables = jax.jit(ours.init)(jax.random.key(1), images)
  logits = jax.jit(PlainDeiT().apply)(variables, images)
  difference = jnp.abs(logits - jax.jit(ours.apply)(variables, images)).max()
  print(f"largest difference of the logits from ours: {difference:.1e}, "
        f"largest logit {jnp.abs(logits).max():.2f}")


if __name__ == "__main__":
  main()

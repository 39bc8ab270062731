"""FFN axis: a gated linear unit with a hidden layer of two thirds."""
import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class GLU:
  """y = (act(x W_1) * (x W_gate)) W_2. Of a dense FFN it keeps nothing: it is trained."""
  axis: ClassVar = "ffn"
  ratio: float = 2 / 3

  def make(self, site, **kwargs):
    return GatedLinear(round(self.ratio * site.hidden), site.ffn_width, site.act, site.dtype,
                       **kwargs)


class GatedLinear(nn.Module):
  hidden: int
  width: int
  act: Callable
  dtype: str

  @nn.compact
  def __call__(self, x, train=False):
    def layer(features, name):
      return nn.Dense(features, kernel_init=nn.initializers.normal(0.02), dtype=self.dtype,
                      name=name)

    return layer(self.width, "fc2")(
        self.act(layer(self.hidden, "fc1")(x)) * layer(self.hidden, "gate")(x))

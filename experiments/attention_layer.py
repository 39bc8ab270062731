"""The attention of one DeiT block, as a layer that can be timed separately."""
import flax.linen as nn

import vitcompact as vc
from vitcompact import attention
from vitcompact.block import Attention, restrict
from vitcompact.methods.protocol import Site
from vitcompact.plan import BlockMethods


class AttentionLayer(nn.Module):
  """Projections, predictors and attention: (B, N, width) -> (B, N, width)."""
  site: Site
  methods: BlockMethods

  @nn.compact
  def __call__(self, x_bnw):
    attn = Attention(self.site, self.methods.heads, name="attn")
    query, key, value = attn.query(x_bnw), attn.key(x_bnw), attn.value(x_bnw)
    core = restrict(self.site, self.methods.attention, attention.DENSE, query, key)
    return attn.attend(query, key, value, core, x_bnw)


def attention_layer(side: int, plan: vc.Plan, **fields) -> AttentionLayer:
  """Returns a deployed layer for a class token and side x side patches; fields: of the model, such
  as width."""
  model = vc.create_model("deit_small_patch16_224", image_size=16 * side, depth=1, deploy=True,
                          plan=plan, **fields)
  site, = model.sites()
  return AttentionLayer(site, plan.at(site))

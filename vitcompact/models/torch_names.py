"""The language in which a model tells the names and layouts of its PyTorch weights."""
from typing import NamedTuple


class Entry(NamedTuple):
  """One tensor of a PyTorch state dict and the leaves of ours that it holds.

  torch: its name, timm's where timm has the model, else the authors'.
  leaves: names in our variables, collection first: "params/blocks_0/attn/query/kernel". More than
    one where PyTorch fuses what we keep apart; then in the order of the fused rows.
  layout: how the arrays correspond:
    "same"        vectors, tokens, positions: equal shape (or equal up to axes of length 1)
    "linear"      (out, in) <-> (in, out)
    "conv"        (O, I/groups, kh, kw) <-> (kh, kw, I/groups, O)
    "pointwise"   (out, in, 1, 1) <-> (in, out): a 1x1 convolution that is a Dense here
    "heads"       rows (heads * d, in), fused leaves below one another <-> each (in, heads, d)
    "heads_bias"  (heads * d,), fused likewise <-> each (heads, d)
    "out"         (out, heads * d) <-> (heads, d, out)
  """
  torch: str
  leaves: tuple[str, ...]
  layout: str = "same"

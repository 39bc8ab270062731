"""The list of methods: axis -> {name in files: class}. To add a method of your own:

  vitcompact.METHODS["heads"]["gate"] = Gate

`protocol.py` defines what a method is.
"""
import dataclasses

from vitcompact.methods.attention.biformer import BiFormer
from vitcompact.methods.attention.channels import ChannelAttention
from vitcompact.methods.attention.inline import InLine
from vitcompact.methods.attention.key_merging import KeyMerging
from vitcompact.methods.attention.sparsifiner import Sparsifiner
from vitcompact.methods.ffn.cffn import CFFN
from vitcompact.methods.ffn.glu import GLU, ConvGLU
from vitcompact.methods.heads.hmhsa import HMHSA
from vitcompact.methods.heads.moh import MoH
from vitcompact.methods.heads.pruning import HeadPruning
from vitcompact.methods.tokens.dynamicvit import DynamicViT
from vitcompact.methods.tokens.evit import EViT
from vitcompact.methods.tokens.fastpath import FastPath
from vitcompact.methods.tokens.mctf import MCTF
from vitcompact.methods.tokens.tome import ToMe

METHODS = {
    "heads": {"hmhsa": HMHSA, "head_pruning": HeadPruning, "moh": MoH},
    "attention": {"sparsifiner": Sparsifiner, "biformer": BiFormer, "inline": InLine,
                  "channel_attention": ChannelAttention, "key_merging": KeyMerging},
    "tokens": {"evit": EViT, "dynamicvit": DynamicViT, "tome": ToMe, "mctf": MCTF,
               "fastpath": FastPath},
    "ffn": {"cffn": CFFN, "glu": GLU, "convglu": ConvGLU},
}


def check_class(kind: type, axis: str):
  """Raises a one-line ValueError if a listed class is not a method of this axis."""
  maker = "reduction" if axis == "tokens" else "make"
  faults = {
      "must be a frozen dataclass: @dataclasses.dataclass(frozen=True)":
          not dataclasses.is_dataclass(kind) or not kind.__dataclass_params__.frozen,
      f"must have axis = {axis!r}": getattr(kind, "axis", None) != axis,
      f"must have a method {maker}, see vitcompact/methods/protocol.py": not hasattr(kind, maker),
      "has mergeable, so it must have a method merge":
          hasattr(kind, "mergeable") and not hasattr(kind, "merge")}
  if failed := [fault for fault, fails in faults.items() if fails]:
    raise ValueError(f"{kind.__name__}, listed in METHODS[{axis!r}]: {failed[0]}")

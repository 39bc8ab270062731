"""The list of methods: axis -> {name in files: class}. A method of your own is one line here:

  vitcompact.METHODS["heads"]["gate"] = Gate

What a method is: `protocol.py`.
"""
from vitcompact.methods.attention.sparsifiner import Sparsifiner
from vitcompact.methods.ffn.cffn import CFFN
from vitcompact.methods.heads.hmhsa import HMHSA
from vitcompact.methods.tokens.dynamicvit import DynamicViT
from vitcompact.methods.tokens.evit import EViT
from vitcompact.methods.tokens.mctf import MCTF
from vitcompact.methods.tokens.tome import ToMe

METHODS = {
    "heads": {"hmhsa": HMHSA},
    "attention": {"sparsifiner": Sparsifiner},
    "tokens": {"evit": EViT, "dynamicvit": DynamicViT, "tome": ToMe, "mctf": MCTF},
    "ffn": {"cffn": CFFN},
}

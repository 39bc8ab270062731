"""Compact DeiT-S (hMHSA and cFFN) on ImageNet-1k: configs/deit_s.py in all but the plan.

Command:  python main.py --config=configs/compact_deit_s.py --workdir=runs/compact_deit_s
          with configs/compact_deit_s.py:deit_tiny_patch16_224 for T, or
          configs/compact_deit_s.py:deit_base_patch16_224 for B.
Hardware: as configs/deit_s.py.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model (T: 2.89, B:
          40.5).
Result:   not run.
"""
from configs import base, deit_s


def get_config(argument=""):
  options = base.parse(argument, model="deit_small_patch16_224")
  config = deit_s.get_config(options.model)
  config.plan = {"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}
  return base.finish(config, options)

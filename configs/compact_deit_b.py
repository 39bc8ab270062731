"""Compact DeiT-B (hMHSA and cFFN) on ImageNet-1k: configs/deit_b.py in all but the plan.

Command:  python main.py --config=configs/compact_deit_b.py --workdir=runs/compact_deit_b
Hardware: as configs/deit_b.py.
Cost:     40.5 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run.
"""
from configs import deit_b


def get_config():
  config = deit_b.get_config()
  config.plan = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'
  return config

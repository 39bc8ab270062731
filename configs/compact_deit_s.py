"""Compact DeiT-S (hMHSA and cFFN) on ImageNet-1k: configs/deit_s.py in all but the plan.

Command:  python main.py --config=configs/compact_deit_s.py --workdir=runs/compact_deit_s
Hardware: as configs/deit_s.py.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run.
"""
from configs import deit_s


def get_config():
  config = deit_s.get_config()
  config.plan = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'
  return config

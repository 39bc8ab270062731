"""Compact DeiT-T (hMHSA and cFFN) on ImageNet-1k: configs/deit_t.py in all but the plan.

Command:  python main.py --config=configs/compact_deit_t.py --workdir=runs/compact_deit_t
Hardware: as configs/deit_t.py.
Cost:     2.89 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run.
"""
from configs import deit_t


def get_config():
  config = deit_t.get_config()
  config.plan = '{"heads": {"method": "hmhsa"}, "ffn": {"method": "cffn"}}'
  return config

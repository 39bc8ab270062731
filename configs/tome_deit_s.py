"""ToMe on DeiT-S, trained from scratch with 13 tokens merged in each block (ICLR 2023).

Command:  python main.py --config=configs/tome_deit_s.py --workdir=runs/tome_deit_s
Data:     ImageNet-1k, as configs/deit_s.py, from which only the plan differs.
Hardware: as configs/deit_s.py.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 79.4 % top-1 (dense: 79.8 %). We assume that they used
          DeiT's settings: their training code is not public.

To use ToMe off the shelf, without training, `vc.compact` keeps the dense weights under this plan.
"""
from configs import base, deit_s


def get_config(argument=""):
  config = deit_s.get_config()
  config.plan = {"tokens": {"method": "tome", "r": 13}}
  return base.finish(config, base.parse(argument))

"""ToMe on DeiT-S, trained from scratch with 13 tokens merged in each block (ICLR 2023).

Command:  python main.py --config=configs/tome_deit_s.py --workdir=runs/tome_deit_s
Data:     ImageNet-1k, as configs/deit_s.py, of which this is all but the plan.
Hardware: as configs/deit_s.py.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 79.4 % top-1 (dense: 79.8 %); that they trained with
          DeiT's settings is our reading, their training code is not public.

Off the shelf: no training, the same weights under this plan, as `vc.compact` gives them.
"""
from configs import base, deit_s


def get_config(argument=""):
  config = deit_s.get_config()
  config.plan = {"tokens": {"method": "tome", "r": 13}}
  return base.finish(config, base.parse(argument))

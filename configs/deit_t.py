"""DeiT-T on ImageNet-1k from scratch: the recipe of configs/deit_s.py, the tiny model.

Command:  python main.py --config=configs/deit_t.py --workdir=runs/deit_t
Hardware: the authors used 4 GPUs with 256 images each.
Cost:     2.89 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The recipe's authors publish 72.2 % top-1 for the dense model.
"""
from configs import deit_s


def get_config():
  config = deit_s.get_config()
  config.model.name = "deit_tiny_patch16_224"
  return config

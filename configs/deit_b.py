"""DeiT-B on ImageNet-1k from scratch: the recipe of configs/deit_s.py, the base model.

Command:  python main.py --config=configs/deit_b.py --workdir=runs/deit_b
Hardware: the authors used 16 GPUs with 64 images each.
Cost:     40.5 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The recipe's authors publish 81.8 % top-1 for the dense model.
"""
from configs import deit_s


def get_config():
  config = deit_s.get_config()
  config.model.name = "deit_base_patch16_224"
  config.data.replicas = 16       # of 64 images: the authors trained it on 16 devices
  return config

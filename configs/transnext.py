"""TransNeXt on ImageNet-1k from scratch: 300 epochs at 224 pixels, the authors' recipe.

Command:  python main.py --config=configs/transnext.py --workdir=runs/transnext_tiny
          with configs/transnext.py:transnext_micro, :transnext_small or :transnext_base for the
          others.
Hardware: the authors used 8 GPUs with 128 images each.
Cost:     13.2 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 82.5, 84.0, 84.7 and 84.8 % top-1 for Micro, Tiny, Small
          and Base.
"""
from configs import base, deit_s

DROP_PATH = {"micro": 0.15, "tiny": 0.25, "small": 0.45, "base": 0.6}


def get_config(argument=""):
  options = base.parse(argument, model="transnext_tiny")
  config = deit_s.get_config()      # augmentation, and DeiT's learning rate for 1024 images
  config.ema_half_life = 0.0
  config.model.name = options.model
  config.model.drop_path_rate = DROP_PATH[options.model.removeprefix("transnext_")]
  config.data.replicas = 8
  config.optim.clip_norm = 1.0
  return base.finish(config, options)

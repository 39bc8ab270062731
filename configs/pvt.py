"""PVT and PVT v2 on ImageNet-1k from scratch: DeiT's recipe for 8 devices, 300 epochs.

Command:  python main.py --config=configs/pvt.py --workdir=runs/pvt_small
          with configs/pvt.py:pvt_medium, :pvt_v2_b2 and so on for the others.
Hardware: the authors used 8 GPUs with 128 images each.
Cost:     8.8 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 75.1, 79.8, 81.2 and 81.7 % top-1 for PVT-Tiny, Small,
          Medium and Large; 70.5, 78.7, 82.0, 83.1, 83.6 and 83.8 % for v2-b0 to b5,
          82.1 % for v2-b2-li.
"""
from configs import base, deit_s

# PVT's deep models did not converge with a drop path of 0.1; v2's rates are the authors'.
DEEP = ("pvt_medium", "pvt_large", "pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")


def get_config(argument=""):
  options = base.parse(argument, model="pvt_small")
  config = deit_s.get_config()
  config.ema_half_life = 0.0
  config.model.name = options.model
  config.model.drop_path_rate = 0.3 if options.model in DEEP else 0.1
  config.data.replicas = 8
  config.optim.clip_norm = 1.0 if options.model in DEEP else 0.0
  return base.finish(config, options)

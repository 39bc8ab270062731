"""BiFormer on ImageNet-1k from scratch: DeiT's recipe for 8 devices, 300 epochs.

Command:  python main.py --config=configs/biformer.py --workdir=runs/biformer_small
          with configs/biformer.py:biformer_tiny, :biformer_base or :biformer_stl for the others.
Hardware: the authors used 8 GPUs with 128 images each; batch norms are per GPU.
Cost:     10.3 EFLOP, forward and backward of 384 M images through the dense model (T: 5.1, B: 22.5,
          STL: 10.5).
Result:   not run here. The authors publish 81.4, 83.8, 84.3 and 82.7 % top-1 for T, S, B and STL.
"""
from configs import base, deit_s

# The authors' repository gives the rates of S and STL.
DROP_PATH = {"biformer_small": 0.15, "biformer_base": 0.4}


def get_config(argument=""):
  options = base.parse(argument, model="biformer_small")
  config = deit_s.get_config()
  config.model.name = options.model
  config.model.drop_path_rate = DROP_PATH.get(options.model, 0.1)
  config.data.replicas = 8
  return base.finish(config, options)

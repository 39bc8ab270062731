"""EViT on DeiT-S from scratch: 300 epochs in which the keep rate falls from 1 (ICLR 2022).

Command:  python main.py --config=configs/evit_deit_s_scratch.py --workdir=runs/evit_deit_s_scratch
          with configs/evit_deit_s_scratch.py:0.5 for another keep rate.
Data:     ImageNet-1k, as configs/deit_s.py.
Hardware: the authors used 8 GPUs with 256 images each.
Cost:     10.6 EFLOP, forward and backward of 384 M images through the dense model.
Result:   not run here. The authors publish 79.5 % top-1 at keep 0.7 (dense: 79.8 %).

The authors change the keep rate at every step. Here it falls in 7 even steps: each rate is a
program to compile.
"""
from configs import evit_deit_s
from configs.evit_deit_s import STEPS_PER_EPOCH


def get_config(keep="0.7"):
  config = evit_deit_s.get_config(keep)
  config.total_steps = 300 * STEPS_PER_EPOCH
  config.ema_half_life = 0.0924   # of the run: a decay of 0.99996 a step
  config.model.drop_path_rate = 0.1
  config.optim.learning_rate = 2e-3         # the peak: 5e-4 for each 512 images of a batch
  config.optim.warmup_steps = 5 * STEPS_PER_EPOCH
  config.optim.final_learning_rate = 1e-5
  config.optim.weight_decay = 0.05
  config.keep_warmup.start = 10 * STEPS_PER_EPOCH
  config.keep_warmup.steps = 100 * STEPS_PER_EPOCH
  return config

"""DeiT-S with a distillation token on ImageNet-1k, taught by another model's choices: 300 epochs.

Command:  python main.py --config=configs/deit_s_distilled.py --workdir=runs/deit_s_distilled \\
            --config.teacher.file=nextvit_base.safetensors
Hardware: as configs/deit_s.py, and the teacher's forward pass on each batch.
Cost:     10.7 EFLOP, forward and backward of 384 M images through the dense model; the teacher
          comes on top.
Result:   not run here. The recipe's authors publish 81.2 % top-1 with RegNetY-16GF (82.9 %) as the
          teacher, which this library does not have: any model of it may teach.
"""
from configs import deit_s


def get_config():
  config = deit_s.get_config()
  config.model.name = "deit_small_distilled_patch16_224"
  config.teacher.name = "nextvit_base"
  config.loss.labels = 0.5
  config.loss.hard = 0.5          # or soft, with a temperature
  return config

"""DeiT-S with a distillation token on ImageNet-1k, taught by another model's choices: 300 epochs.

Command:  python main.py --config=configs/deit_s_distilled.py --workdir=runs/deit_s_distilled \\
            --config.teacher.file=nextvit_base.safetensors
          with configs/deit_s_distilled.py:deit_tiny_distilled_patch16_224 for T,
          configs/deit_s_distilled.py:deit_base_distilled_patch16_224 for B.
Hardware: as configs/deit_s.py (B: configs/deit_b.py), and the teacher's forward pass on each batch.
Cost:     10.7 EFLOP, forward and backward of 384 M images through the dense model; the teacher
          comes on top.
Result:   not run here. The recipe's authors publish 74.5, 81.2 and 83.4 % top-1 for T, S and B with
          RegNetY-16GF (82.9 %) as the teacher, which this library does not have: any model of it
          may teach.
"""
from configs import deit_s


def get_config(name="deit_small_distilled_patch16_224"):
  config = deit_s.get_config()
  config.model.name = name
  config.data.replicas = 16 if "base" in name else 4    # the authors' devices
  config.teacher.name = "nextvit_base"
  config.loss.labels = 0.5
  config.loss.hard = 0.5          # or soft, with a temperature
  return config

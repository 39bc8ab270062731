"""DeiT-S from ImageNet to CIFAR-10 by AdamW: configs/cifar10.py with ImageNet's weight decay, drop
path and random erasing, the transfer that the authors published for sibling models.

Command:  python main.py --config=configs/cifar10_adamw.py --workdir=runs/cifar10_adamw \\
            --config.init_from=deit_small_10.safetensors
          with configs/cifar10_adamw.py:cifar100 for CIFAR-100, or
          configs/cifar10_adamw.py:cifar10@all to train on all images, as the authors do.
Data:     as configs/cifar10.py, which also says how the file to start from is made.
Hardware: as configs/cifar10.py.
Cost:     1.23 EFLOP, forward and backward of 44.5 M images through the dense model.
Result:   not run here. For DeiT the authors publish results of SGD alone: configs/cifar10.py.

The authors left the last learning rate at 1e-5, above the peak, so that their cosine rises from
7.5e-6. Here it ends where it peaks: constant after the warm-up.
"""
from configs import cifar10


def get_config(name="cifar10"):
  config = cifar10.get_config(name)
  config.model.drop_path_rate = 0.1
  config.data.erase = 0.25
  config.optim.name = "adamw"
  config.optim.learning_rate = 7.5e-6       # 5e-6 for each 512 images of a batch
  config.optim.final_learning_rate = 7.5e-6
  config.optim.weight_decay = 0.05
  return config

"""The whole path from the dense model of Fashion-MNIST to a smaller one.

Command:  python main.py --config=configs/compact_fashion_mnist.py --workdir=runs/compact_fashion \\
            --config.init_from=results/fashion_mnist_dense.safetensors
Data:     see configs/fashion_mnist.py, which trained the dense model.
Stages:   the dense model is measured on 1,024 training images; a plan for half of its MACs is
          chosen; the model is compacted, distilled for a tenth of the dense model's steps at a
          twentieth of its learning rate, folded, verified and timed.
Hardware: one CPU core.
Cost:     6.89 TFLOP, without the teacher's forward passes.
Result:   docs/compaction.md has a table.
"""
from configs import base, fashion_mnist


def get_config(argument=""):
  options = base.parse(argument)
  config = fashion_mnist.get_config()
  config.compact.update(macs=0.5, images=1024, sensitivity="full",
                        dense_learning_rate=config.optim.learning_rate)
  config.total_steps = config.total_steps // 10
  config.optim.learning_rate = config.compact.dense_learning_rate / 20
  config.data.smoothing = 0.0
  config.loss.update(labels=0.0, logits=1.0, patches=1.0)
  return base.finish(config, options)

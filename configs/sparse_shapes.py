"""Fewer links, fewer tokens, or both at 577 tokens, fine-tuned on drawn scenes from a dense model.

Command:  python main.py --config=configs/sparse_shapes.py:small --workdir=runs/small
          python main.py --config=configs/sparse_shapes.py:dense --workdir=runs/dense \\
            --config.init_from=runs/small/resized.safetensors
          python main.py --config=configs/sparse_shapes.py:block --workdir=runs/block \\
            --config.init_from=runs/dense/trained.safetensors \\
            --config.teacher.file=runs/dense/trained.safetensors
          with token, evit, sparsif_evit or tuned (dense, fine-tuned alike) in place of block.
Data:     scenes whose label relates two distant objects; drawn, no download.
"""

"""`hf-lnlm pretrain` for launchers.

torchrun --nproc_per_node 2 training/pretrain.py training/recipes/rnn_stdlib.yaml
accelerate launch training/pretrain.py training/recipes/gpt2_stdlib.yaml     (on GPUs; on a CPU use torchrun)
"""

import sys

from hf_lnlm.cli.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])

"""`hf-lnlm finetune` for launchers.

torchrun --nproc_per_node 2 training/finetune.py training/recipes/finetune_classification.yaml
accelerate launch training/finetune.py training/recipes/lora_classification.yaml     (on GPUs; on a CPU use torchrun)
"""

import sys

from hf_lnlm.cli.main import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])

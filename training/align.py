"""`hf-lnlm align` for launchers.

torchrun --nproc_per_node 2 training/align.py training/recipes/align_dpo.yaml
accelerate launch training/align.py training/recipes/align_grpo.yaml     (on GPUs; on a CPU use torchrun)
"""

import sys

from hf_lnlm.cli.main import main

if __name__ == "__main__":
    main(["align", *sys.argv[1:]])

"""What each of two processes does under `torchrun -m tests.models.mixture.distributed FOLDER`; process 0 writes."""

import os
import sys
import warnings
from pathlib import Path

import torch
import transformers as T

from tests.models.mixture.test_sparse_moe import DIVIDED, HEADS_OF_TOKENS, build, train


def main() -> None:
    """Train each head on four rows a process; write the logs and weights of process 0."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    T.logging.set_verbosity_error()
    folder, found = Path(sys.argv[1]), {}
    for cls in HEADS_OF_TOKENS:
        model = build(cls, **DIVIDED)
        trainer = train(model, folder / "run", 4, 1)
        found[cls.__name__] = {"log": trainer.state.log_history, "weights": model.state_dict()}
    if int(os.environ["RANK"]) == 0:
        torch.save(found, folder / "answers.pt")


if __name__ == "__main__":
    main()

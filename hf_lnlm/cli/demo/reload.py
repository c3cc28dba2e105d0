"""The demo's proof that checkpoints live without hf_lnlm: load each in a process that cannot import the package.

Run as a script by path, never imported by the package, so that it needs nothing of it:
`python reload.py LOGITS.safetensors FOLDER...` prints one JSON line a folder.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class _WithoutPackage(importlib.abc.MetaPathFinder):
    """Makes `import hf_lnlm` fail, as on a machine where it isn't installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse the package and everything in it."""
        if name.split(".")[0] == "hf_lnlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(reference: str, folders: list[str]) -> int:
    """Load every folder, compare its logits bit by bit with those of the training process, and say so.

    Args:
        reference: safetensors file with `ids` and one tensor of logits a folder, under the folder's name.
        folders: checkpoints.

    Returns:
        exit status: 0 if all are identical.
    """
    sys.meta_path.insert(0, _WithoutPackage())
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    tensors, same = load_file(reference), True
    for folder in folders:
        name = Path(folder).name
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            identical = torch.equal(model(input_ids=tensors["ids"], use_cache=False).logits, tensors[name])
        same = same and identical
        print(json.dumps({"name": name, "identical": identical, "module": type(model).__module__}), flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

"""Load what a plan names where hf_lnlm cannot be imported, and check it. Usage: elsewhere.py PLAN [MISSING ...].

The plan is a JSON list of jobs `{"kind", "auto", "folder", "tensors", ...}`; `tensors` holds the inputs and the output
that the model gave at home. Prints one line of JSON: job number → "ok" or what went wrong.
"""

import importlib.abc
import json
import sys
import tempfile
import traceback
from pathlib import Path


class _NotHere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_lnlm", *sys.argv[2:]):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _NotHere())

import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def output(model, inputs):
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    if getattr(outputs, "start_logits", None) is not None:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    logits = outputs.get("logits", outputs.get("prediction_logits"))
    return outputs.last_hidden_state if logits is None else logits


def load(auto, folder):
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)


def same_head(job, saved):
    """The head that was saved: bit-identical, and again after being saved once more by transformers alone."""
    model = load(job["auto"], job["folder"])
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    assert torch.equal(output(model, saved["inputs"]), saved["output"]), "other logits"
    with tempfile.TemporaryDirectory() as made:
        again = Path(made, Path(job["folder"]).name)  # equal code under an equal name is not compiled again
        model.save_pretrained(again)
        assert torch.equal(output(load(job["auto"], again), saved["inputs"]), saved["output"]), (
            "other logits once resaved"
        )
        config = transformers.AutoConfig.from_pretrained(again, trust_remote_code=True)
        assert config.model_type == model.config.model_type


def close_head(job, saved):
    """The head that was saved, computed by another backend."""
    model = load(job["auto"], job["folder"])
    torch.testing.assert_close(output(model, saved["inputs"]), saved["output"], rtol=1e-4, atol=1e-4)


def other_head(job, saved):
    """Another head on the same checkpoint: it loads and runs, its own weights fresh."""
    model = load(job["auto"], job["folder"])
    assert type(model).__name__ == job["class"], type(model).__name__
    assert torch.isfinite(output(model, saved["inputs"])).all()


def from_config(job, saved):
    """A fresh model from the config alone."""
    config = transformers.AutoConfig.from_pretrained(job["folder"], trust_remote_code=True)
    model = getattr(transformers, job["auto"]).from_config(config, trust_remote_code=True)
    assert torch.isfinite(output(model, saved["inputs"])).all()


def adapter(job, saved):
    """An adapter folder, which names its base, through peft's Auto class."""
    import peft

    model = getattr(peft, job["peft"]).from_pretrained(job["folder"], trust_remote_code=True)
    torch.testing.assert_close(output(model, saved["inputs"]), saved["output"], rtol=1e-6, atol=1e-6)


def generates(job, saved):
    """Generation with the carried cache layer."""
    model = load(job["auto"], job["folder"]).eval()
    ids = saved["inputs"]["input_ids"]
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, num_beams=2, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens, saved["tokens"]), "other tokens"


def main():
    """Run the plan."""
    results = {}
    for number, job in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        saved = torch.load(job["tensors"])
        try:
            globals()[job["kind"]](job, saved)
            results[number] = "ok"
        except Exception:
            results[number] = traceback.format_exc()[-1500:]
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Stock pipelines on a saved folder."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_lnlm.data.tokenizers import fit_length
from hf_lnlm.models.parts import longest_input

from .cases import VOCABULARY, Case, build, cases

SPECIALS = ["<pad>", "<s>", "</s>", "<mask>", "<cls>", "<sep>", "<unk>"]
PLANS = {
    "AutoModelForCausalLM": ("text-generation", ["w10 w11 w12 w13", "w20"], {"max_new_tokens": 4, "batch_size": 2}),
    "AutoModelForMaskedLM": ("fill-mask", ["w10 w11 <mask> w13", "<mask> w20"], {"top_k": 2}),
    "AutoModelForSequenceClassification": ("text-classification", ["w10 w11 w12 w13", "w20"], {"batch_size": 2}),
    "AutoModelForTokenClassification": ("token-classification", ["w10 w11 w12 w13"], {}),
    "AutoModel": ("feature-extraction", ["w10 w11 w12 w13"], {}),
}


def words() -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(SPECIALS)}
    vocabulary |= {f"w{number}": number for number in range(len(SPECIALS), VOCABULARY)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["pad", "mask", "cls", "sep", "unk"]
    tokens = {f"{name}_token": f"<{name}>" for name in names}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
        **tokens,
    )


@pytest.mark.parametrize("case", [c for c in cases() if c.auto in PLANS and not c.takes("decoder_input_ids")], ids=str)
def test_pipeline(case: Case, tmp_path):
    task, texts, options = PLANS[case.auto]
    tokenizer = words()
    tokenizer.padding_side = "left" if case.causal else "right"
    model = build(case)
    model.save_pretrained(tmp_path)
    fit_length(tokenizer, model.config).save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(pipe.model) is case.cls
    found = pipe(texts, **options)
    assert len(found) == len(texts)
    if "batch_size" in options and case.auto == "AutoModelForSequenceClassification":
        for text, together in zip(texts, found, strict=True):
            alone = pipe(text)[0]
            assert alone["label"] == together["label"]
            assert alone["score"] == pytest.approx(together["score"], rel=1e-4)
    check_length(case, pipe, longest_input(model.config))
    if not case.auto.endswith("MaskedLM"):  # which stock pipelines refuse without a mask
        check_empty(case, pipe, options)


def check_length(case: Case, pipe, limit: int | None):
    """A text beyond the model's positions is cut where asked, else refused in true words; classifiers may cut by design."""
    assert pipe.tokenizer.model_max_length == (limit or int(1e30))
    text = " ".join(["<mask>", *["w20"] * (limit or 100)])
    cut = {"tokenizer_kwargs": {"truncation": True}} if case.auto.endswith("MaskedLM") else {"truncation": True}
    if case.causal or case.auto.endswith("TokenClassification"):  # the one writes on, the other always cuts
        cut = {}
    if limit is None or case.auto.endswith("TokenClassification") or case.family.room == "convolutional":
        assert pipe(text, **cut)
        return
    with pytest.raises(ValueError, match=f"max_position_embeddings.* {limit}"):
        pipe(text)
    assert case.causal or pipe(text, **cut)


def check_empty(case: Case, pipe, options):
    """An empty text has the answer that it has in a batch."""
    if case.causal:
        batch = pipe.tokenizer(["", "w20 w21"], return_tensors="pt", padding=True)
        short = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        together = pipe.model.generate(**batch, **short)[0, 1:]  # without the padding
        alone = pipe.model.generate(**pipe.tokenizer("", return_tensors="pt"), **short)[0]
        assert together.tolist()[: len(alone)] == alone.tolist()
        assert pipe("", **options)
    elif case.auto.endswith("SequenceClassification"):
        together = pipe(["", "w20 w21"], batch_size=2)[0]
        assert pipe("")[0]["score"] == pytest.approx(together["score"], rel=1e-4)
        assert pipe("")[0]["label"] == together["label"]
    else:
        assert pipe("") == ([] if case.auto.endswith("TokenClassification") else [[]])

"""Stock pipelines on a saved folder."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

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


@pytest.mark.parametrize("case", [c for c in cases() if c.auto in PLANS], ids=str)
def test_pipeline(case: Case, tmp_path):
    task, texts, options = PLANS[case.auto]
    tokenizer = words()
    tokenizer.padding_side = "left" if case.causal else "right"
    build(case).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline(task, model=str(tmp_path), device="cpu")
    assert type(pipe.model) is case.cls
    found = pipe(texts, **options)
    assert len(found) == len(texts)
    if "batch_size" in options and case.auto == "AutoModelForSequenceClassification":
        for text, together in zip(texts, found, strict=True):
            alone = pipe(text)[0]
            assert alone["label"] == together["label"]
            assert alone["score"] == pytest.approx(together["score"], rel=1e-4)

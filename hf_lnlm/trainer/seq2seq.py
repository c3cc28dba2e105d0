"""The Trainer for encoder-decoders that are measured by what they write: ours and transformers' Seq2SeqTrainer in one."""

from transformers import Seq2SeqTrainer

from .trainer import LNLMTrainer


class LNLMSeq2SeqTrainer(LNLMTrainer, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with everything that `LNLMTrainer` adds; takes `LNLMSeq2SeqTrainingArguments`.

    With `predict_with_generate` evaluation writes texts, which `compute_metrics` rates, beside the loss.
    """

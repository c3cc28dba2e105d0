"""Translation by ours and by stock: order, batches, files and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import hf_lnlm
from hf_lnlm.cli.main import app
from tests.contract.cases import add_noise

TEXTS = ["one", "and two", "three, which is longer", "4"]
TOKENIZER = hf_lnlm.build_tokenizer("byte")
IDS = {"vocab_size": len(TOKENIZER), "pad_token_id": TOKENIZER.pad_token_id, "eos_token_id": TOKENIZER.eos_token_id}
TINY = {
    "lnlm_seq2seq": {"hidden_size": 12, "num_hidden_layers": 1},
    "t5": {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0},
    "marian": {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 8,
        "decoder_ffn_dim": 8,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 0,
    },
}


@pytest.fixture(params=TINY)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of each kind, with weights that are not blind."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **IDS, **TINY[request.param])
    add_noise(AutoModelForSeq2SeqLM.from_config(config), 1).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_texts_files_and_outputs_agree(folder: Path, tmp_path: Path):
    options = {"max_new_tokens": 6, "beams": 3}
    wanted = [hf_lnlm.translate(folder, [text], **options)[0] for text in TEXTS]
    assert hf_lnlm.translate(folder, TEXTS, batch_size=3, **options) == wanted
    model, end = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), [TOKENIZER.eos_token_id]
    ids = torch.tensor([[*(token for token in TOKENIZER(TEXTS[1])["input_ids"] if [token] != end), *end]])
    written = model.generate(ids, num_beams=3, max_new_tokens=6, do_sample=False)
    assert TOKENIZER.decode(written[0], skip_special_tokens=True) == wanted[1]
    lines, rows, out = tmp_path / "lines.txt", tmp_path / "out.jsonl", tmp_path / "out.txt"
    lines.write_text("\n".join(TEXTS) + "\n")
    command = ["translate", str(folder), "--data", str(lines), "--beams", "3", "--max-new-tokens", "6"]
    for target in (rows, out):
        assert CliRunner().invoke(app, [*command, "--output", str(target)]).exit_code == 0
    assert [json.loads(line)["text"] for line in rows.read_text().splitlines()] == wanted
    assert out.read_text() == "".join(" ".join(text.splitlines()) + "\n" for text in wanted)
    again = CliRunner().invoke(app, [*command, "--output", str(out)])
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_what_cannot_be_translated_is_refused(tmp_path: Path):
    from hf_lnlm import RNNConfig, RNNForCausalLM

    RNNForCausalLM(RNNConfig(hidden_size=8, num_hidden_layers=1, **IDS)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lnlm_rnn, which has no encoder with a decoder"):
        hf_lnlm.translate(tmp_path, ["a"])
    with pytest.raises(ValueError, match="nothing to translate"):
        hf_lnlm.translate(tmp_path, [])
    both = CliRunner().invoke(app, ["translate", str(tmp_path), "text", "--data", "file"])
    assert "not both" in both.output

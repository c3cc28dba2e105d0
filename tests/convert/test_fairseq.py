"""fairseq's LSTM translation models: made-up state dicts of its layout against its forward pass, written out here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import hf_lnlm
from hf_lnlm.convert.fairseq import fairseq_lstm
from tests.cli.running import run, succeed
from tests.contract.cases import add_noise

PAD, END = 1, 2


class Attention(nn.Module):
    """fairseq's AttentionLayer: one matrix on the decoder's state, tanh of a map of context and state."""

    def __init__(self, state: int, source: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(state, source, bias=False)
        self.output_proj = nn.Linear(state + source, state, bias=False)

    def forward(self, state: Tensor, source: Tensor, padding: Tensor) -> Tensor:
        scores = (source * self.input_proj(state)).sum(2)  # (source length, batch)
        weights = scores.masked_fill(padding, float("-inf")).softmax(0)
        context = (weights.unsqueeze(2) * source).sum(0)
        return torch.tanh(self.output_proj(torch.cat([context, state], 1)))


class Encoder(nn.Module):
    def __init__(self, words: int, width: int, hidden: int, layers: int, both: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width, PAD)
        self.lstm = nn.LSTM(width, hidden, layers, bidirectional=both)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        lengths = (ids != PAD).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(self.embed_tokens(ids.T), lengths, enforce_sorted=False)
        outputs, states = self.lstm(packed)
        both = 2 if self.lstm.bidirectional else 1
        h, c = (s.view(-1, both, len(ids), s.shape[2]).transpose(1, 2).flatten(2) for s in states)
        return nn.utils.rnn.pad_packed_sequence(outputs)[0], h, c, (ids == PAD).T


class Decoder(nn.Module):
    def __init__(self, words: int, width: int, hidden: int, source: int, layers: int, **chosen: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width, PAD)
        if source != hidden:
            self.encoder_hidden_proj, self.encoder_cell_proj = nn.Linear(source, hidden), nn.Linear(source, hidden)
        sizes = [width + hidden] + [hidden] * (layers - 1)
        self.layers = nn.ModuleList([nn.LSTMCell(size, hidden) for size in sizes])
        self.attention = Attention(hidden, source) if chosen.get("attention", True) else None
        out = chosen.get("out", hidden)
        if out != hidden:
            self.additional_fc = nn.Linear(hidden, out)
        if not chosen.get("tied", False):
            self.fc_out = nn.Linear(out, words)

    def forward(self, ids: Tensor, source: Tensor, h: Tensor, c: Tensor, padding: Tensor) -> Tensor:
        if hasattr(self, "encoder_hidden_proj"):
            h, c = self.encoder_hidden_proj(h), self.encoder_cell_proj(c)
        states, fed, outs = list(zip(h, c, strict=True)), torch.zeros_like(h[0]), []
        for token in self.embed_tokens(ids).unbind(1):
            x = torch.cat([token, fed], 1)
            for number, layer in enumerate(self.layers):
                states[number] = layer(x, states[number])
                x = states[number][0]
            fed = x if self.attention is None else self.attention(x, source, padding)
            outs.append(fed)
        x = torch.stack(outs, 1)
        x = self.additional_fc(x) if hasattr(self, "additional_fc") else x
        return self.fc_out(x) if hasattr(self, "fc_out") else x @ self.embed_tokens.weight.T


class Peer(nn.Module):
    """A model named and computed as fairseq's LSTMModel."""

    def __init__(self, words: tuple[int, int], width: int, hidden: tuple[int, int], layers: int, **chosen: Any) -> None:
        super().__init__()
        both = chosen.pop("both", False)
        self.encoder = Encoder(words[0], width, hidden[0], layers, both)
        self.decoder = Decoder(words[1], width, hidden[1], hidden[0] * (2 if both else 1), layers, **chosen)

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, *self.encoder(ids))


def peer(*sizes: Any, one_table: bool = False, **chosen: Any) -> Peer:
    torch.manual_seed(0)
    made: Any = add_noise(Peer(*sizes, **chosen), 0).double().eval()
    if one_table:
        made.decoder.embed_tokens.weight = made.encoder.embed_tokens.weight
    with torch.no_grad():
        for side in (made.encoder, made.decoder):
            side.embed_tokens.weight[PAD] = 0
    return made


IDS = torch.tensor([[5, 9, 11, 7, END], [8, 10, END, PAD, PAD]])
TARGET = torch.tensor([[END, 6, 9, 4], [END, 7, 5, 8]])
LAYOUTS = {
    "luong": (((19, 13), 6, (6, 6), 4), {}),
    "both ways, mapped states": (((19, 13), 5, (4, 6), 2), {"both": True}),
    "a map before the output": (((19, 13), 5, (6, 6), 1), {"out": 5}),
    "that output tied": (((19, 13), 5, (6, 6), 1), {"out": 5, "tied": True}),
    "tied": (((13, 13), 6, (6, 6), 2), {"tied": True}),
    "one table for all": (((13, 13), 6, (3, 6), 1), {"tied": True, "one_table": True, "both": True}),
    "no attention": (((19, 13), 6, (6, 6), 1), {"attention": False}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_fairseqs_forward_pass(layout: str):
    sizes, chosen = LAYOUTS[layout]
    theirs = peer(*sizes, **chosen)
    model = fairseq_lstm(theirs.state_dict(), {})
    with torch.no_grad():
        found = model(IDS, (IDS != PAD).long(), decoder_input_ids=TARGET).logits
        torch.testing.assert_close(found, theirs(IDS, TARGET), rtol=1e-9, atol=1e-10)
    config = model.config
    assert config.tie_word_embeddings == (chosen.get("tied", False) and "out" not in chosen)
    assert config.share_embeddings == chosen.get("one_table", False)
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (END, END, PAD)


def test_by_command_and_what_it_writes(tmp_path):
    sizes, chosen = LAYOUTS["both ways, mapped states"]
    theirs = peer(*sizes, **chosen).float()
    torch.save({"model": theirs.state_dict(), "extra_state": {"epoch": 3}}, tmp_path / "checkpoint.pt")
    succeed("convert", tmp_path / "checkpoint.pt", "--set", "output_dropout=0.1", "--output", tmp_path / "ours")
    model = hf_lnlm.RNNSeq2SeqForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()
    assert model.config.output_dropout == 0.1
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "attention_mask": (IDS != PAD).long()}
    written = model.generate(IDS, **options)
    with torch.no_grad():
        logits = theirs(IDS, written[:, :-1])
    logits[..., END] = -torch.inf
    assert torch.equal(logits.argmax(-1), written[:, 1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decoder.layers.0.weight_hh": None}, "decoder.layers.0.weight_hh missing"),
        ({"decoder.attention.output_proj.weight": None}, "weights do not fit"),
        ({"decoder.adaptive_softmax.head.weight": torch.ones(1)}, "adaptive softmax has no counterpart"),
        ({"encoder.version": torch.ones(1)}, "encoder.version is no weight of fairseq's LSTM"),
        ({"encoder.lstm.weight_hr_l0": torch.ones(1)}, "'weight_hr_l0' is not a weight of nn.LSTM"),
        ({"encoder.embed_tokens.weight": torch.ones(19, 4)}, "equally wide, got 4 and 6"),
        ({"decoder.layers.0.weight_ih": torch.ones(24, 6)}, r"must read 6 \+ 6 features, got 6"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(change: dict[str, Tensor | None], said: str):
    state = peer((19, 13), 6, (6, 6), 1).state_dict() | change
    with pytest.raises(ValueError, match=said):
        fairseq_lstm({name: tensor for name, tensor in state.items() if tensor is not None}, {})


def test_a_damaged_file_says_what_it_lacks(tmp_path):
    state = peer((19, 13), 6, (6, 6), 1).state_dict()
    del state["decoder.layers.0.weight_hh"]
    save_file(state, tmp_path / "weights.safetensors")
    refused = run("convert", tmp_path / "weights.safetensors", "--output", tmp_path / "no")
    assert refused.status == 2 and "as fairseq-lstm: not the state dict" in refused.err
    assert not (tmp_path / "no").exists()

"""LSTM language models and classifiers against plain torch: `python -m tests.benchmarks.rnn [--json]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from hf_lnlm import RNNConfig, RNNForCausalLM, RNNForTokenClassification, RNNModel
from hf_lnlm.convert.recurrent import from_word_language_model

from .harness import Row, at_most, below, cpu_times, faster, run

VOCABULARY, BATCH, LENGTH, HIDDEN, LAYERS = 10_000, 20, 35, 200, 2


class TorchLM(nn.Module):
    """The peer: embedding, nn.LSTM and a linear layer, as everybody writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(VOCABULARY, HIDDEN)
        self.rnn = nn.LSTM(HIDDEN, HIDDEN, LAYERS, batch_first=True)
        self.decoder = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.rnn(self.encoder(ids))[0])


def zipf_ids(*shape: int) -> torch.Tensor:
    weights = 1.0 / torch.arange(1, VOCABULARY + 1)
    return torch.multinomial(weights, torch.Size(shape).numel(), replacement=True).view(shape)


def causal_model(peer: TorchLM, **fields: object) -> RNNForCausalLM:
    config = RNNConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        tie_word_embeddings=False,
        use_cache=False,
        **fields,
    )
    model = RNNForCausalLM(config).train()
    model.load_state_dict(from_word_language_model(peer.state_dict()), strict=fields.get("loss_head") != "adaptive")
    return model


def trainer_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def training_rows() -> list[Row]:
    torch.manual_seed(0)
    peer, ids = TorchLM().train(), zipf_ids(BATCH, LENGTH + 1)

    def peer_loss() -> torch.Tensor:
        return cross_entropy(peer(ids[:, :-1]).reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))

    def ours(model: RNNForCausalLM) -> Callable[[], torch.Tensor]:
        labels = ids[:, 1:].contiguous()
        return lambda: model(input_ids=ids[:, :-1], labels=labels, shift_labels=labels).loss

    models = {
        "full": causal_model(peer),
        "chunked": causal_model(peer, loss_head="chunked"),
        "chunked bf16": causal_model(peer, loss_head="chunked", loss_dtype="bfloat16"),
        "adaptive": causal_model(peer, loss_head="adaptive", adaptive_cutoffs=[1000, 4000], adaptive_div_value=2.0),
    }
    contenders = {"torch": trainer_step(peer, peer_loss)}
    contenders |= {name: trainer_step(model, ours(model)) for name, model in models.items()}
    times = cpu_times(contenders, rounds=9)
    shape = f"B{BATCH} T{LENGTH} H{HIDDEN}x{LAYERS} V{VOCABULARY}"
    return [
        at_most(f"training step / bare torch loop, {shape}", times["full"], times["torch"], 1.15, 1.08),
        faster("chunked bf16 head / full float32 step", times, 1.5, 2.0, "chunked bf16", "full"),
        at_most("chunked float32 head / full float32 step", times["chunked"], times["full"], 1.1, None),
        faster("adaptive softmax / full float32 step", times, 2.5, 3.5, "adaptive", "full"),
        *gradient_rows(peer, ids),
    ]


def gradient_rows(peer: TorchLM, ids: torch.Tensor) -> list[Row]:
    gradients = {}
    for name, fields in {"full": {}, "float32": {"loss_head": "chunked"}, "bfloat16": {"loss_head": "chunked"}}.items():
        model = causal_model(peer, **fields, **({"loss_dtype": name} if fields else {}))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters()])
    error = {name: ((g - gradients["full"]).norm() / gradients["full"].norm()).item() for name, g in gradients.items()}
    return [
        below("chunked bf16 head, gradients against full float32", error["bfloat16"], 5e-3),
        below("chunked float32 head, gradients against full float32", error["float32"], 1e-5),
        at_most(
            "largest tensor of a chunked step / N x V logits",
            largest_tensor(peer, ids),
            ids.numel() * VOCABULARY * 4,
            0.5,
            None,
            "bytes",
        ),
    ]


def largest_tensor(peer: TorchLM, ids: torch.Tensor) -> float:
    """Bytes of the largest activation that one training step of the chunked head makes, parameters aside."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = causal_model(peer, loss_head="chunked")
    weights = {p.shape for p in model.parameters()} | {p.mT.shape for p in model.parameters() if p.dim() == 2}
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for value in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(value, torch.Tensor) and value.shape not in weights:
                    largest = max(largest, value.numel() * value.element_size())
            return result

    with Watch():
        model(input_ids=ids, labels=ids).loss.backward()
    return float(largest)


class PackedTagger(nn.Module):
    """The peer of padded batches: a bidirectional nn.LSTM over packed sequences."""

    def __init__(self, ours: RNNForTokenClassification) -> None:
        super().__init__()
        self.ours = ours
        config = ours.config
        self.rnn = nn.LSTM(config.hidden_size, config.hidden_size, batch_first=True, bidirectional=True)
        layer = ours.model.layers[0]
        for suffix, direction in (("", layer.forwards), ("_reverse", layer.backwards)):
            for kind, gates in (("ih", direction.input_gates), ("hh", direction.recurrent_gates)):
                setattr(self.rnn, f"weight_{kind}_l0{suffix}", nn.Parameter(gates.weight.detach().clone()))
                setattr(self.rnn, f"bias_{kind}_l0{suffix}", nn.Parameter(gates.bias.detach().clone()))

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(
            self.ours.model.embed_tokens(ids), lengths, batch_first=True, enforce_sorted=False
        )
        return self.ours.classifier(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def padding_rows() -> list[Row]:
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=1, bidirectional=True, use_cache=False)
    model = RNNForTokenClassification(config)
    peer = PackedTagger(model)
    lengths = torch.linspace(10, 60, 32).long()[torch.randperm(32)]
    ids = torch.randint(0, 1000, (32, 60))
    mask = (torch.arange(60) < lengths[:, None]).long()

    def grad(logits: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            peer.zero_grad()
            logits().masked_fill(mask[..., None] == 0, 0.0).square().sum().backward()

        return step

    def ours() -> torch.Tensor:
        return model(ids, mask).logits

    def theirs() -> torch.Tensor:
        return peer(ids, lengths)

    error = ((ours() - theirs()) * mask[..., None]).abs().max().item()
    training = cpu_times({"ours": grad(ours), "peer": grad(theirs)}, rounds=9)
    with torch.no_grad():
        inference = cpu_times({"ours": ours, "peer": theirs}, rounds=9, calls=2)
    return [
        faster("padded bidirectional training / pack_padded_sequence", training, 1.9, 2.5),
        faster("padded bidirectional inference / pack_padded_sequence", inference, 1.4, 1.8),
        below("padded bidirectional, largest difference", error, 1e-5, unit="absolute error"),
    ]


def decoding_rows() -> list[Row]:
    torch.manual_seed(0)
    config = RNNConfig(vocab_size=100, hidden_size=256, num_hidden_layers=1)
    model = RNNModel(config).eval()
    layer, peer = model.layers[0], nn.LSTM(256, 256, batch_first=True)
    from hf_lnlm.nn.masks import SequenceMarks

    marks, inputs = SequenceMarks(None), torch.randn(4, 1, 256)
    states, hidden = (torch.zeros(4, 256),) * 2, (torch.zeros(1, 4, 256),) * 2
    with torch.no_grad():
        step = cpu_times(
            {"ours": lambda: layer(inputs, marks, None, *states), "peer": lambda: peer(inputs, hidden)}, 9, 300
        )
    return [faster("decode step of a layer / nn.LSTM at T=1, B4 H256", step, 2.0, 2.5), flatness_row()]


def flatness_row() -> Row:
    """Milliseconds a token after 2,000 tokens of context against after 20, by `generate`."""
    model = RNNForCausalLM(RNNConfig(vocab_size=1000, hidden_size=200, num_hidden_layers=2, pad_token_id=0)).eval()

    def decode(context: int) -> Callable[[], None]:
        ids = torch.randint(1, 1000, (1, context))
        with torch.no_grad():
            warm = model(ids, use_cache=True)

        def tokens() -> None:
            cache, token = warm.past_key_values, warm.logits[:, -1:].argmax(-1)
            with torch.no_grad():
                for _ in range(100):
                    out = model(token, past_key_values=cache, use_cache=True)
                    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return tokens

    times = cpu_times({"short": decode(20), "long": decode(2000)}, rounds=9)
    return at_most("time a token at 2,000 tokens / at 20", times["long"], times["short"], 1.15, None)


def measure(_: argparse.Namespace) -> list[Row]:
    return [*training_rows(), *padding_rows(), *decoding_rows()]


if __name__ == "__main__":
    run(__doc__ or "", measure)

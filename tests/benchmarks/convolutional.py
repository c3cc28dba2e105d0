"""Convolutional families against the formulations that other implementations use.

    python -m tests.benchmarks.convolutional --json

TextCNN against two-dimensional convolutions over a one-channel image of the text; a gated convolution against an LSTM layer
of the same number of multiplications; decoding with a window against its own cost after a short text.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hf_lnlm.models.convolutional.configuration_gated_cnn import GatedCNNConfig
from hf_lnlm.models.convolutional.configuration_text_cnn import TextCNNConfig
from hf_lnlm.models.convolutional.modeling_gated_cnn import GatedCNNForCausalLM, GatedCNNLayer
from hf_lnlm.models.convolutional.modeling_text_cnn import TextCNNForSequenceClassification
from hf_lnlm.nn.masks import SequenceMarks

from .harness import Row, at_most, below, cpu_times, faster, run

BATCH, LENGTH, VOCABULARY = 50, 32, 5000


class ImageTextCNN(nn.Module):
    """The usual formulation: `Conv2d(1, maps, (k, width))` over the embedded text as an image."""

    def __init__(self, ours: TextCNNForSequenceClassification) -> None:
        super().__init__()
        config, layer = ours.config, ours.model.layers[0]
        width = config.hidden_size
        self.embedding = nn.Embedding.from_pretrained(ours.get_input_embeddings().weight.detach().clone(), freeze=False)
        self.windows = nn.ModuleList(
            nn.Conv2d(1, config.num_filters, (k, width), padding=(k - 1, 0)) for k in config.filter_sizes
        )
        self.dropout, self.classifier = nn.Dropout(config.dropout), nn.Linear(config.output_size, config.num_labels)
        with torch.no_grad():
            for window, own in zip(self.windows, layer.windows):
                taps = own.projection.weight.view(config.num_filters, width, own.kernel_size)
                window.weight.copy_(taps.transpose(1, 2).unsqueeze(1))
                window.bias.copy_(own.projection.bias)
            self.classifier.load_state_dict(ours.classifier.state_dict())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        image = self.embedding(ids).unsqueeze(1)
        maps = [F.relu(window(image)).squeeze(3) for window in self.windows]
        pooled = torch.cat([F.max_pool1d(values, values.shape[2]).squeeze(2) for values in maps], dim=1)
        return self.classifier(self.dropout(pooled))


def text_cnn_rows() -> list[Row]:
    torch.manual_seed(0)
    ours = TextCNNForSequenceClassification(
        TextCNNConfig(vocab_size=VOCABULARY, num_labels=6, pad_token_id=None)
    ).eval()
    peer = ImageTextCNN(ours).eval()
    ids, labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH)), torch.randint(0, 6, (BATCH,))
    with torch.no_grad():
        difference = (ours(ids).logits - peer(ids)).abs().max().item()
        infer = cpu_times({"ours": lambda: ours(ids), "peer": lambda: peer(ids)}, rounds=9)
    ours.train(), peer.train()
    training = cpu_times(
        {
            "ours": lambda: ours(ids, labels=labels).loss.backward(),
            "peer": lambda: F.cross_entropy(peer(ids), labels).backward(),
        },
        rounds=9,
    )
    return [
        faster("TextCNN training step / Conv2d(k, D), B50 T32 D300", training, 1.7, 2.0),
        faster("TextCNN inference / Conv2d(k, D), B50 T32 D300", infer, 3.0, 3.65),
        below("TextCNN logits - Conv2d(k, D) logits", difference, 1e-5, unit="absolute difference"),
    ]


def gated_rows() -> list[Row]:
    torch.manual_seed(0)
    channels, kernel, batch, length = 256, 4, 20, 35
    layer = GatedCNNLayer(GatedCNNConfig(hidden_size=channels, kernel_width=kernel, num_hidden_layers=1), 0)
    lstm = nn.LSTM(channels, channels, batch_first=True)  # 8 channels² multiplications a token, as kernel 4 has
    inputs, marks = torch.randn(batch, length, channels), SequenceMarks(None)
    inner, long = inputs.clone().requires_grad_(), torch.randn(batch, 128, channels).requires_grad_()
    times = cpu_times(
        {
            "first": lambda: layer(inputs, None, marks)[0].sum().backward(),
            "first lstm": lambda: lstm(inputs)[0].sum().backward(),
            "inner": lambda: layer(inner, None, marks)[0].sum().backward(),
            "inner lstm": lambda: lstm(inner)[0].sum().backward(),
        },
        rounds=11,
        calls=3,
    )
    with torch.no_grad():
        times |= cpu_times({"eval": lambda: layer(inputs, None, marks), "eval lstm": lambda: lstm(inputs)}, 11, 3)
    times |= cpu_times(
        {
            "long": lambda: layer(long, None, marks)[0].sum().backward(),
            "long lstm": lambda: lstm(long)[0].sum().backward(),
        }
    )
    name = "gated layer k4 C256 / LSTM layer of the same FLOPs, {}".format
    return [
        faster(name("forward and backward"), times, 1.3, 1.47, "first", "first lstm"),
        faster(name("with the gradient of its inputs"), times, 0.9, 1.3, "inner", "inner lstm"),
        faster(name("with the gradient of its inputs, T128"), times, 1.3, None, "long", "long lstm"),
        faster(name("forward"), times, 0.9, None, "eval", "eval lstm"),
        flatness_row(),
    ]


def flatness_row() -> Row:
    """Milliseconds a token after 2,000 tokens of context against after 20."""
    torch.manual_seed(0)
    model = GatedCNNForCausalLM(GatedCNNConfig(vocab_size=1000, hidden_size=200, num_hidden_layers=4)).eval()

    def decode(context: int) -> Callable[[], None]:
        with torch.no_grad():
            warm = model(torch.randint(1, 1000, (1, context)), use_cache=True)

        def tokens() -> None:
            cache, token = warm.past_key_values, warm.logits[:, -1:].argmax(-1)
            with torch.no_grad():
                for _ in range(100):
                    out = model(token, past_key_values=cache, use_cache=True)
                    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)

        return tokens

    times = cpu_times({"short": decode(20), "long": decode(2000)}, rounds=7)
    return at_most("gated CNN: time a token at 2,000 tokens / at 20", times["long"], times["short"], 1.15, None)


def measure(_: argparse.Namespace) -> list[Row]:
    return [*text_cnn_rows(), *gated_rows()]


if __name__ == "__main__":
    run(__doc__ or "", measure)

"""The prelude of `forward`: one cache by two names, and no argument that would be ignored."""

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

from hf_lnlm.models.base import TESTED_TRANSFORMERS, warn_of_untested
from hf_lnlm.nn.inputs import MEANINGLESS, check_keywords, take_cache


def test_both_names_are_one_argument():
    cache, keywords = DynamicCache(), {"cache": None, "use_cache": True}
    assert take_cache(cache, keywords) is cache
    assert keywords == {"use_cache": True}
    assert take_cache(None, {"cache": cache}) is cache
    assert take_cache(cache, {"cache": cache}) is cache
    assert take_cache(None, {}) is None


def test_two_caches_are_refused():
    with pytest.raises(TypeError, match="give one of them"):
        take_cache(DynamicCache(), {"cache": DynamicCache()})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_params", DynamicCache()),
        ("state", DynamicCache()),
        ("layers", [DynamicCache()]),
        ("atention_mask", torch.ones(1, 2)),
        ("mems", (None, torch.ones(2))),
        ("labels", torch.ones(2).numpy()),
    ],
)
def test_data_under_an_unknown_name_is_refused(name, value):
    with pytest.raises(TypeError, match=f"{name!r}"):
        check_keywords({name: value})
    check_keywords({name: value}, read=(name,))


def test_what_carries_no_meaning_passes():
    check_keywords({name: torch.ones(2) for name in MEANINGLESS})
    check_keywords({"token_type_ids": torch.zeros(2, 3), "anything": None, "output_something": True, "sizes": [1, 2]})
    with pytest.raises(TypeError, match="token_type_ids must be all zero"):
        check_keywords({"token_type_ids": torch.ones(2, 3)})


@pytest.mark.parametrize("version", ["5.20.1", "5.25.0", "5.25.0.dev0", "6.0rc1"])
def test_an_untested_transformers_is_warned_of_once(version, monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("hf_lnlm.models.base"), "warning", lambda *given: said.append(given))
    logging.warning_once.cache_clear()
    for _ in range(2):
        warn_of_untested(version)
    assert len(said) == 1
    assert version in said[0]
    warn_of_untested(transformers.__version__)
    for tested in TESTED_TRANSFORMERS:
        warn_of_untested(tested + ".1")
    assert len(said) == 1

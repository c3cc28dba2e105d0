"""Words in a stream of characters: which characters spell which word, found for a whole batch at once.

A text is a row of character ids. A marker begins a word and stands for its first symbol (ELMo's <BOW>); ids such as those
of a sentence's begin and end are words of one character by themselves. What follows them, or begins a row, begins a word
too. A word is spelled in a fixed number of places, as ELMo does it: begin, its characters, end, filler.

Glossary: L positions of a row, T words of its batch's longest row, W places of a word's spelling.
Complexity: O(batch * (L + T * W)) index arithmetic.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad


class Words(NamedTuple):
    """The words of a batch, those of a row from its first place on.

    Attributes:
        sources: `(batch, T, W)` which position of the row each place shows; L is the begin, L + 1 the end and L + 2 the
            filler.
        mask: `(batch, T)` true where there is a word.
        owner: `(batch, L)` the word that a position belongs to; T where the position is masked.
    """

    sources: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor


def find_words(
    marker: torch.Tensor, single: torch.Tensor, real: torch.Tensor, places: int, window: int, traced: bool
) -> Words:
    """Find the words of a batch.

    Args:
        marker: `(batch, L)` true at ids that begin a word and are its begin symbol.
        single: `(batch, L)` true at ids that are words by themselves.
        real: `(batch, L)` false at padding, which may lie anywhere, even in a word.
        places: places of a spelling; a longer word is cut, as in ELMo.
        window: places of filler after the longest word that are kept; all others would show the same.
        traced: whether shapes must not depend on values: then there are L words of `places` places.
    """
    batch, length = real.shape
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    columns = torch.arange(length, device=real.device)
    there = columns < real.sum(1, keepdim=True)
    marker, single = marker.gather(1, order) & there, single.gather(1, order) & there
    begins = (marker | single | pad(single[:, :-1], (1, 0), value=True)) & there
    word = begins.cumsum(1) - 1
    start = torch.where(begins, columns, 0).cummax(1).values
    place = columns - start + (~marker.gather(1, start)).long()  # place 0 is the begin symbol
    count = word.amax(1, keepdim=True).clamp(min=-1) + 1
    words = length if traced else max(1, int(count.max()))
    target = word.where(there, words).clamp(min=0)
    last = place.new_zeros(batch, words + 1).scatter_reduce(1, target, place, "amax")[:, :words].clamp(max=places - 2)
    width = places if traced else min(places, int(last.max()) + 2 + window)
    dump = words * width
    sources = torch.full((batch, dump + 1), length + 2, device=real.device)
    kept = there & (place <= places - 2)
    sources = sources.scatter(1, torch.where(kept, target * width + place, dump), order)
    headless = begins & ~marker
    sources = sources.scatter(1, torch.where(headless, target * width, dump), torch.full_like(order, length))
    numbers = torch.arange(words, device=real.device)
    mask = numbers < count
    ends = torch.where(mask, numbers * width + last + 1, dump)
    sources = sources.scatter(1, ends, torch.full_like(ends, length + 1))
    index = torch.empty_like(order).scatter(1, order, target)
    return Words(sources[:, :dump].view(batch, words, width), mask, index)


def justified_words(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan the move of given words to the front of their rows.

    Args:
        mask: `(batch, T)` true where there is a word.

    Returns:
        `(batch, T)` each: where the words come from, which of the moved ones are real, and where each word went (T for
        those that are none).
    """
    length = mask.shape[1]
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
    columns = torch.arange(length, device=mask.device).expand_as(order)
    real = columns < mask.sum(1, keepdim=True)
    return order, real, torch.empty_like(order).scatter(1, order, columns.where(real, length))


def spelling_keys(spellings: torch.Tensor, filler: int) -> torch.Tensor:
    """Return a 64-bit number of each spelling `(..., W)`, the same however much filler follows it.

    Two spellings have the same one by chance only, once in 2**64.
    """
    factor = torch.full((spellings.shape[-1],), 6364136223846793005, device=spellings.device)  # Knuth's, odd
    keys = ((spellings.long() - filler) * factor.cumprod(0)).sum(-1)
    keys = (keys ^ (keys >> 31)) * 7046029254386353131
    return keys ^ (keys >> 33)


def distinct(spellings: torch.Tensor, filler: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each spelling once, and which of them every given one is.

    Args:
        spellings: `(words, W)`.
        filler: the id that fills a spelling up.

    Returns:
        `(distinct, W)` and `(words,)`.
    """
    keys, which = spelling_keys(spellings, filler).unique(return_inverse=True)
    found = spellings[which.new_zeros(len(keys)).scatter(0, which, torch.arange(len(which), device=which.device))]
    if torch.equal(found[which], spellings):
        return found, which
    again = spellings.unique(dim=0, return_inverse=True)
    return again[0], again[1]

"""The second look of ImageTextSlot: where the counter is in doubt, both numbers are read, and the better reading kept.

Which of the two is better is decided group by group, a group being the characters from one gap to the next; what is
kept is spliced together from the groups of both readings. Slots that were sent to a character that is not there have
learnt to say so: in training, groups get one character more than they have.
"""

from typing import NamedTuple

import torch

DOUBT = 0.25  # a number rounded by more is looked at again
FALSE_SIGHTING = 0.02  # in training, a number that more than this was added to may be taken for one more
MOST_DOUBTS = 8  # in an image with more, letters are too small: to look again costs much and mends little


class Look(NamedTuple):
    """What the slots read, sent to some number of characters.

    Args:
        count: number of tokens, start and end included, `(batch, 1)`.
        numbers: whole number of characters in each group, `(batch, groups)`; no groups where no cells are counted.
        doubts: how many more were expected there, `(batch, groups)`.
        tokens: token of each slot, `(batch, slots)`.
        scores: its probability, `(batch, slots)`.
        boxes: the region it was read from as shares of the image, `(batch, slots, 4)`.
        voids: the probability that there is no character for it, `(batch, slots)`.
    """

    count: torch.Tensor
    numbers: torch.Tensor
    doubts: torch.Tensor
    tokens: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    voids: torch.Tensor


def second_thoughts(doubts: torch.Tensor) -> torch.Tensor:
    """What to add to the numbers of a first look for the second, `(batch, groups)`: 1 or -1 where rounding was
    doubtful, by what the counter expected beyond the numbers, `doubts` `(batch, groups)`."""
    size = doubts.abs()
    again = (size > DOUBT) & (size <= 0.5)  # a number further off was not rounded: it is that of a newline
    again &= again.sum(1, keepdim=True) <= MOST_DOUBTS
    return again * doubts.sign()


def second_look_features(first: Look, second: Look) -> torch.Tensor:
    """By what to choose between two readings of each group of characters, `(batch, groups, 6)`, as the first six of
    `SECOND_LOOK` name it: the log odds of the number that was rounded away, how much surer the second reading is of the
    group's characters, how many more of them repeat the one before, the log odds that the first, and the second, was
    sent to a character that is not there, and whether the second has one character more, 1, or one less, -1."""
    (*before, first_void), (*after, second_void) = _sureness(first), _sureness(second)
    changes = [b - a for a, b in zip(before, after, strict=True)]
    odds = [_log_odds(chance) for chance in (first.doubts.abs(), first_void, second_void)]
    return torch.stack((odds[0], *changes, *odds[1:], (second.numbers - first.numbers).sign()), dim=-1)


def _log_odds(chance: torch.Tensor) -> torch.Tensor:
    return chance.clamp(1e-3, 1 - 1e-3).logit()


def _sureness(look: Look) -> tuple[torch.Tensor, ...]:
    """Of each group of characters, `(batch, groups)`: their log-probability, repetitions, and the largest probability
    of a slot that there is no character for it."""
    tokens, ends = look.tokens, look.numbers.cumsum(1)
    index = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    inside = (index >= 1) & (index <= ends[:, -1:])  # neither start nor end
    group = _group(ends, index)
    zero = torch.zeros_like(ends)
    total = zero.scatter_add(1, group, look.scores.log() * inside)
    again = ((tokens[:, 1:] == tokens[:, :-1]) & inside[:, 1:] & inside[:, :-1]).float()
    before = again * (group[:, 1:] != group[:, :-1])  # a repetition over a gap counts on both sides
    repeats = zero.scatter_add(1, group[:, 1:], again).scatter_add(1, group[:, :-1], before)
    void = zero.scatter_reduce(1, group, look.voids * inside, "amax")
    return total, repeats, void


def false_sightings(numbers: torch.Tensor, doubts: torch.Tensor) -> torch.Tensor:
    """Groups that are to get one character more than they have, drawn anew each time, 1 or 0 `(batch, groups)`: half of
    those where the counter expected more than their `numbers`, and now and then any other."""
    there = numbers > 0
    chance = 0.5 * there / there.sum(1, keepdim=True).clamp(min=1)
    return torch.bernoulli(torch.where(doubts > FALSE_SIGHTING, 0.5, chance))


def seen_tokens(numbers: torch.Tensor, change: torch.Tensor, slots: int) -> torch.Tensor:
    """Which token each slot sees, start and end counted, `(batch, slots)`, where `change` characters, 1 or 0, are added
    to the `numbers` of each group, both `(batch, groups)`; -1 for a slot in whose place there is none, which is the
    middle one of its group."""
    sizes = numbers + change
    ends = sizes.cumsum(1)
    index = torch.arange(slots, device=ends.device).expand(len(ends), -1)
    group = _group(ends, index)
    within = index - 1 - (ends - sizes).gather(1, group)
    void = (change.gather(1, group) > 0) & (within == (sizes.gather(1, group) / 2).floor())
    void &= index <= ends[:, -1:]
    return torch.where(void, -1, index - void.long().cumsum(1))


def _group(ends: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The group of each slot `(batch, slots)`, given how many characters there are up to each group's end."""
    return torch.searchsorted(ends, index - 0.5).clamp(max=ends.shape[1] - 1)


def splice(first: Look, second: Look, chosen: torch.Tensor) -> Look:
    """The reading that has the `chosen` groups `(batch, groups)` of the second look, and the others of the first."""
    numbers = torch.where(chosen, second.numbers, first.numbers)
    ends = numbers.cumsum(1)
    sizes = [look.tokens.shape[1] for look in (first, second)]
    slots = int(ends[:, -1].max()) + 4  # start, end and two more
    index = torch.arange(slots, device=ends.device).expand(len(ends), -1)
    group = _group(ends, index)  # the start belongs to the first one, what comes after the text to the last, empty one
    within = index - (ends - numbers).gather(1, group)
    places = [
        ((look.numbers.cumsum(1) - look.numbers).gather(1, group) + within).long().clamp(0, size - 1)
        for look, size in zip((first, second), sizes, strict=True)
    ]
    place = torch.where(chosen.gather(1, group), sizes[0] + places[1], places[0])
    row = torch.arange(len(ends), device=ends.device)[:, None]

    def spliced(part: str) -> torch.Tensor:
        return torch.cat((getattr(first, part), getattr(second, part)), 1)[row, place]

    return Look(
        count=numbers.sum(1, keepdim=True) + 2,
        numbers=numbers,
        doubts=torch.where(chosen, second.doubts, first.doubts),
        tokens=spliced("tokens"),
        scores=spliced("scores"),
        boxes=spliced("boxes"),
        voids=spliced("voids"),
    )


__all__ = [
    "MOST_DOUBTS",
    "Look",
    "false_sightings",
    "second_look_features",
    "second_thoughts",
    "seen_tokens",
    "splice",
]

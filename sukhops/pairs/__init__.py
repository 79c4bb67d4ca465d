"""Choice of the pairs that a preference loss trains on (Meta-Rewarding, LIFT), in plain PyTorch."""

from sukhops.pairs._pairs import Pairs, Reason
from sukhops.pairs.bradley_terry import bradley_terry
from sukhops.pairs.lift import (
    count_words,
    length_instructed_win_rate,
    lift_pairs,
    lift_prompt,
    lift_relabel,
    violation_rate,
)
from sukhops.pairs.meta_rewarding import (
    battle_matrix,
    judge_pairs,
    length_controlled_pairs,
    select_judged_response,
)

__all__ = [
    "Pairs",
    "Reason",
    "battle_matrix",
    "bradley_terry",
    "count_words",
    "judge_pairs",
    "length_controlled_pairs",
    "length_instructed_win_rate",
    "lift_pairs",
    "lift_prompt",
    "lift_relabel",
    "select_judged_response",
    "violation_rate",
]

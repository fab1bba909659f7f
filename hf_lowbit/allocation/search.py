"""The choice of one width for each unit that does the least damage within a budget: an exact multiple-choice knapsack.

Relaxing the budget by a price per byte gives a lower bound for every partial choice, and a first choice within the
budget that is nearly the best. Dynamic programming over the units then keeps, of all partial choices, those that no
other beats in both bytes and damage and that the bound allows to beat the first. A few hundred survive per unit, so
the result is the optimum, not an approximation on a grid of sizes.
"""

import numpy as np

TOLERANCE = 1e-9  # of the whole damage: what sums of floats may lose


def choose(costs: list[list[int]], damages: list[list[float]], budget: int) -> list[int]:
    """The number of the option taken for each unit.

    Args:
        costs: Bytes of every option of every unit.
        damages: What each of them adds to the objective, not negative.
        budget: Bytes, at most.

    Raises:
        ValueError: if even the cheapest options exceed the budget.
    """
    cheapest = sum(map(min, costs))
    if cheapest > budget:
        raise ValueError(f"the cheapest options need {cheapest} bytes, the budget is {budget}")
    options = [
        (np.array(c, dtype=np.int64), np.array(d, dtype=np.float64)) for c, d in zip(costs, damages, strict=True)
    ]
    price, first = _relaxed(options, budget)
    best = _fill_up(options, first, budget)
    limit = sum(d[i] for (_, d), i in zip(options, best, strict=True))
    limit += TOLERANCE * max(limit, 1e-300)
    # What the units from i on cost at least, in bytes, and in damage plus the price of their bytes.
    rest_cost = np.append(np.cumsum([c.min() for c, _ in reversed(options)])[::-1], 0)
    rest_bound = np.append(np.cumsum([(d + price * c).min() for c, d in reversed(options)])[::-1], 0)
    cost, damage, steps = np.zeros(1, dtype=np.int64), np.zeros(1), []
    for i, (c, d) in enumerate(options):
        total, harm = (cost[:, None] + c).ravel(), (damage[:, None] + d).ravel()
        bound = harm + rest_bound[i + 1] - price * (budget - total)
        keep = np.flatnonzero((total + rest_cost[i + 1] <= budget) & (bound <= limit))
        keep = keep[np.lexsort((harm[keep], total[keep]))]
        least = np.minimum.accumulate(harm[keep])
        keep = keep[np.append(True, least[1:] < least[:-1])]
        cost, damage = total[keep], harm[keep]
        steps.append(np.divmod(keep, len(c)))
    state, chosen = int(damage.argmin()), []
    for parents, choices in reversed(steps):
        chosen.append(int(choices[state]))
        state = int(parents[state])
    return chosen[::-1]


def _relaxed(options, budget: int) -> tuple[float, list[int]]:
    """The lowest price per byte at which choosing for each unit alone stays within the budget, and that choice."""

    def at(price):
        return [int((d + price * c).argmin()) for c, d in options]

    def spent(choice):
        return sum(int(c[i]) for (c, _), i in zip(options, choice, strict=True))

    cheap = [int(np.lexsort((d, c))[0]) for c, d in options]
    if spent(at(0.0)) <= budget:
        return 0.0, at(0.0)
    low, high = 0.0, 1e-30
    while spent(at(high)) > budget and high < 1e30:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(middle)) > budget else (low, middle)
    chosen = at(high)
    return high, chosen if spent(chosen) <= budget else cheap


def _fill_up(options, choice: list[int], budget: int) -> list[int]:
    """``choice`` with what is left of the budget spent on the changes that save the most damage per byte."""
    choice, left = list(choice), budget - sum(int(c[i]) for (c, _), i in zip(options, choice, strict=True))
    while True:
        changes = [
            ((d[choice[u]] - d[o]) / max(1, c[o] - c[choice[u]]), u, o)
            for u, (c, d) in enumerate(options)
            for o in range(len(c))
            if d[o] < d[choice[u]] and c[o] - c[choice[u]] <= left
        ]
        if not changes:
            return choice
        _, unit, option = max(changes)
        left -= int(options[unit][0][option] - options[unit][0][choice[unit]])
        choice[unit] = option

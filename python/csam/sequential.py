"""Sequential certification: stop sampling an image as soon as its answer is settled, at the same overall alpha.

Votes for one class, chosen beforehand on other samples, are independent coin flips with an unknown probability p. A
rule looks at their running count at numbers of samples that are fixed beforehand (`looks`, about geometric) and at
nothing else: what it does depends neither on batches nor on timing, and the counts at the looks so far are all the
state there is. It stops

- "abstain": when n samples would hardly lift the bound to 1/2;
- "target": when the wanted radius is certified; "below target": when n samples would hardly certify it;
- "rtol": when the radius is within the relative tolerance of what n samples could still give;
- "n": when all n are drawn.

Every rule keeps the guarantee of Cohen et al.: a certificate is wrong with probability at most alpha. It holds for
the class that was chosen, whichever that is, given the samples that chose it, so the selection is included: for a class
that is not the smoothed classifier's p is at most 1/2, and certifying it is one more bound that lies above p.

"Hardly" and "could still give" are predictions. They decide how long to sample, and no bound rests on them:
- n samples would hardly certify p >= p0 when p is likely below the p1 that 99 of a hundred runs of n samples would
  certify: when under p1 so few votes among t samples have probability 0.01 sqrt(t / n) or less (`_hopeless`);
- they could still give the radius of a count at n that one run in six would exceed (`_outlook`).

The rules differ in their bound. Which is the best where was measured over the p_A that a real model was published
with (bench/bench_sequential.py): `Exact`, in every mode; see `DEFAULTS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from scipy import special

from csam.laws import LAWS, Law
from csam_kernels import checks
from csam_kernels.laws import checked_law

FIRST_LOOK, GROWTH = 100, 1.15
RARE, OUTLOOK = 0.01, float(special.ndtri(5 / 6))
ABSTAIN, GO_ON = -1, -2
MOST = 10**7  # samples: rules that stop early were checked up to there
BLOCK = 4096  # counts
LEAST = 1e-50  # of alpha: bounds were checked down to 1e-100, and at 1e-300 they are wrong or NaN
Array = np.ndarray


@dataclass(frozen=True)
class Decision:
    """Where a rule stopped.

    Attributes:
        p_lower: lower bound on the probability of the class.
        radius: that of p_lower under the law of noise, None (abstain) if p_lower < 1/2.
        samples: how many were looked at.
        reason: "abstain", "target", "below target", "rtol" or "n".
    """

    p_lower: float
    radius: float | None
    samples: int
    reason: str


class Rule(ABC):
    """When to stop, and what is then certified. A bound holds where the rule stops, and only there: a run that is cut
    off goes on later from its counts.

    Args:
        n: the most samples, 1 .. 10^7; of `Fixed` up to 10^10.
        alpha: probability of a wrong certificate, in [1e-50, 1).
        sigma: standard deviation of the noise, > 0.
        noise: its law, of `csam.laws.LAWS`, in whose norm radii are.
        target_radius: stop when this radius, > 0, is certified or out of reach; None for no such stop.
        rtol: stop within this share, in (0, 1), of the radius that n samples could still give; None for no such stop.
        tile, skip: looks, but for the last, are such that skip + look is a multiple of tile: where whole tiles of
            samples end if `skip` samples chose the class.

    Attributes:
        looks: numbers of samples, ascending; the last is n.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range.
    """

    growth: ClassVar[float] = GROWTH
    most: ClassVar[int] = MOST

    def __init__(
        self,
        n: int,
        alpha: float,
        sigma: float,
        *,
        noise: str = "gaussian",
        target_radius: float | None = None,
        rtol: float | None = None,
        tile: int = 1,
        skip: int = 0,
    ) -> None:
        self.n, self.alpha, self.sigma, self.law, self.target_radius, self.rtol = self.checked(
            n, alpha, sigma, noise=noise, target_radius=target_radius, rtol=rtol
        )
        self.looks = self._grid(checks.integer("tile", tile, low=1), checks.integer("skip", skip, low=0))
        # Rounded up: a bound that reaches it certifies the wanted radius.
        wanted = float(self.law.probability((self.target_radius or 0.0) / self.sigma))
        self._p_wanted = 0.5 if self.target_radius is None else min(1.0, wanted * (1 + 1e-15))
        rare = RARE * np.sqrt(np.array(self.looks) / self.n)
        # At look k, images with up to _hopeless[k] votes and from _reached[k] votes on stop.
        self._hopeless = _rejecting(np.array(self.looks), _likely(self.n, self._p_wanted, self.alpha), rare)
        self._reached = self._certifying()

    @classmethod
    def checked(
        cls, n: int, alpha: float, sigma: float, *, noise: str, target_radius: float | None, rtol: float | None
    ) -> tuple[int, float, float, Law, float | None, float | None]:
        """The arguments, checked. Errors as of the rule."""
        n, alpha = checks.integer("n", n, low=1, high=cls.most), checked_alpha(alpha)
        sigma, law = checks.real("sigma", sigma, above=0), LAWS[checked_law("noise", noise)]
        radius = None if target_radius is None else checks.real("target_radius", target_radius, above=0)
        most = sigma * law.largest
        if (radius or 0.0) >= most:
            asked = f"{radius:g} under {noise} noise of sigma {sigma:g}"
            raise ValueError(f"target_radius must be below {most:g}, got {asked}")
        return n, alpha, sigma, law, radius, None if rtol is None else checks.real("rtol", rtol, above=0, below=1)

    def decide(self, counts: Sequence[int]) -> Decision | None:
        """The decision at look len(counts), None to go on.

        Args:
            counts: votes for the class among the first looks[i] samples, for i = 0 .. len(counts) - 1.

        Raises:
            TypeError, ValueError: no count, more counts than looks, or counts that cannot be.
        """
        counts = self._checked(counts)
        return self.decision(counts) if self.stops(counts) else None

    def decision(self, counts: Sequence[int]) -> Decision:
        """The decision of an image that stops with these counts, not checked."""
        k = len(counts) - 1
        last = k == len(self.looks) - 1
        p_lower = self.bound(counts)
        radius = None if not p_lower >= 0.5 else self.sigma * float(self.law.radius(p_lower))
        reason = "n" if last else "rtol" if self.rtol is not None else "below target"  # a pilot's plan may miss it
        if radius is not None and self.target_radius is not None and p_lower >= self._p_wanted:
            radius, reason = max(radius, self.target_radius), "target"
        elif not last and counts[-1] <= self._hopeless[k] and (radius is None or self.target_radius is not None):
            reason = "abstain" if self.target_radius is None else "below target"
        return Decision(p_lower, radius, self.looks[k], reason)

    def stops(self, counts: Sequence[int]) -> bool:
        """Whether an image with these counts, not checked, stops at look len(counts) if it did not before."""
        k = len(counts) - 1
        return k == len(self.looks) - 1 or bool(self.settled(k, np.array([counts]))[0])

    def settled(self, k: int, counts: Array) -> Array:
        """Whether each image stops at look k < len(looks) - 1 if it did not before, bool [images].

        counts is int [images, k + 1], not checked.
        """
        return self._settled(k, counts[:, k])

    @abstractmethod
    def bound(self, counts: Sequence[int]) -> float:
        """Lower bound on p when the rule stops with these counts."""

    def _grid(self, tile: int, skip: int) -> tuple[int, ...]:
        return geometric_looks(self.n, self.growth, tile, skip)

    def _settled(self, k: int, count: Array) -> Array:
        """`settled` for a rule that asks for nothing but the last count, [images]."""
        stop = count <= self._hopeless[k]
        if self.target_radius is not None:
            stop |= count >= self._reached[k]
        if self.rtol is not None:
            now, then = (self.law.radius(p) for p in (self._about(k, count), self._outlook(count, self.looks[k])))
            stop |= (then > 0) & (now >= (1 - self.rtol) * then)
        return stop

    def _certifying(self) -> Array:
        """Fewest votes at each look that certify the wanted radius."""
        levels = np.array([self._level(k) for k in range(len(self.looks))])
        return _certifying(np.array(self.looks), self._p_wanted, levels)

    def _about(self, k: int, count: Array) -> Array:
        """About the bound at look k."""
        return about_clopper_pearson(count, self.looks[k], self._level(k))

    def _level(self, k: int) -> float:
        """Error of the Clopper-Pearson bound that is about this rule's at look k."""
        return self.alpha

    def _outlook(self, count: Array, seen: int) -> Array:
        """The fixed rule's bound for a count at n that one run in six would exceed.

        asin(sqrt(share of votes)) has variance 1 / (4 samples) whatever p is, and its change from `seen` samples to n
        the difference of the two; failures that were seen stay.
        """
        angle = np.arcsin(np.sqrt(count / seen)) + OUTLOOK / 2 * math.sqrt(1 / seen - 1 / self.n)
        most = np.minimum(self.n * np.sin(np.minimum(angle, math.pi / 2)) ** 2, self.n - (seen - count))
        return about_clopper_pearson(most, self.n, self.alpha)

    def _checked(self, counts: Sequence[int]) -> list[int]:
        if not 1 <= len(counts) <= len(self.looks):
            raise ValueError(
                f"counts must have an entry for each look so far, 1 to {len(self.looks)}, got {len(counts)}"
            )
        checked: list[int] = []
        for i, count in enumerate(counts):
            before, seen = (checked[-1], self.looks[i - 1]) if i else (0, 0)
            checked.append(checks.integer(f"counts[{i}]", count, low=before, high=before + self.looks[i] - seen))
        return checked


class Fixed(Rule):
    """Cohen et al.'s own: one look, at n, and the bound of Clopper and Pearson (1934) at alpha."""

    most = 10**10  # up to there Clopper-Pearson's bounds were checked

    def _grid(self, tile: int, skip: int) -> tuple[int, ...]:
        return (self.n,)

    def bound(self, counts: Sequence[int]) -> float:
        return clopper_pearson(counts[-1], self.n, self.alpha)


class Mixture(Rule):
    """A confidence sequence: the bound holds at all numbers of samples at once, for whatever stopping rule.

    Theorem (Robbins 1970, "Statistical methods related to the law of the iterated logarithm"; Howard et al. 2021,
    "Time-uniform, nonparametric, nonasymptotic confidence sequences"): let S of t samples be votes and
    E_t(q) = integral of u^S (1-u)^(t-S) dBeta(u; 1/2, 1/2) / (q^S (1-q)^(t-S)). Under p, E_t(p) is a nonnegative
    martingale that starts at 1: a mixture over u of the likelihood ratios of u against p, the wealth of a gambler who
    bets against p. By Ville's inequality (1939), P(E_t(p) >= 1/alpha for some t) <= alpha. Otherwise p is in the set
    {q : E_t(q) < 1/alpha} for all t, and the lower end of any of them is a lower bound. Each is an interval, as the
    log-likelihood is concave in q.
    """

    prior: ClassVar[tuple[float, float]] = (0.5, 0.5)

    def bound(self, counts: Sequence[int]) -> float:
        return float(self._about(len(counts) - 1, np.array([counts[-1]]))[0])

    def _about(self, k: int, count: Array) -> Array:
        """The bound itself, by bisection: E_t >= 1/alpha where it ends up, hence on all of [0, bound]."""
        low, high = np.zeros(count.shape), count / self.looks[k]
        for _ in range(60):
            middle = (low + high) / 2
            out = self._excluded(self.looks[k], count, middle)
            low, high = np.where(out, middle, low), np.where(out, high, middle)
        return low

    def _certifying(self) -> Array:
        looks = np.array(self.looks)
        low, high = np.floor(looks * self._p_wanted).astype(int), looks + 1
        for _ in range(self.n.bit_length() + 1):
            middle = (low + high) // 2
            out = (middle > low) & self._excluded(looks, np.minimum(middle, looks), self._p_wanted)
            low, high = np.where(out, low, middle), np.where(out, middle, high)
        return high

    def _excluded(self, seen: Array | int, count: Array, q: Array | float) -> Array:
        (a, b), failures = self.prior, seen - count
        wealth = special.betaln(count + a, failures + b) - special.betaln(a, b)
        wealth = wealth - special.xlogy(count, q) - special.xlog1py(failures, -q)
        return wealth >= -math.log(self.alpha) + rounding(self.n)


class Spending(Rule):
    """Alpha spending (Lan and DeMets 1983): exact at each look, with half of alpha kept for the last.

    Theorem: let the levels of the looks sum to alpha. The Clopper-Pearson bound of a look lies above p with
    probability at most its level; by the union bound one of them does with probability at most alpha, at whichever
    look the rule stops.
    """

    growth = 1.4
    last: ClassVar[float] = 0.5

    def bound(self, counts: Sequence[int]) -> float:
        k = len(counts) - 1
        return clopper_pearson(counts[-1], self.looks[k], self._level(k))

    def _level(self, k: int) -> float:
        early = len(self.looks) - 1
        if not early:
            return self.alpha
        return self.alpha * (self.last if k == early else (1 - self.last) / early)


class Pilot(Rule):
    """The first n / 50 samples choose how many fresh ones are drawn; the bound is Clopper and Pearson's on those.

    Theorem: given the pilot's count the number of fresh samples is fixed and their count binomial, so the bound lies
    above p with probability at most alpha for every outcome of the pilot, hence overall. The pilot's votes stay out of
    it: a bound on all votes as if their number had been fixed errs more often than alpha (tests/test_sequential.py).
    """

    share: ClassVar[float] = 1 / 50

    def settled(self, k: int, counts: Array) -> Array:
        return self._plan(counts[:, 0]) <= k

    def bound(self, counts: Sequence[int]) -> float:
        seen, votes = (self.looks[0], counts[0]) if len(self.looks) > 1 else (0, 0)  # one look planned nothing
        return clopper_pearson(counts[-1] - votes, self.looks[len(counts) - 1] - seen, self.alpha)

    def _grid(self, tile: int, skip: int) -> tuple[int, ...]:
        pilot = max(1, round(self.n * self.share))
        pilot += -(skip + pilot) % tile
        if pilot >= self.n:
            return (self.n,)
        return (pilot, *(pilot + m for m in geometric_looks(self.n - pilot, self.growth, tile, skip + pilot)))

    def _plan(self, count: Array) -> Array:
        """Look at which the fresh samples are expected to suffice, int [images]."""
        pilot, plan = self.looks[0], np.full(count.shape, len(self.looks) - 1)
        p = count / pilot
        then = self.law.radius(about_clopper_pearson(p * self.n, self.n, self.alpha))
        for k in range(len(self.looks) - 2, 0, -1):
            fresh, enough = self.looks[k] - pilot, np.zeros(count.shape, bool)
            if self.rtol is not None:
                now = self.law.radius(about_clopper_pearson(p * fresh, fresh, self.alpha))
                enough |= (then > 0) & (now >= (1 - self.rtol) * then)
            if self.target_radius is not None:  # a target may be missed: two standard deviations to spare
                votes = np.maximum(p * fresh - 2 * np.sqrt(fresh * p * (1 - p) * (1 + fresh / pilot)), 0)
                enough |= about_clopper_pearson(votes, fresh, self.alpha) >= self._p_wanted
            plan = np.where(enough, k, plan)
        return np.where(count <= self._hopeless[0], 0, plan)


class Exact(Rule):
    """The exact bound for a stopping rule that was fixed beforehand: looking costs no alpha.

    Theorem (Jennison and Turnbull 1983, "Confidence intervals for a binomial parameter following a multistage test";
    Emerson and Fleming 1990): let the rule stop at T samples with S votes. Order the outcomes by S / T, and let the
    bound of an outcome with share c be the largest b such that P_q(S / T >= c) <= alpha for all q <= b. It lies above
    p with probability at most alpha: if it does, the p-value P_p(S / T >= c) of the outcome is at most alpha, which
    happens with probability at most alpha.

    P_q(A), A = {S / T >= c}, increases with q, so b is a root: its derivative is E_q[1_A (S - qT)] / (q (1 - q)). For
    q <= c the expectation is of something >= 0; for q > c it is -E_q[1_not A (S - qT)] >= 0, as E_q[S - qT] = 0
    (Wald). With one look b is Clopper and Pearson's bound, and with votes only it is alpha^(1/T), as theirs.

    P_q(A) comes from a recursion over the looks, to which all probability that it cuts off is added. For a wanted
    radius the looks before n stop where the p-value of their count is at most a level, the same for all, at which
    together they certify it wrongly with probability `early` alpha; the rest is left for n.
    """

    early: ClassVar[float] = 0.8

    def __init__(
        self,
        n: int,
        alpha: float,
        sigma: float,
        *,
        noise: str = "gaussian",
        target_radius: float | None = None,
        rtol: float | None = None,
        tile: int = 1,
        skip: int = 0,
    ) -> None:
        super().__init__(n, alpha, sigma, noise=noise, target_radius=target_radius, rtol=rtol, tile=tile, skip=skip)
        self._margin = rounding(self.n) * len(self.looks)
        self._bounds: dict[tuple[int, int], float] = {}
        self._blocks: dict[tuple[int, int], Array] = {}
        if self.target_radius is not None and len(self.looks) > 1:
            self._calibrate()

    def stops(self, counts: Sequence[int]) -> bool:
        return bool(self._stopping(len(counts) - 1, counts[-1], counts[-1])[0])

    def settled(self, k: int, counts: Array) -> Array:
        low = int(counts[:, k].min(initial=self.looks[k]))
        return self._stopping(k, low, int(counts[:, k].max(initial=low)))[counts[:, k] - low]

    def _stopping(self, k: int, low: int, high: int) -> Array:
        """Whether counts from low to high stop at look k, bool [high - low + 1].

        They are worked out in blocks, and only those that somebody asks for: of 10^7 samples there are 8 * 10^7 counts.
        A count is always worked out among the same others, so that no two answers differ by a rounding.
        """
        blocks = [self._block(k, j) for j in range(low // BLOCK, high // BLOCK + 1)]
        return np.concatenate(blocks)[low % BLOCK :][: high - low + 1]

    def _block(self, k: int, j: int) -> Array:
        if (k, j) not in self._blocks:
            counts = np.arange(j * BLOCK, min((j + 1) * BLOCK, self.looks[k] + 1))
            last = k == len(self.looks) - 1
            self._blocks[k, j] = np.ones(len(counts), bool) if last else self._settled(k, counts)
        return self._blocks[k, j]

    def bound(self, counts: Sequence[int]) -> float:
        k, count = len(counts) - 1, counts[-1]
        if (k, count) not in self._bounds:
            self._bounds[k, count] = self._bound(k, count) if count else 0.0
        return self._bounds[k, count]

    def _calibrate(self) -> None:
        """Set `_reached` by bisection over its level."""
        goal, looks = self.early * self.alpha, np.array(self.looks)
        low, high = math.log(goal / len(looks)), math.log(goal)
        while high - low > 0.01:
            middle = (low + high) / 2
            self._reached = _certifying(looks, self._p_wanted, math.exp(middle))
            self._blocks.clear()
            certify = [*map(int, self._reached[:-1]), self.n + 1]
            low, high = (low, middle) if self._chance(self._p_wanted, certify) > goal else (middle, high)
        self._reached = _certifying(looks, self._p_wanted, math.exp(low))
        self._blocks.clear()

    def _bound(self, k: int, count: int) -> float:
        """The root in the probit of q: bracketed about Clopper and Pearson's bound, then on its safe side."""
        at_least = [-(-count * look // self.looks[k]) for look in self.looks]

        @cache
        def excess(probit: float) -> float:
            chance = self._chance(float(special.ndtr(probit)), at_least)
            return math.log(max(chance, 1e-300) / self.alpha) + self._margin

        low = high = float(special.ndtri(clopper_pearson(count, self.looks[k], self.alpha)))
        step = 0.01
        while excess(low) > 0:
            low, high, step = low - step, low, 2 * step
        while high == low or excess(high) <= 0:
            low, high, step = high, high + step, 2 * step
        from scipy.optimize import brentq  # takes a while to import

        root = float(brentq(excess, low, high, xtol=1e-8))
        while excess(root) > 0:
            root -= 1e-8
        if self._p_wanted > special.ndtr(root) and excess(float(special.ndtri(self._p_wanted))) <= 0:
            return self._p_wanted
        return float(special.ndtr(root))

    def _chance(self, q: float, at_least: Sequence[int]) -> float:
        """P_q(the rule stops, at a look k with at_least[k] votes or more), rounded up by at most 1e-6 alpha.

        The recursion of Armitage, McPherson and Rowe (1969): `alive` is the distribution of the count, from `first`
        on, of the images that go on.
        """
        cut = 1e-6 * self.alpha / (6 * len(self.looks))
        total, seen, first, alive = 0.0, 0, 0, np.ones(1)
        for k, look in enumerate(self.looks):
            low, votes = _binomial(look - seen, q, cut)
            alive, first, seen = np.convolve(alive, votes), first + low, look
            stop = self._stopping(k, first, first + len(alive) - 1)
            above = max(at_least[k] - first, 0)
            total += 2 * cut + float(alive[above:][stop[above:]].sum())
            alive[stop] = 0
            sums = alive.cumsum()
            if sums[-1] <= 2 * cut:
                break
            head, tail = sums.searchsorted((cut, sums[-1] - cut), side="right")
            alive, first, total = alive[head : tail + 1], first + int(head), total + 2 * cut
        return total + 2 * cut


METHODS: dict[str, type[Rule]] = {
    "fixed": Fixed,
    "mixture": Mixture,
    "spending": Spending,
    "pilot": Pilot,
    "exact": Exact,
}
DEFAULTS = {"target": "exact", "rtol": "exact", "abstain": "exact"}  # the mode: what may stop an image before n


def rule(
    n: int,
    alpha: float,
    sigma: float,
    *,
    noise: str = "gaussian",
    adaptive: bool = True,
    target_radius: float | None = None,
    rtol: float | None = None,
    method: str | None = None,
    tile: int = 1,
    skip: int = 0,
) -> Rule:
    """The rule of a method of `METHODS`, by default the one that measured best in the mode; `Fixed` if not adaptive.

    It is made once and kept with the bounds it has worked out. Other arguments and errors as in `Rule`.

    Raises:
        ValueError: an argument that decides about stopping, though not adaptive.
    """
    method, radius, share = stopping(n, alpha, sigma, noise, adaptive, target_radius, rtol, method)
    return _made(method, n, alpha, sigma, noise, radius, share, tile, skip)


def stopping(
    n: int,
    alpha: float,
    sigma: float,
    noise: str,
    adaptive: bool,
    target_radius: float | None = None,
    rtol: float | None = None,
    method: str | None = None,
) -> tuple[str, float | None, float | None]:
    """(method, target_radius, rtol) of `rule`, checked with its other arguments; nothing is worked out yet."""
    if not checks.flag("adaptive", adaptive):
        for name, value in (("target_radius", target_radius), ("rtol", rtol), ("method", method)):
            if value is not None:
                raise ValueError(f"{name} must be None unless adaptive is true, got {value!r}")
        method = "fixed"
    if method is None:
        method = DEFAULTS["target" if target_radius is not None else "rtol" if rtol is not None else "abstain"]
    kind = METHODS[checks.choice("method", method, tuple(METHODS))]
    *_, radius, share = kind.checked(n, alpha, sigma, noise=noise, target_radius=target_radius, rtol=rtol)
    return method, radius, share


@lru_cache(maxsize=8, typed=True)
def _made(
    method: str,
    n: int,
    alpha: float,
    sigma: float,
    noise: str,
    target_radius: float | None,
    rtol: float | None,
    tile: int,
    skip: int,
) -> Rule:
    return METHODS[method](n, alpha, sigma, noise=noise, target_radius=target_radius, rtol=rtol, tile=tile, skip=skip)


class Certificate(NamedTuple):
    """Attributes:
    label: class of the smoothed classifier, -1 to abstain.
    radius: within which it is kept, in the norm of the noise's law (`csam.laws`); 0 to abstain.
    samples: how many were drawn, those that chose the class included.
    reason: why no more were: see `Decision`.
    """

    label: int
    radius: float
    samples: int
    reason: str


class Certification:
    """An image on its way to a certificate: which samples are wanted next, and what came of those so far.

    Args:
        rule: when to stop.
        n0: samples 0 .. n0-1 choose the class, the rule sees those from n0 on.
        most: ranges end at its multiples, at the latest; None for all samples up to the next look.
        state: what `state` held when it was given up; None for a new one.

    Attributes:
        chosen: the class; None before the first answer.
        nan: samples that voted for no class. They count as votes against the chosen one, so a certificate is one for
            the classifier that has "no answer" as a class of its own.
    """

    def __init__(self, rule: Rule, n0: int, *, most: int | None = None, state: Mapping[str, Any] | None = None) -> None:
        self.rule, self.n0, self.most = rule, n0, most
        state = state or {"chosen": None, "seen": 0, "votes": 0, "counts": []}
        self.chosen: int | None = state["chosen"]
        self.nan = int(state.get("nan", 0))
        self.seen, self.votes, self.counts = int(state["seen"]), int(state["votes"]), list(state["counts"])

    @property
    def state(self) -> dict[str, Any]:
        """All there is to it, as JSON values: the class, its votes among those seen and at the looks, and `nan`."""
        kept = {"chosen": self.chosen, "seen": self.seen, "votes": self.votes, "counts": list(self.counts)}
        return kept | ({"nan": self.nan} if self.nan else {})

    @property
    def wanted(self) -> list[tuple[int, int]]:
        """(number, first sample) of the ranges wanted now."""
        first, end = self.n0 + self.seen, self.n0 + self.rule.looks[len(self.counts)]
        if self.most is not None:
            end = min(end, (first // self.most + 1) * self.most)
        return [*([(self.n0, 0)] if self.chosen is None else []), (end - first, first)]

    def tell(self, votes: Sequence[Sequence[int]]) -> Certificate | None:
        """The certificate, or None to go on, from the votes [num_classes] of each range that was wanted.

        Raises:
            ValueError: more votes than samples.
        """
        wanted = self.wanted
        missing = [n - sum(found) for found, (n, _) in zip(votes, wanted, strict=True)]
        if min(missing) < 0:
            raise ValueError(f"votes must be no more than the samples wanted, {wanted}, got {-min(missing)} more")
        *selection, step = votes
        for found in selection:
            self.chosen = max(range(len(found)), key=found.__getitem__)  # of a tie the first
        assert self.chosen is not None
        self.votes += step[self.chosen]
        self.seen += wanted[-1][0]
        self.nan += sum(missing)
        if self.seen < self.rule.looks[len(self.counts)]:
            return None
        self.counts.append(self.votes)
        if not self.rule.stops(self.counts):
            return None
        decision = self.rule.decision(self.counts)
        samples, reason = self.n0 + decision.samples, decision.reason
        if decision.radius is None:
            return Certificate(ABSTAIN, 0.0, samples, reason)
        return Certificate(self.chosen, decision.radius, samples, reason)


class Prediction:
    """Cohen et al.'s PREDICT with early stops: the smoothed classifier's class, or abstain.

    Theorem: let p_1 .. p_C be the probabilities of the classes and N their counts after t samples. For i and j let
    M_ij = 2 * integral over u in [1/2, 1] of (2u)^N_i (2(1-u))^N_j du. If p_i <= p_j it is a nonnegative
    supermartingale that starts at 1: a vote for one of the two is i's with probability at most 1/2, and other votes
    change nothing. If j is a class with the largest probability, so is E_j, the mean of M_ij over the others i; by
    Ville's inequality (1939) P(E_j >= 1/level for some t) <= level. The answer i is given when E_j >= 1/level for all
    j but i; a wrong answer has E_j >= 1/level for the true j, so nothing is paid for choosing i from the same votes.
    At n, the test of the top two counts against 1/2 (Hung and Fithian 2019, "Rank verification for exponential
    families") is made at level too; with level = alpha / 2 the sum of the two is alpha.

    It abstains before n when n samples would hardly tell the top two apart, as in `Rule`.

    What that costs, exactly, of two classes at alpha = 0.001 and n = 1,000 and 10,000: where one look at n answers in
    76 % of the runs, this does in 62 %; half of the loss is the early abstaining. With 0.8 alpha at n it would be 66 %,
    for 5 to 16 % more samples. An n that is 7 % larger gives as much, and costs nothing where classes are clear.

    Args:
        n: the most samples, 1 .. 10^7.
        alpha: probability of a wrong class, in [1e-50, 1).
        num_classes: >= 2.
        adaptive: False for Cohen et al.'s own: one look, at n, which may be up to 10^10.
        tile, skip: as in `Rule`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or range.
    """

    def __init__(
        self, n: int, alpha: float, num_classes: int, *, adaptive: bool = True, tile: int = 1, skip: int = 0
    ) -> None:
        self.n = checks.integer("n", n, low=1, high=(Rule if checks.flag("adaptive", adaptive) else Fixed).most)
        self.alpha = checked_alpha(alpha)
        self.num_classes = checks.integer("num_classes", num_classes, low=2)
        tile, skip = checks.integer("tile", tile, low=1), checks.integer("skip", skip, low=0)
        self.looks = geometric_looks(self.n, GROWTH, tile, skip, first=20) if adaptive else (self.n,)

    def decide(self, votes: Sequence[int], seen: int) -> int | None:
        """The class, -1 to abstain, or None to go on, from the votes [num_classes] among the first `seen` samples.

        Raises:
            TypeError, ValueError: `seen` is no look, or votes that cannot be.
        """
        seen = checks.choice("seen", seen, self.looks)
        if len(votes) != self.num_classes:
            raise ValueError(f"votes must have num_classes = {self.num_classes} entries, got {len(votes)}")
        counts = np.array([checks.integer(f"votes[{i}]", v, low=0, high=seen) for i, v in enumerate(votes)])
        if counts.sum() != seen:
            raise ValueError(f"votes must sum to seen = {seen}, got {counts.sum()}")
        answer = int(self.answers(counts[None], seen)[0])
        return None if answer == GO_ON else answer

    def answers(self, counts: Array, seen: int) -> Array:
        """`decide` for int counts [images, num_classes], unchecked; GO_ON for None."""
        first, second = np.argsort(-counts, axis=1, kind="stable")[:, :2].T
        a, b = np.take_along_axis(counts, np.stack([first, second], 1), 1).T
        level = self.alpha if len(self.looks) == 1 else self.alpha / 2
        if seen == self.n:
            told = (a > b) & (2 * upper_tail(np.maximum(a, 1), a + b, 0.5) <= level)
            out = np.where(told, first, ABSTAIN)
        else:
            both = np.round((a + b) * (self.n / seen)).astype(int)
            likely = np.array([_likely(m, 0.5, level / 2) for m in both])
            hopeless = a <= _rejecting(a + b, likely, RARE * math.sqrt(seen / self.n))
            out = np.where(hopeless, ABSTAIN, GO_ON)
        if len(self.looks) > 1:
            wealth = _log_duel(counts[:, :, None], counts[:, None, :])  # [images, i, j]
            wealth[:, np.arange(self.num_classes), np.arange(self.num_classes)] = -math.inf
            against = special.logsumexp(wealth, axis=1) - math.log(self.num_classes - 1)
            np.put_along_axis(against, first[:, None], math.inf, 1)
            out = np.where(against.min(1) >= -math.log(level) + rounding(self.n), first, out)
        return out


def geometric_looks(n: int, growth: float, tile: int = 1, skip: int = 0, first: int = FIRST_LOOK) -> tuple[int, ...]:
    """Numbers of samples from about `first` to n, each about `growth` times the last, at the ends of tiles."""
    looks, look = {n}, float(first)
    while look < n:
        whole = math.ceil(look)
        whole += -(skip + whole) % tile
        looks.add(min(whole, n))
        look *= growth
    return tuple(sorted(looks))


def clopper_pearson(count: int, n: int, alpha: float) -> float:
    """Exact one-sided lower bound of Clopper and Pearson (1934) on the probability of a vote, unchecked.

    It is the alpha-quantile of Beta(count, n - count + 1), and 0 for no vote. scipy's own is far off where votes are
    few of 10^8 samples and more: what it gives is put back, and searched for anew if it does not fit.
    """
    if count <= 0:
        return 0.0
    bound = float(special.betaincinv(count, n - count + 1, alpha))
    if not abs(float(special.betainc(count, n - count + 1, bound)) / alpha - 1) < 1e-6:
        from scipy.optimize import brentq  # takes a while to import

        def above(p: float) -> float:
            return float(special.betainc(count, n - count + 1, p)) - alpha

        bound = float(brentq(above, 0.0, 1.0, xtol=1e-300, rtol=1e-15, maxiter=1000))
    return bound


def about_clopper_pearson(count: Array, n: int, alpha: float) -> Array:
    """Paulson's (1942) approximation of it, within 3 % of 1 - p_A, for real counts too: for predictions."""
    a = np.maximum(count, 1e-9)
    b = n - a + 1
    z, u, v = float(special.ndtri(alpha)), 1 / (9 * a), 1 / (9 * b)
    x, y, w = (1 - v) ** 2 - z * z * v, (1 - u) * (1 - v), (1 - u) ** 2 - z * z * u
    odds = a / b * np.maximum((y - np.sqrt(np.maximum(y * y - x * w, 0))) / x, 0) ** 3
    return odds / (1 + odds)


def upper_tail(count: Array, n: Array | int, p: Array | float) -> Array:
    """P(Binomial(n, p) >= count) for counts from 1 to n + 1."""
    return np.where(count <= n, special.betainc(count, np.maximum(n - count + 1, 1), p), 0.0)


def rounding(n: int) -> float:
    """A bound on the rounding error of a logarithm of a probability of up to n samples, a few terms about log n!."""
    return 1e-8 + 8 * float(np.finfo(float).eps * special.gammaln(n + 1.0))


def _certifying(n: Array, p: Array | float, level: Array | float) -> Array:
    """Fewest votes in n samples that have probability at most `level` if that of a vote is p; n + 1 if none have."""
    low, high = np.zeros_like(n), n + 1
    for _ in range(int(n.max()).bit_length() + 1):
        middle = np.clip((low + high) // 2, 1, None)
        out = upper_tail(middle, n, p) <= level
        low, high = np.where(out, low, middle), np.where(out, middle, high)
    return high


def _rejecting(n: Array, p: Array | float, level: Array | float) -> Array:
    """Most votes in n samples such that so many or fewer have probability at most `level`; -1 if none, n if p is 1."""
    return np.where(np.asarray(p) < 1, n - _certifying(n, 1 - np.asarray(p), level), n)


@lru_cache(maxsize=4096)
def _likely(n: int, p: float, alpha: float) -> float:
    """The probability of a vote at which n samples exclude p and less, at alpha, in 99 of a hundred runs; 1 if none."""
    least = int(_certifying(np.array([n]), p, alpha)[0])
    return 1.0 if least > n else float(special.betaincinv(least, n - least + 1, 1 - RARE))


def _log_duel(a: Array, b: Array) -> Array:
    """log M_ij of `Prediction` for N_i = a and N_j = b votes."""
    with np.errstate(divide="ignore"):  # of the log of a probability that underflows
        upper_half = np.log(special.betaincc(a + 1.0, b + 1.0, 0.5))
    return (a + b + 1) * math.log(2) + special.betaln(a + 1.0, b + 1.0) + upper_half


def _binomial(n: int, p: float, cut: float) -> tuple[int, Array]:
    """Lower end and probabilities of Binomial(n, p) on an interval that misses at most 2 cut (Bernstein 1924)."""
    log = math.log(1 / cut)
    half = log / 3 + math.sqrt(log * log / 9 + 2 * n * p * (1 - p) * log)
    low, high = max(0, math.floor(n * p - half)), min(n, math.ceil(n * p + half))
    k = np.arange(low, high + 1.0)
    choose = _log_factorials(n, n) - _log_factorials(low, high) - _log_factorials(n - high, n - low)[::-1]
    return low, np.exp(choose + special.xlogy(k, p) + special.xlog1py(n - k, -p))


def _log_factorials(low: int, high: int) -> Array:
    """log low! .. log high!."""
    if high < 1 << 20:  # tables of 16 MiB in all
        return _log_factorial_table(1 << high.bit_length())[low : high + 1]
    return special.gammaln(np.arange(low + 1.0, high + 2))


@cache
def _log_factorial_table(size: int) -> Array:
    return special.gammaln(np.arange(1.0, size + 1))


def checked_alpha(alpha: float) -> float:
    """The number, which must be in [LEAST, 1)."""
    alpha = checks.real("alpha", alpha, above=0, below=1)
    if alpha < LEAST:
        raise ValueError(f"alpha must be at least {LEAST:g}, bounds at lower levels are not reliable, got {alpha:g}")
    return alpha


__all__ = [
    "DEFAULTS",
    "METHODS",
    "Certificate",
    "Certification",
    "Decision",
    "Exact",
    "Fixed",
    "Mixture",
    "Pilot",
    "Prediction",
    "Rule",
    "Spending",
    "geometric_looks",
    "rule",
]

"""Settings chosen by Optuna: its samplers draw them, its pruners end what falls behind."""

import warnings
import zlib
from typing import TYPE_CHECKING, Any

from optuna import Study, pruners, samplers
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from knowsam.sweep.spec import Search

if TYPE_CHECKING:
    from optuna.trial import Trial


def make_sampler(search: Search, number: int) -> samplers.BaseSampler:
    """The sampler of trial ``number``; it draws by the seed, the number and the results so far.

    Args:
        search: which sampler, and its seed.
        number: of the trial in the study.
    """
    seed = zlib.crc32(f"{search.seed}/{number}".encode())
    if search.sampler == "qmc":
        with warnings.catch_warnings():  # that Optuna may change it one day
            warnings.simplefilter("ignore")
            return samplers.QMCSampler(seed=search.seed, scramble=True)  # one sequence; the study counts the place
    if search.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if search.sampler == "gp":
        return samplers.GPSampler(seed=seed)
    # Trials under way count as bad ones, so that parallel workers don't all draw the same point.
    return samplers.TPESampler(seed=seed, constant_liar=True)


def make_pruner(search: Search) -> pruners.BasePruner:
    """What decides whether a trial goes on, from the validation Dice that it and the others had at the same step."""
    if search.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_steps)
    if search.pruner == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=max(1, search.warmup_steps))
    if search.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=max(1, search.warmup_steps))
    return pruners.NopPruner()


def distributions(space: dict[str, Any]) -> dict[str, BaseDistribution]:
    """Optuna's form of ``{dotted key: [choices] | {low, high[, log][, step]}}``."""

    def of(choice: Any) -> BaseDistribution:
        if isinstance(choice, list):
            return CategoricalDistribution(choice)
        log, step = choice.get("log", False), choice.get("step")
        if all(isinstance(value, int) for value in (choice["low"], choice["high"], step or 1)):
            return IntDistribution(choice["low"], choice["high"], log=log, step=step or 1)
        return FloatDistribution(choice["low"], choice["high"], log=log, step=step)

    return {key: of(choice) for key, choice in space.items()}


def ask(study: Study, search: Search, number: int) -> "Trial":
    """Draw the settings of trial ``number``.

    Args:
        study: to which the trial is added.
        search: the space and the sampler.
        number: of the trial in the study.
    """
    study.sampler = make_sampler(search, number)
    return study.ask(fixed_distributions=distributions(search.space))


def setting_text(params: dict[str, Any]) -> str:
    """``lr=0.00132, mixing=true``."""
    text = {k: f"{v:.4g}" if isinstance(v, float) else str(v).lower() for k, v in params.items()}
    return ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in text.items())

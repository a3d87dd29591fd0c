"""What a sweep will cost before it is started: its settings, and the time of their training steps."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from knowsam.config import parse_config, to_yaml
from knowsam.errors import KnowsamError
from knowsam.sweep.spec import Sweep, Trial, first_point, resolve


@dataclass(frozen=True)
class SettingCost:
    """One setting of a sweep.

    Attributes:
        experiment: name of the base experiment; ``search`` of a search.
        setting: what distinguishes it.
        seeds: of its runs.
        keys: of its trials.
        steps: updates of one run.
        runs: how many runs it has; of a search, how many settings are tried.
        step_seconds: seconds of one update; None if it was not timed, or could not be.
    """

    experiment: str
    setting: str
    seeds: list[int]
    keys: list[str]
    steps: int
    runs: int
    step_seconds: float | None = None

    @property
    def run_seconds(self) -> float | None:
        """Seconds of training steps of one run."""
        return None if self.step_seconds is None else self.step_seconds * self.steps


@dataclass
class SweepCost:
    """All settings of a sweep.

    Attributes:
        settings: in the order of the sweep file.
        unknown: why the time is not known -> the settings of which that is so.
    """

    settings: list[SettingCost] = field(default_factory=list)
    unknown: dict[str, list[str]] = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Runs in all."""
        return sum(setting.runs for setting in self.settings)

    @property
    def seconds(self) -> float:
        """Seconds of training steps in all, one trial at a time; settings of unknown time count as nothing."""
        return sum((setting.run_seconds or 0.0) * setting.runs for setting in self.settings)


def sweep_cost(sweep: Sweep, step_seconds: Callable[[str], float] | None = None) -> SweepCost:
    """The settings of a sweep, and what their training steps will cost.

    Args:
        sweep: the expanded sweep file.
        step_seconds: seconds of one update of an experiment, which is given as resolved YAML text; None: nothing is
            timed. A setting for which it raises a ``KnowsamError`` is of unknown cost.
    """
    cost = SweepCost()
    unknown = defaultdict(list)
    for members in _settings(sweep):
        first, seconds = members[0], None
        if step_seconds is not None:
            try:
                seconds = step_seconds(first.config)
            except KnowsamError as error:
                unknown[str(error)].append(f"{first.experiment}, {first.setting}")
        seeds, keys = [trial.seed for trial in members], [trial.key for trial in members if trial.key]
        steps = parse_config(first.config, first.setting).train.max_steps
        runs = sweep.search.trials if sweep.search else len(members)
        cost.settings.append(SettingCost(first.experiment, first.setting, seeds, keys, steps, runs, seconds))
    cost.unknown = dict(unknown)
    return cost


def _settings(sweep: Sweep) -> Iterator[list[Trial]]:
    """The trials of each setting; of a search its first point, without a key, as its trials are not drawn."""
    if sweep.search is not None:
        overrides = {**sweep.overrides, **first_point(sweep.search), "train.seed": sweep.seed}
        text = to_yaml(resolve(sweep.base, overrides))
        yield [Trial("", "its first point", "search", sweep.seed, overrides, text)]
        return
    members = defaultdict(list)
    for trial in sweep.trials:
        members[trial.experiment, trial.setting].append(trial)
    yield from members.values()

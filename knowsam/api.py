"""Training from Python: what ``knowsam train`` does, as a function."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knowsam.runs import LoadedRun, load_run


def train(experiment: str | Path, overrides: Mapping[str, Any] | None = None, **settings: Any) -> LoadedRun:
    """Train an experiment, or go on where its run stopped, and load the run with its best weights::

        run = knowsam.train("experiments/quickstart.yaml", {"train.max_steps": 100}, method={"name": "mean_teacher"})

    Args:
        experiment: YAML file.
        overrides: dotted setting -> value, as on the command line.
        settings: the same for settings without a dot, and, with two underscores for a dot, for all others:
            ``train__seed=1``.
    Returns:
        The finished run.
    Raises:
        KnowsamError: everything for which the command line would end with an error.
    """
    from knowsam.cli import train as command
    from knowsam.config import load_config

    given = {**(overrides or {}), **{name.replace("__", "."): value for name, value in settings.items()}}
    words = [f"{key}={json.dumps(value)}" for key, value in given.items()]  # JSON is YAML
    command.run(command.TrainArguments(str(experiment), words))
    return load_run(command.run_path(load_config(experiment, words)))

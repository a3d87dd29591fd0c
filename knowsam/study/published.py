"""What preparing a public data set is asked for, and what comes of it."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from knowsam import config
from knowsam.data.make_splits import make_folder, write_lists
from knowsam.data.splits import load_splits
from knowsam.errors import DataError
from knowsam.files import write_text
from knowsam.study.experiment import RECIPES, Recipe, base_file
from knowsam.study.read import Study

_SHOWN = 20


@dataclass(frozen=True)
class Request:
    """One call of ``prepare``.

    Attributes:
        name: of the data set and of the experiment.
        folder: that holds the download's files.
        data: where files that are made of them go.
        experiment: YAML file to write.
        lists: folder for the lists.
        recipe: what the experiment inherits.
        seed: of lists that are drawn.
        allow_missing: go on without cases that published lists name.
        force: replace what is there.
        command: the command line that would do the same again.
        progress: called as (done, in all).
    """

    name: str
    folder: Path
    data: Path
    experiment: Path
    lists: Path
    recipe: Recipe
    seed: int
    allow_missing: bool
    force: bool
    command: str
    progress: Callable[[int, int], None] | None


@dataclass
class Result:
    """What was made.

    Attributes:
        experiment: the file.
        lists: folder of its lists.
        notes: what was found and done, for people.
        warnings: what they should look into.
        study: the pictures as ``init`` reads them; None for volumes, or lists that come with this package.
    """

    experiment: Path
    lists: Path
    notes: list[str]
    warnings: list[str]
    study: Study | None = None


def missing_cases(missing: Sequence[str], of: str, request: Request) -> list[str]:
    """The warning about cases that are not there.

    Args:
        missing: their names.
        of: whose.
        request: tells whether that may be.
    Raises:
        DataError: it may not.
    """
    if not missing:
        return []
    shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
    text = f"{len(missing)} {of} are missing: {shown}"
    if not request.allow_missing:
        raise DataError(text, hint="Complete the download; or go on without them with --allow-missing.")
    return [text + "; the lists go without them, and scores are no longer comparable with published ones"]


def write_plain_experiment(request: Request, *, base: str, data: Mapping[str, Any], load: bool = True) -> None:
    """Write an experiment that inherits a recipe and a data set of ``experiments/base``.

    Args:
        request: where it goes, and which recipe.
        base: the data set's file.
        data: what stands under ``data``.
        load: read it once, so that a mistake of ours is seen here.
    """
    experiment = request.experiment
    parents = [base_file(experiment, RECIPES[request.recipe]), base_file(experiment, base)]
    body = {"inherits": parents, "name": experiment.stem, "data": dict(data)}
    text = f"# {experiment.stem}: written by {request.command or 'knowsam prepare'}\n"
    make_folder(experiment.parent)
    write_text(experiment, text + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120))
    if load:
        config.load_config(experiment)


def lists_without(folder: Path, gone: Collection[str]) -> dict[str, str]:
    """File name -> text of every list of a folder, without some cases; lists that are then empty are left out.

    Args:
        folder: of the lists.
        gone: ids.
    """
    files = {}
    for path in sorted(folder.glob("*.txt")):
        ids = [i for i in path.read_text(encoding="utf-8").split() if i not in gone]
        if ids:
            files[path.name] = "".join(f"{i}\n" for i in ids)
    return files


def fitting_lists(request: Request, shipped: Path, gone: Collection[str], labelled: str) -> Path:
    """The folder of lists to use: those that come with this package, or a copy of them without some cases.

    Args:
        request: where a copy goes.
        shipped: folder of the lists.
        gone: ids that are not there.
        labelled: the label list that the experiment begins with.
    Raises:
        DataError: too little is left to train on.
        ExistsError: other lists are there.
    """
    if not gone:
        return shipped
    files = lists_without(shipped, gone)
    lacking = [name for name in ("train.txt", "val.txt", f"{labelled}.txt") if name not in files]
    if lacking:
        raise DataError(f"nothing is left of {', '.join(lacking)}", hint="Complete the download.")
    summary = f"# Split lists\n\n`{shipped.name}` of knowsam without {len(gone)} cases that the download lacks, by\n\n"
    write_lists(request.lists, files, f"{summary}    {request.command}\n", force=request.force)
    load_splits(request.lists, labelled)
    return request.lists

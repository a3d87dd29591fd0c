"""Folders with scores that no training of ours made: ``compare`` and ``report`` read them as runs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.engine.scores import Evaluation


def write_scored(
    folder: str | os.PathLike[str],
    config: "Config",
    method: str,
    splits: Mapping[str, Any],
    evaluation: "Evaluation",
    stem: str,
) -> None:
    """Write an evaluation as a run's: ``config.yaml``, ``splits.json``, ``status.json`` and ``evaluation/``.

    Args:
        folder: made if it is not there; may hold scores of this kind, which are replaced.
        config: the experiment whose data were scored.
        method: what stands in the place of ``method.name``, by which tables call the row.
        splits: as train writes them: ``labelled``, ``train_cases``, ``source``, ``sha256``.
        evaluation: with a ``checkpoint`` that says its ``kind``.
        stem: of the evaluation's files.
    Raises:
        RunFolderError: the folder holds a training, or something else.
        StorageError: the disk refuses.
    """
    import yaml

    from knowsam.config import to_yaml
    from knowsam.engine.runfolder import RunFolder
    from knowsam.errors import RunFolderError

    folder = Path(folder)
    there = RunFolder(folder, create=False) if RunFolder.exists(folder) else None
    if there is not None and (there.best.exists() or there.resumable or there.metrics.exists()):
        raise RunFolderError(f"{folder} holds a training; its scores stay as they are", hint="Choose another -o.")
    run = RunFolder(folder)
    evaluation.write(run.evaluation, stem)
    values = yaml.safe_load(to_yaml(config))
    values["method"] = {"name": method}
    run.write_json(run.splits, dict(splits))
    run.status("complete", 0, called=method)
    run.config.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")

"""What makes two runs the same experiment: the settings that matter for training, and the split lists."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from knowsam.config import Config, beside, parse_config, to_yaml
from knowsam.digest import stated_digest
from knowsam.errors import ConfigError

# Settings that change no weight, so a run may be resumed with others.
COSMETIC = {
    "run",
    "name",
    "data.workers",
    "data.cache",
    "data.obtain",
    "train.log_every",
    "train.checkpoint_every",
    "train.snapshot_every",
    "train.tensorboard",
    "train.pictures_every",
    "train.device",
    "evaluate.batch_size",
    "evaluate.nsd_tolerance",
    "evaluate.postprocess",
}


# Settings that came later, with the value that is what was done before there was a choice. They are no part of the key
# while they have it: else every finished trial of older sweeps would be another experiment.
LATER: dict[str, Any] = {
    "train.gradient_exchange": "fp32",
    "init": None,
    "data.sources": None,
    "data.ignore": None,
    "data.channels": 3,
    "data.intensity.name": "as_is",
    "data.reading": {},
    "data.fit": "squash",
    "data.patch_size": None,
    "data.foreground": 0.5,
    "evaluate.overlap": 0.5,
}


def flat_config(config: Config | str) -> dict[str, Any]:
    """Dotted key -> value of every setting.

    Args:
        config: a configuration, or the YAML text that a run stores.
    """

    return _flat(yaml.safe_load(config) if isinstance(config, str) else asdict(config))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict) or not values or prefix[:-1] in COSMETIC:
        return {prefix[:-1]: values}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}{key}.").items()}


def config_changes(old_yaml: str, config: Config) -> list[str]:
    """``key: old -> new`` for every setting that differs and matters for training.

    One that is not given is another than one that is null: where a block has a default, null switches it off.
    """
    try:
        # Filled up with today's defaults: before there was a choice, a run had what was then the only one.
        old = flat_config(to_yaml(parse_config(old_yaml, "the run's configuration")))
    except ConfigError:
        old = flat_config(old_yaml)
    new = flat_config(to_yaml(config))
    differing = (key for key in {**old, **new} if (key in old, old.get(key)) != (key in new, new.get(key)))
    return [f"{key}: {_shown(old, key)} -> {_shown(new, key)}" for key in differing if key not in COSMETIC]


def _shown(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not given"


def split_hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the list files that the experiment uses, by file name; the built-in data's version if it has none.

    Only the lists are read, not the data, which may lie on another machine.
    """
    if config.data.sources is not None:
        parts = {
            name: replace(
                config,
                data=replace(
                    config.data,
                    sources=None,
                    splits=block.get("splits"),
                    labelled=block.get("labelled", config.data.labelled),
                ),
            )
            for name, block in config.data.sources.items()
        }
        return {f"{name}/{file}": digest for name, part in parts.items() for file, digest in split_hashes(part).items()}
    if config.data.splits is None:
        if config.data.source.get("name") != "builtin":
            return {}
        from knowsam.data.builtin import VERSION

        return {"builtin": str(VERSION)}
    named, labelled = config.lists
    folder, labelled = beside(str(named)), labelled.removesuffix(".txt")
    names = ["train.txt", "val.txt", "test.txt", *([] if labelled == "all" else [f"{labelled}.txt"])]
    files = [folder / name for name in names]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def init_digests(config: Config) -> dict[str, str]:
    """SHA-256 of the checkpoints that the experiment begins from, by part; without those that are not there (yet)."""
    blocks = config.init if isinstance(config.init, list) else [] if config.init is None else [config.init]
    found = {}
    for block in blocks:
        digest = stated_digest(beside(block["from"]) / f"{block.get('checkpoint', 'best')}.pt")
        if digest is not None:
            found[f"init {block['part']}"] = digest
    return found


def experiment_key(config: Config) -> str:
    """Ten hexadecimal digits that two runs share only if they train the same thing on the same lists."""
    flat = flat_config(config).items()
    settings = {key: value for key, value in flat if key not in COSMETIC and (key, value) not in LATER.items()}
    text = json.dumps({"settings": settings, "splits": split_hashes(config) | init_digests(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]

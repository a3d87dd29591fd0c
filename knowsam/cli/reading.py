"""What a report is handed of a run: what its configuration means, and its networks. Configurations stay out of it."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from knowsam.data.source import Source
    from knowsam.report.page.networks import Networks
    from knowsam.report.runs import Reader


def reader(split: str) -> "Reader":
    """How ``compare`` and ``report`` read run folders.

    Args:
        split: ``test`` or ``val``: whose scores.
    """
    from knowsam.config.identity import COSMETIC
    from knowsam.report.runs import Reader

    return Reader(split, _settings, frozenset(COSMETIC), _defaults)


def open_networks(folder: str, checkpoint: Literal["best", "last"]) -> "Networks":
    """A ``report.page.networks.OpenNetworks``."""
    from dataclasses import replace

    from knowsam import build
    from knowsam.data.source import CaseSource
    from knowsam.engine.precision import autocast_dtype
    from knowsam.report.page.networks import Networks
    from knowsam.runs import load_run

    run = load_run(folder, checkpoint, sam=True)
    config = run.config

    def open_source(labelled: str | None) -> "Source":
        data = config.data if labelled is None else replace(config.data, labelled=labelled)
        source: Source = build.build_source(replace(config, data=data))
        if isinstance(source, CaseSource):
            source.preparation = run.preparation
        return source

    return Networks(
        path=run.path,
        step=run.step,
        method=run.method,
        open_source=open_source,
        class_names=config.data.classes[1:],
        sight=build.sight(config),
        batch_size=config.evaluate.batch_size,
        autocast=autocast_dtype(config.train.precision),
    )


def _settings(text: str) -> dict[str, Any]:
    """Dotted key -> value. Raises ValueError for what is no YAML."""
    import yaml

    from knowsam.config import parse_config
    from knowsam.config.identity import flat_config
    from knowsam.errors import ConfigError

    try:
        # Filled up with today's defaults: a key that did not exist when an older run was made is no difference.
        return flat_config(parse_config(text, "config.yaml"))
    except ConfigError:  # a method of one's own that is not installed here, say; its scores are good all the same
        try:
            return flat_config(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error


def _defaults(text: str) -> dict[str, Any]:
    """Dotted key -> default of this version, for everything that the configuration may set.

    Empty for a configuration that this version cannot read, such as one with a method that is not installed here.
    """
    from knowsam.config import Config, parse_config
    from knowsam.config.checking import default_settings
    from knowsam.config.identity import flat_config
    from knowsam.errors import ConfigError

    try:
        config = parse_config(text, "config.yaml")
        defaults = default_settings(config)
    except ConfigError:
        return {}
    # Where there usually is no such block (skd), writing it is a choice, whatever its options are.
    usually_absent = {key for key, value in flat_config(Config()).items() if value is None}
    chosen = {key for key in flat_config(config) if key.partition(".")[0] in usually_absent}
    return {key: value for key, value in defaults.items() if key not in chosen}

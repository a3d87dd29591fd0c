"""``knowsam index``: a data set looked through once, written down in one file that trainings map."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knowsam.config import Config
    from knowsam.data.index import Index
    from knowsam.data.make_index import Place, Wanted

EPILOG = """examples:
  python tools/index.py experiments/my_study.yaml                   # names, sizes, dates, patients; its lists too
  python tools/index.py experiments/my_study.yaml --digests --masks # also reads every file once
  python tools/index.py data/study --domain-regex '^([a-z]+)/'
  python tools/index.py experiments/my_study.yaml --check           # what has changed since

The same command brings an index up to date: only what is new or was written over is read. Broken off, it goes on
where it was. docs/scale.md says what is in it and who uses it.
exit codes: 0 done, 65 bad data, or --check found changes, 66 not found, 74 disk, 78 wrong arguments.
"""

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("target", metavar="EXPERIMENT|FOLDER", help="folder of images and masks, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of an experiment: dotted keys")
    parser.add_argument(
        "--out", metavar="FILE", help="the index; in the cache folder, where trainings look, if not given"
    )
    parser.add_argument("--digests", action="store_true", help="also sha256 of every file: finds copies in two lists")
    parser.add_argument("--masks", action="store_true", help="also the smallest and largest value of every mask")
    parser.add_argument("--group-regex", metavar="REGEX", help="the part of a name that is the patient: '^(p[0-9]+)'")
    parser.add_argument("--groups", metavar="CSV", help="file that names the patient of each image: id,group")
    parser.add_argument("--domain-regex", metavar="REGEX", help="the part of a name that is the domain: '^([a-z]+)/'")
    folder = parser.add_argument_group("of a folder; an experiment says these in data.source")
    folder.add_argument("--image-dir", default="images", metavar="DIR", help="its folder of images; images")
    folder.add_argument("--mask-dir", default="masks", metavar="DIR", help="its folder of masks; masks")
    folder.add_argument("--image-suffix", default="", metavar="TEXT", help="what image names have after the case")
    folder.add_argument("--mask-suffix", default="", metavar="TEXT", help="what mask names have after the case")
    parser.add_argument("--check", action="store_true", help="build nothing; look what has changed since it was built")


def run(args: argparse.Namespace) -> int:
    """Build or check the index, say what was found."""
    from knowsam.data.index import Index
    from knowsam.data.make_index import earlier_index, index_place, make_index
    from knowsam.engine.log import Counter, say, warn
    from knowsam.errors import ConfigError, DataError

    if args.group_regex and args.groups:
        raise ConfigError("--groups and --group-regex exclude each other; give one of them")
    config = _experiment(args)
    root, places = _places_of_experiment(config) if config is not None else _places_of_folder(args)
    path = Path(args.out) if args.out else index_place(root, places)
    if args.check:
        changes = Index(path).stale(None)
        for line in changes[:_SHOWN]:
            say(line)
        if len(changes) > _SHOWN:
            say(f"... and {len(changes) - _SHOWN} more")
        if changes:
            say(
                f"{path} is stale: {len(changes)} changes in {root}; the same command without --check reads what is new"
            )
            return DataError.exit_code
        say(f"{path} is up to date: {len(Index(path))} cases of {root}")
        return 0
    if args.masks and not any(place.masks for place in places):
        raise ConfigError("--masks is for masks that are files of their own", hint="Leave it out.")
    earlier = earlier_index(path)
    if earlier is not None:  # brought up to date, not made poorer
        args.digests |= earlier.has("image_digest")
        args.masks |= earlier.has("mask_low")
    with Counter("reading files") as progress:
        report = make_index(path, root, places, _wanted(args, config), progress=progress)
    for note in report.notes:
        warn(note)
    index = Index(path)
    say(
        f"{path}: {report.cases} cases of {root}, {report.masks} with a mask, {path.stat().st_size / 1e6:.1f} MB; "
        f"{report.read} files read, {report.known} known from before"
    )
    if config is not None and config.data.splits is not None:
        _read_lists(config, index)
    return 0


def _experiment(args: argparse.Namespace) -> "Config | None":
    from knowsam.config import load_config
    from knowsam.errors import ConfigError

    if Path(args.target).is_dir():
        if args.overrides:
            raise ConfigError(f"{args.overrides[0]!r}: a folder has no settings to override")
        return None
    if (args.image_dir, args.mask_dir, args.image_suffix, args.mask_suffix) != ("images", "masks", "", ""):
        raise ConfigError("the folders and suffixes of an experiment are those of its data.source")
    return load_config(args.target, args.overrides)


def _places_of_folder(args: argparse.Namespace) -> "tuple[Path, list[Place]]":
    from knowsam.data.make_index import image_folder_places
    from knowsam.errors import NotFoundError

    root = Path(args.target).absolute()
    for option, folder in (("--image-dir", args.image_dir), ("--mask-dir", args.mask_dir)):
        if not (root / folder).is_dir():
            there = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
            raise NotFoundError(
                f"{root} has no folder {folder!r}; folders in it: {there}", hint=f"Name the right one: {option} DIR."
            )
    return root, image_folder_places(args.image_dir, args.mask_dir, args.image_suffix, args.mask_suffix)


def _places_of_experiment(config: "Config") -> "tuple[Path, list[Place]]":
    import inspect

    from knowsam.config import data_places
    from knowsam.data.make_index import h5_places, image_folder_places
    from knowsam.errors import ConfigError, NotFoundError

    block = dict(config.data.source)
    name, root = block.pop("name"), str(block.pop("root", ""))
    kinds: dict[str, Callable[..., list[Place]]] = {"image_folder": image_folder_places, "h5_slices": h5_places}
    if name not in kinds:
        raise ConfigError(f"data.source is {name}; an index is made of files of {' and '.join(kinds)}")
    folders = [Path(root)] if Path(root).is_absolute() else data_places(root)
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        looked = "\n".join(f"  {folder}" for folder in folders)
        raise NotFoundError(f"the dataset folder {root!r} is not there; looked in\n{looked}", hint=config.data.obtain)
    given = {key: block[key] for key in inspect.signature(kinds[name]).parameters if key in block}
    return found.absolute(), kinds[name](**given)


def _wanted(args: argparse.Namespace, config: "Config | None") -> "Wanted":
    from knowsam.config import beside
    from knowsam.data.make_index import Wanted
    from knowsam.data.splits import GROUPS_FILE, group_finder, read_groups, regex_rule, table_rule

    regex, table = args.group_regex, Path(args.groups) if args.groups else None
    if config is not None and not regex and table is None:  # as the lists are checked
        lists = beside(str(config.lists[0])) / GROUPS_FILE if config.data.splits is not None else None
        table = lists if lists is not None and lists.is_file() else None
        regex = None if table is not None else config.data.group_regex
    group: Callable[[str], str | None] | None = None
    rule = ""
    if table is not None:
        group, rule = read_groups(table).get, table_rule(table)
    elif regex:
        group, rule = group_finder(regex), regex_rule(regex)
    return Wanted(
        digests=args.digests,
        mask_range=_mask_range if args.masks else None,
        group=group,
        domain=group_finder(args.domain_regex) if args.domain_regex else None,
        group_rule=rule,
    )


def _mask_range(path: Path) -> tuple[int, int]:
    from knowsam import io

    values: Any = io.read_mask(path).array
    return int(values.min()), int(values.max())


def _read_lists(config: "Config", index: "Index") -> None:
    """Translate the lists now rather than at the first training; what is wrong with them is said now, too."""
    from knowsam.config import beside
    from knowsam.data.splits import check_against, load_splits
    from knowsam.engine.log import say

    named, labelled = config.lists
    folder = beside(str(named))
    splits = load_splits(folder, labelled, group_regex=config.data.group_regex, index=index)
    check_against(splits, index, where=str(index.root))
    counts = ", ".join(f"{len(getattr(splits, name))} {name}" for name in ("train", "labelled", "val", "test"))
    say(f"lists in {folder}: {counts}; every case is there")

"""A study as an experiment file that trains as it is."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from knowsam import config
from knowsam.data.layout import Folders
from knowsam.data.make_splits import ALL_MASKS, make_folder
from knowsam.errors import ConfigError, DataError, ExistsError, NotFoundError
from knowsam.files import write_text
from knowsam.study.classes import absent_classes
from knowsam.study.lists import write_study_lists
from knowsam.study.read import Study

Recipe = Literal["full", "small"]
"""``full``: the published one, for a GPU; ``small``: what 2 cores can do."""

VOLUME_RECIPES: dict[Recipe, str] = {"full": "volumes_published.yaml", "small": "small.yaml"}
"""Files of ``experiments/base`` for volumes; the small one is made small in three dimensions by ``volume_lines``."""

RECIPES: dict[Recipe, str] = {"full": "published.yaml", "small": "small.yaml"}


def experiment_places(out: str | Path, name: str, *, force: bool = False) -> tuple[Path, Path]:
    """Where an experiment of that name and the folder of its lists go, before anything is read.

    Args:
        out: gets ``experiments/`` and ``data_splits/``.
        name: of the experiment.
        force: an experiment that is there already may be replaced.
    Raises:
        ConfigError: a name that files cannot have.
        ExistsError: the experiment is there already.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(f"{name!r} cannot be a name; allowed are letters, digits, _ and -")
    out = Path(out).expanduser()
    experiment, lists = out / "experiments" / f"{name}.yaml", out / "data_splits" / name
    if experiment.exists() and not force:
        raise ExistsError(f"{experiment} is there already", hint="Choose another name, or replace it with --force.")
    return experiment, lists


def write_experiment(
    study: Study, experiment: Path, lists: Path, *, command: str, recipe: Recipe = "small", force: bool = False
) -> None:
    """Write the lists and the experiment, and load it once, so that a mistake of ours is seen here.

    Args:
        study: read and drawn.
        experiment: YAML file to write.
        lists: folder for the lists.
        command: the command line that would do the same again.
        recipe: what the experiment inherits.
        force: replace other lists.
    Raises:
        DataError: no list to validate on, which training needs.
        NotFoundError: this is no checkout, so there is nothing to inherit from.
        ExistsError, StorageError: as ``write_study_lists``.
    """
    if study.volumes is not None and not hasattr(config.Config().data, "patch_size"):
        raise DataError("these are volumes, and this version trains on pictures only")
    text = experiment_text(study, experiment, lists, recipe)  # before the lists: it may refuse
    write_study_lists(study, lists, command=command, force=force)
    make_folder(experiment.parent)
    write_text(experiment, text)
    config.load_config(experiment)


def experiment_text(study: Study, experiment: Path, lists: Path, recipe: Recipe = "small") -> str:
    """The experiment as commented YAML.

    Args:
        study: read and drawn.
        experiment: the file that the text is for; paths are as they look from there.
        lists: folder of the lists.
        recipe: what it inherits.
    Raises:
        DataError: no list to validate on.
        NotFoundError: this is no checkout.
    """
    if not study.drawn.lists.get("val"):
        raise DataError(
            "there is no validation case, and training chooses its checkpoint on these",
            hint="Give --val a number above 0; at least one image besides those for training needs a mask.",
        )
    name, classes, options = experiment.stem, study.classes, study.options
    base = recipe_file(recipe, volumes=study.volumes is not None)
    labelled = default_labelled(study)
    available = ", ".join(name for name in study.drawn.lists if name.startswith("labelled_"))
    lines = [
        f"# {name}: written by knowsam init. Every key: `make docs`, docs/_build/html/config_reference.html.",
        f"#   knowsam check {name}.yaml, then knowsam train {name}.yaml; baseline: method.name=supervised",
        f"inherits: {base_file(experiment, base)}   # {_RECIPE_NOTES[recipe]}",
        f"name: {name}",
        "data:",
        f"  source: {_flow(_source_block(study))}",
        f"  splits: {_flow(portable_lists(lists))}",
        f"  labelled: {labelled}   # {_why(study, labelled)}; there are: {available}",
        f"  classes: {_flow(classes.names)}",
    ]
    if classes.threshold is not None:
        lines.append(f"  label_threshold: {classes.threshold}   # mask values above it are {classes.names[1]}")
    elif classes.labels is not None:
        lines.append(f"  labels: {_flow(dict(classes.labels))}   # class id: value(s) in the mask files")
    else:
        lines.append("  # labels are not needed: masks hold class ids")
    if classes.ignore is not None:
        lines.append(f"  ignore: {_flow(classes.ignore)}   # mask value(s) of pixels about which nothing is known")
    if options.group_regex:
        lines.append(f"  group_regex: {_flow(options.group_regex)}   # the part of a name that is the patient")
    elif options.groups:
        lines.append(f"  # patients: groups.csv beside the lists, drawn from {options.groups.name}")
    else:
        lines.append(
            r"  # group_regex: ^(patient\d+)   # patients are unknown; if names tell them, draw the lists again"
        )
    if len(study.drawn.lists[labelled]) == len(study.drawn.lists["train"]):
        lines.append("  unlabelled_includes_labelled: true   # no training image is without a label")
    if study.volumes is None and study.intensity != "as_is":
        lines.append(f"  intensity: {{name: {study.intensity}}}   # stored values -> 0..1: docs/intensities.md")
    if study.volumes is not None:
        lines += volume_lines(study.volumes.patch_size(recipe), study.volumes.intensity, recipe)
    elif recipe == "small":
        lines += [
            "  # image_size: 128    # pixels; details smaller than an image pixel at this size are lost",
            "train:",
            "  max_steps: 400       # for a first look; more for results (docs/own_data.md)",
        ]
    else:
        lines += [
            "  # image_size: 256    # pixels; details smaller than an image pixel at this size are lost",
            "train:",
            "  # max_steps: 50000   # as published",
        ]
    lines.append("  seed: 0")
    return "\n".join(lines) + "\n"


def recipe_file(recipe: Recipe, *, volumes: bool) -> str:
    """The file of ``experiments/base`` that a recipe is.

    Args:
        recipe: full or small.
        volumes: whether volumes are trained on, or pictures.
    """
    return (VOLUME_RECIPES if volumes else RECIPES)[recipe]


def volume_lines(patch_size: Sequence[int], intensity: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """What an experiment on volumes has from the end of ``data`` on, but for the seed.

    Args:
        patch_size: (D, H, W) of the crops in voxels.
        intensity: as ``data.intensity``.
        recipe: full or small.
    """
    lines = [
        "  channels: 1",
        f"  intensity: {_flow(dict(intensity))}",
        f"  patch_size: {_flow(list(patch_size))}   # D, H, W in voxels",
    ]
    if recipe == "full":
        return [*lines, "train:", "  # max_steps: 15000   # as published"]
    return [
        *lines,
        "  image_size: 64             # of the slices that SAM sees",
        "  labelled_batch: 2",
        "  unlabelled_batch: 2",
        "students:",
        "  unet: {channels: [8, 16, 32, 64], dropout: [0.05, 0.1, 0.2, 0.3]}",
        "  vnet: {filters: 4, norm: batch}",
        "sam: {slices: 8}             # of each crop, drawn anew at every step",
        "train:",
        "  max_steps: 400       # for a first look; more for results (docs/own_data.md)",
        "  precision: fp32",
    ]


def default_labelled(study: Study) -> str:
    """The label list that the experiment begins with.

    Where only part of the images has masks, all of these are used. Else the masks of most are set aside, as in studies
    of label efficiency: by the list nearest to 10 per cent that holds every class.
    """
    lists = study.drawn.lists
    train = len(lists["train"])
    drawn = [name for name in lists if name.startswith("labelled_") and name != ALL_MASKS]
    drawn = [name for name in drawn if not absent_classes(study.survey, lists[name], study.classes.table)]
    if not drawn or len(lists[ALL_MASKS]) < 0.9 * train:
        return ALL_MASKS
    return min(drawn, key=lambda name: (abs(len(lists[name]) - 0.1 * train), name))


def _source_block(study: Study) -> dict[str, Any]:
    """``data.source``; what is as usual is left out."""
    layout = study.layout
    name = "image_folder" if study.volumes is None else "volumes"
    source: dict[str, Any] = {"name": name, "root": portable_root(layout.root)}
    masks = layout.masks if layout.masks is not None else layout.images
    folders: tuple[tuple[str, Folders, str], ...] = (
        ("image_dir", layout.images, "images"),
        ("mask_dir", masks, "masks"),
    )
    for key, given, usual in folders:
        if given != usual:
            source[key] = given if isinstance(given, str) else dict(given)
    if layout.image_suffix:
        source["image_suffix"] = layout.image_suffix
    if layout.mask_suffix:
        source["mask_suffix"] = layout.mask_suffix
    if study.options.several_masks == "merge" and layout.further_masks():
        source["merge_masks"] = True
    return source


def _flow(value: Any) -> str:
    """YAML on one line."""
    # in a list, for a scalar alone would be followed by the end of a document
    text = yaml.safe_dump([value], default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True)
    return text.strip()[1:-1]


def _why(study: Study, name: str) -> str:
    number, train = len(study.drawn.lists[name]), len(study.drawn.lists["train"])
    if name == ALL_MASKS:
        return f"all {number} of {train} training images that have a mask"
    return f"{number} of {train} training images; the other masks are not opened"


_RECIPE_NOTES: dict[Recipe, str] = {
    "small": "2 cores will do. With a GPU and SAM's weights: published.yaml",
    "full": "as published, for a GPU, with SAM's weights (knowsam weights fetch vit_b). Without a GPU: small.yaml",
}


def base_file(experiment: Path, name: str) -> str:
    """A file of ``experiments/base`` as an experiment names it under ``inherits``.

    Args:
        experiment: the file that inherits.
        name: such as ``small.yaml``.
    Raises:
        NotFoundError: this is no checkout.
    """
    base = config.REPOSITORY / "experiments" / "base" / name
    if not base.is_file():
        raise NotFoundError(
            f"{base} is not there, from which experiments inherit",
            hint="Run this in a checkout of knowsam, pip install -e .",
        )
    folder = experiment.parent.absolute()
    inside = folder.is_relative_to(config.REPOSITORY)
    return os.path.relpath(base, folder) if inside else str(base)


def portable_root(root: Path) -> str:
    """Relative where training would find it by that name, so that the experiment works on another machine too.

    Args:
        root: folder of the data, absolute.
    """
    above = os.environ.get("KNOWSAM_DATA")
    for place in ([Path(above)] if above else []) + [config.REPOSITORY / "data"]:
        place = place.absolute()
        if root != place and root.is_relative_to(place):
            return root.relative_to(place).as_posix()
    return str(root)


def portable_lists(lists: Path) -> str:
    """The folder of lists as an experiment names it: relative inside the checkout.

    Args:
        lists: the folder.
    """
    lists = lists.absolute()
    return lists.relative_to(config.REPOSITORY).as_posix() if lists.is_relative_to(config.REPOSITORY) else str(lists)

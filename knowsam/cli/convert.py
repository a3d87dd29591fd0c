"""``knowsam convert``: a checkpoint of another program in, a run folder out."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knowsam.compat.checkpoint import PublishedFile
    from knowsam.config import Config

EPILOG = """examples:
  python tools/convert.py published --subnets SGDL_best_model.pth --experiment experiments/kvasir_10pct.yaml -o runs/old
  python tools/convert.py published --subnets SGDL_best_model.pth --sam sam_best_model.pth \\
      --experiment experiments/kvasir_10pct.yaml -o runs/old
  python tools/evaluate.py runs/old

`published` is the code of the KnowSAM paper. Without its SAM file the run has the students and the fusion head, which
is all that is needed at test time. Of the experiment only the data section is used: it says what to evaluate on. The
checkpoint does not say what it was trained on: make sure that it was not the test images. See docs/fidelity.md.
exit codes: 0 done, 66 not found, 73 the folder holds something, 74 disk, 78 configuration, 80 not such a
checkpoint.
"""

NO_EXPERIMENT = (
    "This run was converted from a checkpoint without an experiment, so it has no data. Convert it again with "
    "--experiment, whose data section it then takes over."
)
NOT_KNOWN = "Not known, as the files do not say it; config.yaml has the experiment's data section, else defaults:"
UNKNOWN = (
    "which images it was trained on, and on which split: scores mean something only on images that it never saw",
    "how many of them were labelled, and what the classes are called",
    "the number of steps, the learning rates, the loss weights and the seed",
    "how this checkpoint was chosen among those of its training",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("format", choices=("published",), help="whose checkpoint: the published KnowSAM code's")
    parser.add_argument("--subnets", required=True, metavar="SGDL_best_model.pth", help="students and fusion head")
    parser.add_argument("--sam", metavar="sam_best_model.pth", help="SAM, adapters and prompt generator")
    parser.add_argument("--experiment", metavar="YAML", help="take the data section of this experiment")
    parser.add_argument("-o", "--output", required=True, metavar="RUN", help="run folder to write")


def run(args: argparse.Namespace) -> int:
    """Convert, and say what became of every tensor."""
    from knowsam import build
    from knowsam.compat import checkpoint
    from knowsam.config import to_yaml
    from knowsam.engine.checkpoint import environment_fingerprint, save_checkpoint
    from knowsam.engine.log import say
    from knowsam.engine.runfolder import RunFolder
    from knowsam.errors import RunFolderError
    from knowsam.files import write_text

    if RunFolder.exists(args.output):
        raise RunFolderError(f"{args.output} holds a run already", hint="Choose another folder with -o.")
    files = [checkpoint.read_students(args.subnets)]
    if args.sam:
        files.append(checkpoint.read_sam(args.sam))
    config = converted_config(files, args.experiment)
    method = build.build_method(config).method
    reports = [checkpoint.report(file, checkpoint.load_published(method, file)) for file in files]
    text = "\n".join([*reports, "", NOT_KNOWN, *(f"  - {line}" for line in UNKNOWN)])

    run = RunFolder(args.output)
    contents = {
        "method": method.state_dict(),
        "parts": method.parts(),
        "step": None,
        "best": {},
        "config": to_yaml(config),
    }
    save_checkpoint(run.best, contents, keep_previous=False)
    write_text(run.path / "converted.txt", text + "\n")
    status = {"state": "complete", "step": None, "converted": [file.path.name for file in files]}
    run.write_json(run.status_file, status)
    run.describe(to_yaml(config), [], environment_fingerprint(), {"unknown": "converted from a published checkpoint"})
    say(text)
    after = f"next: knowsam evaluate {run}" if args.experiment else "to evaluate it, convert it with --experiment"
    say(f"\n{run} is a run with the outputs {', '.join(method.outputs())}; {after}")
    return 0


def converted_config(files: list["PublishedFile"], experiment: str | None) -> "Config":
    """The configuration of a converted run: architecture from the checkpoint, data from the experiment.

    Args:
        files: the students' file, then SAM's if there is one.
        experiment: YAML file, or None for a run without data.
    Raises:
        CheckpointError: the files have different numbers of classes.
        ConfigError: the experiment has another number of classes than the checkpoint.
    """
    from knowsam.compat import checkpoint
    from knowsam.config import Config, load_config, parse_config, to_yaml
    from knowsam.engine.log import warn
    from knowsam.errors import CheckpointError, ConfigError

    classes = files[0].num_classes
    for other in files[1:]:
        if other.num_classes != classes:
            raise CheckpointError(
                f"{files[0].path} has K = {classes} classes, {other.path} has K = {other.num_classes}: not of one run"
            )
    config = Config(name="published")
    config.data.classes = ["background", *(f"class {k}" for k in range(1, classes))]
    config.data.source = {"name": "image_folder", "root": "data_unknown"}
    config.data.splits, config.data.obtain = "data_unknown", NO_EXPERIMENT
    if experiment is not None:
        given = load_config(experiment)
        if given.num_classes != classes:
            raise ConfigError(
                f"the checkpoint has K = {classes} classes, {experiment} has {given.num_classes}: "
                f"{', '.join(given.data.classes)}",
                hint="Give the experiment whose classes the checkpoint was trained for, background included.",
            )
        config.name, config.data, config.evaluate = given.name, given.data, given.evaluate
    if config.data.image_size != checkpoint.IMAGE_SIZE:
        warn(
            f"{experiment} has images of {config.data.image_size} px; the published code works with "
            f"{checkpoint.IMAGE_SIZE} px only, so the run is given that"
        )
        config.data.image_size = checkpoint.IMAGE_SIZE
    if len(files) > 1:
        config.sam = {**files[1].sam, "weights": None}
        config.published_code = True
    else:
        config.method = {"name": "knowsam.compat.checkpoint:ConvertedStudents"}
        config.published_code = list(checkpoint.STUDENT_ROWS)
    return parse_config(to_yaml(config), "converted configuration")

"""``knowsam export``: a run in, one file that runs without knowsam out."""

import argparse
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import add_checkpoint_argument

if TYPE_CHECKING:
    from knowsam.runs import LoadedRun

EPILOG = """examples:
  python tools/export.py runs/kvasir --format onnx -o kvasir.onnx --example
  python tools/export.py runs/kvasir --format pt2 -o kvasir.pt2 --gives logits
  python tools/export.py runs/kvasir --format onnx -o unet.onnx --output unet

The file takes float32 images (B, 3, H, W) in 0..1 and gives probabilities (or logits) (B, K, H, W), for any B and any
H and W that are multiples of 16; the students' normalisation is inside. It is compared with the run's network on
several sizes and not written if they differ by more than 1e-4. Beside FILE comes FILE.json, which describes it; the
file holds the same description. torchscript is deprecated in torch 2.13 and there for older programs: prefer pt2.
exit codes: 0 done, 66 no such run, 73 FILE is there already, 74 disk, 78 configuration or a missing package,
79 the file would answer otherwise than the network, 80 checkpoint.
"""

DESCRIPTION = 1
"""Layout of the description; raise it when a key changes its meaning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="run folder written by train or convert")
    parser.add_argument("--format", required=True, choices=("onnx", "pt2", "torchscript"))
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument("--output", metavar="NAME", help="fusion, unet, vnet, ...; the deployed one if not given")
    parser.add_argument(
        "--gives",
        choices=("probabilities", "logits"),
        default="probabilities",
        help="what the file answers with (default probabilities: softmax over classes)",
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--example", action="store_true", help="also write a short script that runs it without knowsam")
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")


def run(args: argparse.Namespace) -> int:
    """Export, check, then write."""
    from knowsam.engine.log import say
    from knowsam.errors import NotFoundError, RunFolderError
    from knowsam.files import write_atomically, write_text
    from knowsam.inference.example import example_script
    from knowsam.inference.export import TOLERANCE, export_network, require
    from knowsam.runs import load_run

    require(args.format)
    file = Path(args.out)
    beside = file.with_name(f"{file.name}.json")
    script = file.with_name(f"{file.stem}_{args.format}_example.py")
    written = [path for path in (file, beside, *([script] if args.example else [])) if path.exists()]
    if written and not args.force:
        there = ", ".join(map(str, written))
        raise RunFolderError(f"there already: {there}", hint="Choose another -o, or replace it with --force.")
    if not file.parent.is_dir():
        raise NotFoundError(f"there is no folder {file.parent} to write {file.name} into", hint="Make it first.")
    loaded = load_run(args.run, args.checkpoint, quiet=False)
    output, network = loaded.network(args.output)
    if loaded.config.data.patch_size is not None and loaded.config.spatial_dims == 3:
        say("the file takes one patch of a volume at a time: (B, C, D, H, W)")
    intensity = loaded.preparation.intensity
    about = describe(loaded, output, network, args.format, args.gives)
    config = loaded.config
    content, parity = export_network(
        network,
        args.format,
        about,
        gives=args.gives,
        image_size=max(config.data.patch_size or [config.data.image_size]),
        channels=config.data.channels,
        spatial_dims=config.spatial_dims,
    )
    record = {
        **about,
        "file": file.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "parity": {"tolerance": TOLERANCE, **asdict(parity)},
    }
    write_atomically(file, lambda stream: stream.write(content), need=len(content))
    write_text(beside, json.dumps(record, indent=2) + "\n")
    if args.example:
        fit = loaded.config.data.fit
        text = example_script(args.format, model=file.name, name=script.name, intensity=intensity.state(), fit=fit)
        write_text(script, text)
    if type(intensity).__name__ != "AsIs":
        say(f"training brought every image to 0..1 by {intensity.about()}: do so before the network")
    count = sum(parameter.numel() for parameter in network.parameters())
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in parity.checked)
    axes = "H, W" if config.spatial_dims == 2 else "D, H, W"
    say(
        f"{file}: {output}, {count / 1e6:.2f} M parameters, {len(content) / 1e6:.1f} MB, "
        f"image (B, {config.data.channels}, {axes}) in 0..1 -> {args.gives} (B, {config.num_classes}, {axes})\n"
        f"largest difference from the run's network: {parity.largest_difference:.2g} (images of {shapes})"
        + (f", not counting {parity.ties} of {parity.pixels} pixels at ties" if parity.ties else "")
        + f"\ndescribed in {beside}"
        + (f"; try: python {script} PICTURE MASK.png" if args.example else "")
    )
    return 0


def describe(loaded: "LoadedRun", output: str, network: Any, file_format: str, gives: str) -> dict[str, Any]:
    """What somebody who has only the file must know; the same inside it and beside it.

    Args:
        loaded: the run.
        output: name of the exported output.
        network: a ``DeployedStudents``, or somebody else's network, whose normalisation is then not known.
        file_format, gives: as on the command line.
    """
    from importlib.metadata import version

    import knowsam
    from knowsam.cli.predict import label_values
    from knowsam.inference.export import LARGEST, SMALLEST, fixed_side, multiple_of, needed_packages

    config = loaded.config
    intensity = loaded.preparation.intensity
    side, multiple = fixed_side(network), multiple_of(network)
    sizes = {"multiple_of": side or multiple, "from": side or SMALLEST, "to": side or LARGEST}
    students = getattr(network, "students", None)
    normalised = {} if students is None else students.normalisation()
    return {
        "description": DESCRIPTION,
        "file_format": file_format,
        "run": config.name,
        "checkpoint": loaded.origin(),
        "output": output,
        "input": {
            "name": "image",
            "type": "float32",
            "axes": ["batch", "red green blue" if config.data.channels == 3 else "channel", "height", "width"],
            "range": [0, 1],
            "intensity": intensity.state(),
            "intensity_means": f"training brought stored values to 0..1 by {intensity.about()}",
            "fit": config.data.fit,
            "height_and_width": sizes,
        },
        "answer": {"name": gives, "type": "float32", "axes": ["batch", "class", "height", "width"]},
        "image_size": config.data.image_size,
        "postprocess_not_inside": loaded.postprocess(output),
        "normalisation_inside": normalised,
        "classes": list(config.data.classes),
        "label_values": [list(v) if isinstance(v, tuple) else v for v in label_values(config)],
        "versions": {"knowsam": str(knowsam.__version__)}
        | {name: version(name) for name in ("torch", *needed_packages(file_format))},
    }

"""``knowsam predict``: a run and files in, masks out."""

import argparse
import hashlib
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from knowsam.cli.arguments import add_checkpoint_argument, positive

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from knowsam.inference.folder import Outcome

EPILOG = """examples:
  python tools/predict.py runs/kvasir image.jpg -o predictions
  python tools/predict.py runs/kvasir hospital_b/ -o predictions --overlays --uncertainty
  python tools/predict.py runs/acdc heart.nii.gz -o predictions --probabilities
  python tools/predict.py runs/kvasir hospital_b/ -o predictions --original-labels --flips

Masks go to OUT/masks/ in the tree of INPUT, at each file's own size: PNG for pictures and DICOM, NIfTI for NIfTI (same
affine), HDF5 for HDF5. What is there already is not written again: the same command goes on where it stopped.
docs/predict_export.md tells the rest.
exit codes: 0 done, 65 some files failed (they are listed, the others are done) or nothing to segment, 66 not found,
73 OUT is in use or holds other predictions, 74 disk, 75 interrupted, 78 configuration, 80 checkpoint.
"""

RECORD = "predictions.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Words of the command line."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("run", metavar="RUN", help="run folder written by train or convert")
    parser.add_argument(
        "input", metavar="INPUT", help="picture, DICOM file, NIfTI or HDF5 volume, or a folder of them, subfolders too"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="folder for the answers")
    parser.add_argument("--probabilities", action="store_true", help="also probabilities per class (npz, NIfTI, HDF5)")
    parser.add_argument(
        "--uncertainty", action="store_true", help="also entropy over its maximum, 0..1 (in PNG 0..255)"
    )
    parser.add_argument("--overlays", action="store_true", help="also the outlines on the image, as PNG")
    parser.add_argument(
        "--original-labels", action="store_true", help="write the values of the training masks rather than class ids"
    )
    parser.add_argument("--flips", action="store_true", help="average over mirror images: 4 times the time")
    parser.add_argument("--output", metavar="NAME", help="fusion, unet, vnet, ...; the deployed one if not given")
    add_checkpoint_argument(parser)
    parser.add_argument("--force", action="store_true", help="write again what is there")
    group = parser.add_argument_group("reading")
    group.add_argument("--h5-key", metavar="NAME", help="dataset of an HDF5 file; as in training if not given")
    group.add_argument(
        "--slice-axis", type=int, choices=(0, 1, 2), help="of volumes: canonical x, y or z; as in training if not given"
    )
    group = parser.add_argument_group("computing")
    group.add_argument("--batch-size", type=positive, metavar="N", help="images or slices; as in evaluate if not given")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--precision", choices=("fp32", "bf16"), help="as in training if not given")
    group.add_argument(
        "--workers", type=positive, default=2, metavar="N", help="threads that read, and as many that write (default 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Predict every file that has no answer yet."""
    from knowsam.build import reading, sight
    from knowsam.engine import distributed
    from knowsam.engine.log import Counter, say
    from knowsam.engine.precision import autocast_dtype
    from knowsam.inference.files import find
    from knowsam.inference.folder import Wanted, predict_files
    from knowsam.inference.predict import with_flips
    from knowsam.runs import load_run
    from knowsam.signals import StopSignal

    loaded = load_run(args.run, args.checkpoint, quiet=False)
    config = loaded.config
    output, network = loaded.network(args.output)
    device = distributed.setup(args.device).device
    rules = reading(config)
    rules = replace(
        rules,
        image_key=args.h5_key or rules.image_key,
        slice_axis=rules.slice_axis if args.slice_axis is None else args.slice_axis,
    )
    found = find(args.input, rules, beside=args.out)
    files = found.files
    for reason, those in found.passed_over.items():
        say(f"passed over: {len(those)} x {reason}, such as {those[0]}")
    spec = loaded.postprocess(output)
    values = label_values(config) if args.original_labels else None
    wanted = Wanted(config.data.classes, values, args.probabilities, args.uncertainty, args.overlays)
    precision = args.precision or (config.train.precision if config.train.precision != "fp16" else "fp32")
    settings = {
        "weights_sha256": weights_sha256(network),
        "output": output,
        "classes": list(config.data.classes),
        "label_values": values and [list(v) if isinstance(v, tuple) else v for v in values],
        "image_size": config.data.image_size,
        "precision": precision,
        "flips": args.flips,
        "preparation": loaded.preparation.state(),
        "postprocess": spec,
        "reading": asdict(rules),
    }
    network.to(device)

    def predict_fn(images: Any) -> dict[str, Any]:
        return {output: network(images)}

    with _Out(args.out, settings, loaded, force=args.force) as out, StopSignal() as stop:
        with Counter("segmenting") as progress:
            outcome = predict_files(
                with_flips(predict_fn) if args.flips else predict_fn,
                files,
                out.path,
                wanted,
                preparation=loaded.preparation,
                postprocess=spec,
                overwrite=args.force,
                workers=args.workers,
                progress=progress,
                stop=lambda: bool(stop.name),
                **sight(config, args.batch_size),
                batch_size=args.batch_size or config.evaluate.batch_size,
                device=device,
                autocast=autocast_dtype(precision),
            )
        out.close(outcome)
    return _summary(outcome, out.path)


def label_values(config: Any) -> list[Any]:
    """What class k is written as in the training's masks; the first value where several mean one class."""
    from knowsam.data.labels import LabelTable

    data = config.data
    return LabelTable(data.labels, config.num_classes, threshold=data.label_threshold).raw_values()


def weights_sha256(network: "nn.Module") -> str:
    """Hash of the names and values of a network's weights, wherever the run was moved to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Out:
    """The folder of answers: one process at a time, and one way to predict in it.

    Raises:
        RunFolderError: it is in use, or holds answers of other settings or of somebody else.
    """

    def __init__(self, path: str, settings: dict[str, Any], loaded: Any, *, force: bool):
        from pathlib import Path

        from knowsam.sweep.locks import FileLock

        self.path: Path = Path(path)
        self.settings = settings
        self.about = {"run": loaded.config.name, "checkpoint": loaded.origin()}
        self.force = force
        self.lock = FileLock(self.path / ".lock")

    def __enter__(self) -> "_Out":
        from knowsam.engine.log import warn
        from knowsam.errors import RunFolderError, StorageError
        from knowsam.files import storage_error

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            mine = self.lock.acquire(wait=False)
        except StorageError as error:
            warn(f"{error}; do not start a second prediction into {self.path}")
        else:
            if not mine:
                raise RunFolderError(f"{self.path} is in use by another prediction", hint="Wait, or choose another -o.")
        try:
            if not self.force:
                self._check()
            self._write({})
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.lock.release()

    def _check(self) -> None:
        from knowsam.engine.runfolder import RunFolder
        from knowsam.errors import RunFolderError

        hint = "Choose another folder with -o, or predict again with --force."
        before = RunFolder.read_json(self.path / RECORD).get("settings")
        if not any((self.path / kind).exists() for kind in ("masks", "probabilities", "uncertainty", "overlays")):
            return  # nothing was predicted, so nothing can be mixed up
        if before is None:
            raise RunFolderError(f"{self.path} holds files that are not known to be predictions", hint=hint)
        if before != self.settings:
            changed = [
                f"  {key}: {before.get(key)} -> {self.settings.get(key)}"
                for key in self.settings | before
                if before.get(key) != self.settings.get(key)
            ]
            lines = "\n".join(changed)
            raise RunFolderError(f"{self.path} holds predictions made otherwise:\n{lines}", hint=hint)

    def close(self, outcome: "Outcome") -> None:
        """Note what became of the files."""
        failed = {file.name: str(error) for file, error in outcome.failed}
        self._write(
            {"written": outcome.done, "there_before": outcome.skipped, "not_reached": outcome.left, "failed": failed}
        )

    def _write(self, files: dict[str, Any]) -> None:
        import knowsam
        from knowsam.engine.runfolder import RunFolder

        record = {"knowsam": str(knowsam.__version__), **self.about, "settings": self.settings, "files": files}
        RunFolder.write_json(self.path / RECORD, record)


def _summary(outcome: "Outcome", out: "Path") -> int:
    from knowsam.engine.log import say, warn

    failed = outcome.failed
    parts = [f"{outcome.done} written to {out}"]
    parts += [f"{outcome.skipped} there already (--force writes them again)"] if outcome.skipped else []
    parts += [f"{len(failed)} failed"] if failed else []
    parts += [f"{outcome.left} not reached: interrupted, the same command goes on"] if outcome.left else []
    say(", ".join(parts))
    if failed:
        lines = [f"  {error}" if file.name in str(error) else f"  {file.name}: {error}" for file, error in failed]
        hints = dict.fromkeys(f"hint: {error.hint}" for _, error in failed if error.hint)
        count = "1 file" if len(failed) == 1 else f"{len(failed)} files"
        warn("\n".join([f"{count} failed:", *lines, *hints]))
    return 75 if outcome.left else 65 if failed else 0

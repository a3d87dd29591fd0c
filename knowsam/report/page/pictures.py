"""Cases predicted anew, to be pictured: by the code that evaluates, from the checkpoint that was scored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from knowsam.data.intensity import as_picture
from knowsam.data.source import Source
from knowsam.engine import distributed
from knowsam.errors import ConfigError, DataError, KnowsamError
from knowsam.inference.postprocess import apply
from knowsam.inference.predict import predict_cases
from knowsam.metrics.segmentation import IGNORE_ID, case_metrics
from knowsam.report.checks import untrained
from knowsam.report.page.networks import OpenNetworks
from knowsam.report.page.overlays import Overlay, telling_slice
from knowsam.report.page.panels import Panel, plan_panels
from knowsam.report.page.record import Record, on_one_line, scored_runs
from knowsam.report.runs import Run


@dataclass(frozen=True)
class Pictures:
    """The pictures of a page.

    Attributes:
        panels: what to show, in order; those without an overlay are left out.
        overlays: (run, case) -> what to draw there.
        without: run -> why it has no pictures, a sentence.
        failed: those of ``without`` that were to have some.
    """

    panels: Sequence[Panel] = ()
    overlays: Mapping[tuple[str, str], Overlay] = field(default_factory=dict)
    without: Mapping[str, str] = field(default_factory=dict)
    failed: Sequence[str] = ()

    def of(self, run: str) -> dict[str, Overlay]:
        """Case -> what to draw, of one run."""
        return {case: overlay for (name, case), overlay in self.overlays.items() if name == run}


def take_pictures(
    records: Sequence[Record],
    outputs: Mapping[str, str],
    count: int,
    open_networks: OpenNetworks,
    *,
    device: str = "auto",
) -> Pictures:
    """Choose cases of the scored runs and predict them. A run that cannot predict has no pictures, and a reason.

    Args:
        records: of the page.
        outputs: name of each scored run -> the output to be shown.
        count: of best, median and worst cases each; 0 for none.
        open_networks: how to come to a run's networks.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    panels = plan_panels(scored_runs(records), outputs, count)
    overlays: dict[tuple[str, str], Overlay] = {}
    without: dict[str, str] = {}
    failed = []
    for record in records:
        run = record.scores
        if run is None:
            without[record.name] = f"The run has {record.unscored.partition('. ')[0]}, by which cases would be chosen."
        elif not count:
            without[record.name] = "None were asked for (--cases 0)."
        elif untrained(run):
            without[record.name] = "There is no one checkpoint to predict from."
        else:
            cases = [panel.case for panel in panels if panel.run == record.name]
            try:
                found = dict(_predicted(record.folder, run, cases, outputs[record.name], open_networks, device))
            except KnowsamError as error:
                without[record.name] = f"{on_one_line(error)}."
                failed.append(record.name)
            else:
                overlays |= {(record.name, case): overlay for case, overlay in found.items()}
    return Pictures(panels, overlays, without, failed)


def _predicted(
    folder: str, run: Run, cases: Sequence[str], output: str, open_networks: OpenNetworks, device: str
) -> Iterator[tuple[str, Overlay]]:
    """(case, what to draw there), in the order of the cases."""
    checkpoint = run.checkpoint
    networks = open_networks(folder, "last" if checkpoint and checkpoint["file"] == "last.pt" else "best")
    source = networks.open_source(None)
    strangers = set(cases) - set(source.eval_ids(run.scores["split"]))
    if strangers:
        raise DataError(f"the split list no longer has {sorted(strangers)[0]!r}, which was scored")
    where = distributed.setup(device).device
    method = networks.method.to(where)
    if output not in method.outputs():
        raise ConfigError(f"the networks have no output {output!r}, only {', '.join(method.outputs())}")
    predictions = predict_cases(
        method.predict,
        source,
        cases,
        **networks.sight,
        batch_size=networks.batch_size,
        device=where,
        num_classes=source.num_classes,
        outputs=[output],
        autocast=networks.autocast,
    )
    # What was scored is what was left after this.
    spec = ((run.scores.get("postprocess") or {}).get("applied") or {}).get(output)
    for case, labels in predictions:
        prediction = apply(labels[output], spec, source.spacing(case))
        yield case, _overlay(source, case, prediction, networks.class_names)


def _overlay(source: Source, case: str, prediction: np.ndarray, class_names: Sequence[str]) -> Overlay:
    """A case and its prediction; of a volume, the slice that shows most."""
    image, truth, place = source.image(case), source.mask(case), ""
    scores = case_metrics(prediction, truth, num_classes=source.num_classes, distances=False)
    spacing = source.spacing(case)
    if source.num_classes <= IGNORE_ID:
        truth = np.where(truth == IGNORE_ID, 0, truth)  # where nothing is known there is nothing to outline
    if prediction.ndim == 3:
        z = telling_slice(truth, prediction)
        place = f"slice {z + 1} of {len(truth)}"
        image, truth, prediction = image[z], truth[z], prediction[z]
    return Overlay(
        image=as_picture(image),
        truth=truth,
        prediction=prediction,
        place=place,
        spacing=None if spacing is None else (float(spacing[-2]), float(spacing[-1])),
        dice={
            name: None if score.status == "empty_both" else score.dice
            for name, score in zip(class_names, scores, strict=True)
        },
    )

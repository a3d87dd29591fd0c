"""Which cases are pictured, how they are predicted anew, and what is said where they cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
from report_pages import records_of
from report_runs import BEST, LAST, write_run
from torch import nn

from knowsam.errors import CheckpointError, NotFoundError
from knowsam.report.page.networks import Networks
from knowsam.report.page.panels import choose_cases
from knowsam.report.page.pictures import take_pictures
from knowsam.report.page.pseudo_labels import score_pseudo_labels
from knowsam.report.page.record import scored_runs

OUTPUTS = {"run": "fusion"}


def runs(tmp_path, *dice):
    folders = [write_run(tmp_path / f"r{i}", values, seed=i) for i, values in enumerate(dice)]
    return scored_runs(records_of(*folders))


def test_best_median_worst(tmp_path):
    (run,) = runs(tmp_path, {f"c{i}": i / 10 for i in range(1, 10)})
    picks = [(pick.why, pick.case) for pick in choose_cases([run], ["fusion"], 2)]
    expected = [("best", "c9"), ("best", "c8"), ("median", "c6"), ("median", "c5"), ("worst", "c1"), ("worst", "c2")]
    assert picks == expected
    assert choose_cases([run], ["fusion"], 0) == []
    assert len(choose_cases([run], ["fusion"], 50)) == 9, "each case once"


def test_several_runs_share_their_cases(tmp_path):
    a, b = runs(tmp_path, {"x": 0.9, "y": 0.5, "z": 0.1, "w": 0.9}, {"x": 0.8, "y": 0.5, "z": 0.2, "w": 0.3})
    picks = [(pick.why, pick.case) for pick in choose_cases([a, b], ["fusion", "fusion"], 1)]
    # Means: x 0.85, w 0.6, y 0.5, z 0.15; spreads: w 0.6.
    assert picks == [("best", "x"), ("median", "w"), ("worst", "z")]
    picks = choose_cases([a, b], ["fusion", "fusion"], 1)
    assert len({pick.case for pick in picks}) == len(picks)


def test_a_case_that_counts_for_one_run_only_is_not_chosen(tmp_path):
    a, b = runs(tmp_path, {"x": 0.9, "y": 0.5}, {"x": None, "y": 0.5})
    assert [pick.case for pick in choose_cases([a, b], ["fusion", "fusion"], 2)] == ["y"]


# ---------------------------------------------------------------- predicted anew


class Bright(nn.Module):
    """Predicts the class where the image is bright, and says of itself what a method says."""

    def outputs(self):
        return ("fusion", "unet")

    def predict(self, images):
        bright = images.mean(1) - 0.5
        logits = torch.stack([-bright, bright], 1)
        return {"fusion": logits, "unet": -logits}


class Cases:
    """Images whose bright left half is what the mask says, but for one row."""

    num_classes = 2

    def __init__(self, ids, labelled=(), depth=None, spacing=None):
        self.ids, self.labelled, self.depth, self._spacing = list(ids), list(labelled), depth, spacing

    def eval_ids(self, split):
        return self.ids

    def labelled_ids(self):
        return self.labelled

    def image(self, case):
        image = np.zeros((8, 8, 3), np.uint8)
        image[:, :4] = 255
        if self.depth is None:
            return image
        volume = np.zeros((self.depth, 8, 8, 3), np.uint8)
        volume[1] = image
        return volume

    def mask(self, case):
        mask = (self.image(case)[..., 0] > 0).astype(np.uint8)
        mask[..., 0, :] = 0
        return mask

    def spacing(self, case):
        return self._spacing


def networks(source, step=400, path="best.pt"):
    """What opens them, and the list that it keeps of how it was asked."""
    asked = []

    def opener(folder, checkpoint):
        asked.append((Path(folder).name, checkpoint))
        if checkpoint == "best" and path != "best.pt":
            raise NotFoundError(f"{folder} has no best.pt yet")
        sources = source if callable(source) else lambda labelled: source
        return Networks(Path(folder) / path, step, Bright(), sources, ["lesion"], {"image_size": 8}, 2, None)

    return opener, asked


def test_a_volume_is_shown_by_its_telling_slice_and_scored_whole(tmp_path):
    records = records_of(write_run(tmp_path / "run", {"a": 0.9, "b": 0.2}))
    opener, asked = networks(Cases("ab", depth=3, spacing=(5.0, 2.0, 1.0)))
    found = take_pictures(records, OUTPUTS, 1, opener, device="cpu")
    assert [(panel.case, panel.why) for panel in found.panels] == [("a", "best"), ("b", "worst")]
    assert asked == [("run", "best")] and found.failed == [] and found.without == {}
    overlay = found.of("run")["a"]
    assert overlay.place == "slice 2 of 3" and overlay.spacing == (2.0, 1.0)
    assert overlay.image.shape == (8, 8, 3) and overlay.prediction.sum() == 32 and overlay.truth.sum() == 28
    assert overlay.dice == {"lesion": pytest.approx(2 * 28 / 60)}


@pytest.mark.parametrize(("checkpoint", "name"), [(BEST, "best"), (LAST, "last"), (None, "best")])
def test_the_checkpoint_is_the_one_that_was_scored(tmp_path, checkpoint, name):
    records = records_of(write_run(tmp_path / "run", {"a": 0.9}, checkpoint=checkpoint))
    opener, asked = networks(Cases("a"))
    assert take_pictures(records, OUTPUTS, 1, opener, device="cpu").of("run")["a"].place == ""
    assert asked == [("run", name)]


def test_what_was_done_before_scoring_is_done_to_the_pictures(tmp_path):
    spec = {"name": "remove_small", "size": 40, "unit": "px"}  # all of the 32 pixels that are predicted
    done = {"asked": spec, "applied": {"fusion": spec, "unet": None}}
    records = records_of(write_run(tmp_path / "run", {"a": 0.9}, outputs={"unet": {"a": 0.1}}, postprocess=done))
    shown = take_pictures(records, OUTPUTS, 1, networks(Cases("a"))[0], device="cpu").of("run")["a"]
    assert shown.prediction.sum() == 0 and shown.dice == {"lesion": 0}
    shown = take_pictures(records, {"run": "unet"}, 1, networks(Cases("a"))[0], device="cpu").of("run")["a"]
    assert shown.prediction.sum() == 32


def test_ignored_pixels_are_not_outlined(tmp_path):
    class Partly(Cases):
        def mask(self, case):
            mask = super().mask(case)
            mask[..., 4:] = 255
            return mask

    records = records_of(write_run(tmp_path / "run", {"a": 0.9}))
    shown = take_pictures(records, OUTPUTS, 1, networks(Partly("a", depth=3))[0], device="cpu").of("run")["a"]
    assert shown.place == "slice 2 of 3" and shown.truth.max() == 1 and shown.truth.sum() == 28
    assert shown.dice == {"lesion": pytest.approx(2 * 28 / 60)}


def test_scores_without_a_training_have_no_pictures(tmp_path):
    masks = {"kind": "masks", "file": "masks", "step": None, "chosen_by": "-", "split": None, "value": None}
    records = records_of(write_run(tmp_path / "run", {"a": 0.9}, checkpoint=masks))
    opener, asked = networks(Cases("a"))
    found = take_pictures(records, OUTPUTS, 1, opener, device="cpu")
    assert found.without == {"run": "There is no one checkpoint to predict from."} and found.failed == asked == []


def test_a_run_without_pictures_has_a_reason(tmp_path):
    scored, unscored = write_run(tmp_path / "run", {"a": 0.9}), write_run(tmp_path / "other", None, seed=1)
    records = records_of(scored, unscored)
    opener, asked = networks(Cases("x"))
    found = take_pictures(records, OUTPUTS, 1, opener, device="cpu")
    assert found.failed == ["run"] and found.overlays == {}
    assert found.without == {
        "run": "the split list no longer has 'a', which was scored.",
        "other": "The run has no scores on test, by which cases would be chosen.",
    }
    assert take_pictures(records, {"run": "sam"}, 1, networks(Cases("a"))[0], device="cpu").without["run"] == (
        "the networks have no output 'sam', only fusion, unet."
    )
    opener, asked = networks(Cases("a"))
    found = take_pictures(records, OUTPUTS, 0, opener, device="cpu")
    assert found.without["run"] == "None were asked for (--cases 0)." and found.failed == asked == []

    def absent(folder, checkpoint):
        raise CheckpointError(f"{folder}/{checkpoint}.pt is damaged")

    assert take_pictures(records, OUTPUTS, 1, absent).without["run"] == "…/best.pt is damaged."


# ---------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_are_scored_on_what_the_run_had_no_masks_of(tmp_path):
    (record,) = records_of(write_run(tmp_path / "run", {"a": 0.9}))
    lists = {None: Cases("abcdef", "ab"), "all": Cases("abcdef", "abcdef")}
    opener, asked = networks(lists.get)
    found = score_pseudo_labels(record, opener, most=2, device="cpu")
    assert asked == [("run", "best"), ("run", "last")], "and weights of one step are scored once"
    assert found.of == 4 and [(moment.file, moment.step) for moment in found.moments] == [("best.pt", 400)]
    evaluation = found.moments[0].evaluation
    assert evaluation.cases == ["c", "e"] and evaluation.outputs == ("fusion", "unet")
    assert evaluation.dice("fusion") == pytest.approx(2 * 28 / 60)
    assert score_pseudo_labels(record, opener, most=4, device="cpu").moments[0].evaluation.cases == list("cdef")


def test_pseudo_labels_that_cannot_be_scored_have_a_reason(tmp_path):
    (record,) = records_of(write_run(tmp_path / "run", {"a": 0.9}))
    known = Cases("ab", "ab")
    hint = "If only some unlabelled images have masks, name a list of those: --pseudo-masks labelled_max."
    reason = "the list 'all' holds no case that was unlabelled in this run"
    assert score_pseudo_labels(record, networks(known)[0], device="cpu").reason == f"{reason}. {hint}"
    named = score_pseudo_labels(record, networks(known)[0], masks="few", device="cpu")
    assert (named.masks, named.reason) == ("few", f"{reason.replace('all', 'few')}.")
    converted = score_pseudo_labels(record, networks(known, None, "last.pt")[0], device="cpu").reason
    assert converted == "…/last.pt was converted: nothing is known of its training."
    assert "unknown device 'abacus'" in score_pseudo_labels(record, networks(known)[0], device="abacus").reason

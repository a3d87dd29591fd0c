"""``published_code: true`` against the published code's own numbers, and what each row has to do with that.

Skipped where the numbers are not at hand; $KNOWSAM_GOLDEN names their folder, of any seed and number of classes.
"""

import numpy as np
import pytest
import torch
from compat_lab import AFTER, AFTER_MEAN, EVAL, LOSS, Golden, forward, golden_folder, published_row, rates_after, train
from compat_lab import without as all_but

from knowsam.compat.rows import ROWS

STEPS = 6
# What a forward pass shows of a row when it alone is switched back. For two classes a probability above 0.5 is the
# argmax, so XOR and ours agree.
SEEN_IN_FORWARD = {
    "students_unnormalised": "unet_logits",
    "fusion_rectified": "fusion_logits",
    "fusion_xor": "fusion_logits",
    "fusion_entropy_nats": "fusion_logits",
    "sam_unnormalised": "image_embedding",
    "windows_padded_first": "image_embedding",
    "no_relative_positions": "image_embedding",
    "decoder_first_residual": "sam_low_res_logits",
    "decoder_positions_stay": "sam_low_res_logits",
    "decoder_adapter_twice": "sam_low_res_logits",
    "no_dense_prompt": "sam_low_res_logits",
}
# What the first step shows, by column of ``step_losses``. With two classes, or with the ramp at its foot, a row shows
# less than the tolerance; tests/compat/test_compat_small.py sees all of them.
SAM_LOSS, SAM_RATE, OBJECTIVE, STUDENTS, FUSION, RATE = range(1, 7)
SEEN_IN_FIRST_STEP = {"teacher_train_mode": STUDENTS, "teacher_full_weight": STUDENTS}
SEEN_WITH_MORE_CLASSES = {"entropy_log_two": STUDENTS, "distillation_width_two": STUDENTS}


@pytest.fixture(scope="module")
def golden():
    folder = golden_folder()
    if folder is None:
        pytest.skip("the golden data of the published code are not here")
    return Golden(folder)


def errors(found, arrays, prefix):
    """Largest and mean deviation by quantity."""
    names = [name for name in found if f"{prefix}_{name}" in arrays]
    assert names
    deviations = {name: np.abs(found[name] - arrays[f"{prefix}_{name}"]) for name in names}
    return {name: (float(d.max()), float(d.mean())) for name, d in deviations.items()}


def images(golden):
    return golden.batch(0).labelled


@pytest.fixture(scope="module")
def forward_errors(golden):
    return errors(forward(golden.method(), images(golden)), golden.arrays, "eval")


def test_forward(forward_errors):
    assert len(forward_errors) == 7
    assert {name: most for name, (most, _) in forward_errors.items() if not most <= EVAL} == {}


@pytest.mark.parametrize("row", SEEN_IN_FORWARD)
def test_forward_fails_without_row(golden, row):
    if row == "fusion_xor" and golden.num_classes == 2:
        pytest.skip("for two classes it is the same")
    found = errors(forward(golden.method(all_but(row)), images(golden)), golden.arrays, "eval")
    assert found[SEEN_IN_FORWARD[row]][0] > 10 * EVAL


def test_forward_fails_by_default(golden):
    found = errors(forward(golden.method(False), images(golden)), golden.arrays, "eval")
    for name in ("unet_logits", "vnet_logits", "fusion_logits", "image_embedding", "sam_low_res_logits", "sam_logits"):
        assert found[name][0] > 10 * EVAL, name


def first_row(golden, published_code):
    config, method = golden.config(published_code), golden.method(published_code).train()
    with torch.no_grad():
        out = method(golden.batch(0), 0)
    terms = {name: value.item() for name, value in out.losses.items()}
    return published_row(0, terms, rates_after(config, method, 0))


def relative(row, expected):
    return np.abs(row - expected)[1:] / np.abs(expected[1:])


def test_first_step(golden):
    row, expected = first_row(golden, True), golden.arrays["step_losses"][0]
    assert relative(row, expected)[[SAM_LOSS - 1, OBJECTIVE - 1, STUDENTS - 1, FUSION - 1]].max() < LOSS
    assert row[RATE] == pytest.approx(expected[RATE], abs=1e-6)


@pytest.mark.parametrize("row", [*SEEN_IN_FIRST_STEP, *SEEN_WITH_MORE_CLASSES])
def test_first_step_fails_without_row(golden, row):
    if row in SEEN_WITH_MORE_CLASSES and golden.num_classes == 2:
        pytest.skip("for two classes it is the same")
    column = (SEEN_IN_FIRST_STEP | SEEN_WITH_MORE_CLASSES)[row]
    assert relative(first_row(golden, all_but(row)), golden.arrays["step_losses"][0])[column - 1] > LOSS


def test_first_step_fails_by_default(golden):
    found = relative(first_row(golden, False), golden.arrays["step_losses"][0])
    assert all(found[column - 1] > LOSS for column in (SAM_LOSS, OBJECTIVE, STUDENTS, FUSION))


def test_learning_rates(golden):
    """The golden rates are rounded to six decimals."""
    for published_code, equal in ((True, True), (all_but("late_learning_rate"), False), (False, False)):
        config, method = golden.config(published_code), golden.method(published_code)
        for row in golden.arrays["step_losses"]:
            rates = rates_after(config, method, int(row[0]))
            assert (abs(rates["subnets"] - row[RATE]) < 6e-7) == equal
            assert abs(rates["sam"] - row[SAM_RATE]) < 2e-6


def test_the_tables_name_rows():
    assert set(SEEN_IN_FORWARD) | set(SEEN_IN_FIRST_STEP) | set(SEEN_WITH_MORE_CLASSES) < set(ROWS)


def test_six_steps(golden):
    """Losses of the six steps, mixing in the last two, and what the networks say after them."""
    config, method = golden.config(), golden.method()
    rows = []
    for step, terms in enumerate(train(method, config, map(golden.batch, range(STEPS)))):
        rows.append(published_row(step, terms, rates_after(config, method, step)))
    expected = golden.arrays["step_losses"]
    found = np.array([relative(row, wanted) for row, wanted in zip(rows, expected, strict=True)])
    print("relative deviation of SAM's loss, the objective, the students' and the fusion's part, step by step:")
    print(found[:, [SAM_LOSS - 1, OBJECTIVE - 1, STUDENTS - 1, FUSION - 1]])
    assert found[:, [SAM_LOSS - 1, OBJECTIVE - 1, STUDENTS - 1, FUSION - 1]].max() < LOSS

    after = errors(forward(method, images(golden)), golden.arrays, "after")
    print("after six steps, largest and mean deviation:", after)
    assert {name: most for name, (most, _) in after.items() if not most <= AFTER.get(name, np.inf)} == {}
    assert {name: mean for name, (_, mean) in after.items() if not mean <= AFTER_MEAN.get(name, np.inf)} == {}

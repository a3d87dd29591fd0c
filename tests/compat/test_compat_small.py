"""Our own golden numbers (K = 4), made once ours had met the published code's: every row, alone and all together."""

from functools import cache

import numpy as np
import pytest
from compat_lab import SMALL, small_batch, small_config, small_forward, small_method, small_train, too_far
from compat_lab import without as all_but

from knowsam.compat.rows import ROWS

# Where a row shows: a quantity of the forward pass, or a term of a step.
SHOWS = {
    "consistency_last_class": "300_consistency_unet",
    "consistency_swapped": "300_consistency_vnet",
    "distillation_width_two": "300_skd_unet",
    "entropy_log_two": "300_entropy_unet",
    "ramp_in_stairs": "301_consistency_weight",
    "mix_least_uncertain": "301_mix_seg_fusion",
    "teacher_train_mode": "300_skd_unet",
    "teacher_full_weight": "300_skd_weight",
    "sam_strong_view": "300_skd_unet",
    "students_unnormalised": "eval_unet_logits",
    "fusion_rectified": "eval_fusion_logits",
    "fusion_xor": "eval_fusion_logits",
    "fusion_entropy_nats": "eval_fusion_logits",
    "sam_unnormalised": "eval_image_embedding",
    "windows_padded_first": "eval_image_embedding",
    "no_relative_positions": "eval_image_embedding",
    "decoder_first_residual": "eval_sam_low_res_logits",
    "decoder_positions_stay": "eval_sam_low_res_logits",
    "decoder_adapter_twice": "eval_sam_low_res_logits",
    "no_dense_prompt": "eval_sam_low_res_logits",
    "late_learning_rate": "300_lr_subnets",
}
# These decide what weights SAM begins with, and what is trained: tests/compat/test_compat_sam.py
START = {"random_decoder_mlps", "random_adapters"}


def measure(published_code, shows):
    """As little as shows the quantity: {name: value}."""
    config = small_config(published_code)
    method = small_method(config)
    if shows.startswith("eval_"):
        return {shows: small_forward(method)[shows]}
    return {shows: small_train(method, config, 2 if shows.startswith("301") else 1)[shows]}


@cache
def default(shows):
    return measure(False, shows)


@pytest.fixture(scope="module")
def golden():
    with np.load(SMALL) as arrays:
        return dict(arrays)


def test_published_code_meets_them_all(golden):
    config = small_config(True)
    method = small_method(config)
    assert too_far(small_forward(method) | small_train(method, config), golden) == {}


def test_a_list_of_all_rows_is_true(golden):
    shows = "eval_fusion_logits"
    assert too_far(measure(list(ROWS), shows), {shows: golden[shows]}) == {}


def test_every_row_is_seen_somewhere():
    assert set(SHOWS) | START == set(ROWS) and not set(SHOWS) & START


@pytest.mark.parametrize("row", SHOWS)
def test_without_row_they_are_missed(golden, row):
    shows = SHOWS[row]
    assert too_far(measure(all_but(row), shows), {shows: golden[shows]})


@pytest.mark.parametrize("row", SHOWS)
def test_row_alone_changes_ours(row):
    shows = SHOWS[row]
    assert too_far(measure([row], shows), default(shows))


@pytest.mark.parametrize("step", [300, 301])
def test_every_trainable_parameter_is_reached(step):
    """With and without mixing, or DDP would stop; V-Net too, although its consistency trains nothing."""
    method = small_method(small_config(True)).train()
    out = method(small_batch(step), step)
    sum(out.losses.values()).backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []


def test_by_default_they_are_missed(golden):
    config = small_config(False)
    method = small_method(config)
    found = small_forward(method) | small_train(method, config)
    far = too_far(found, golden)
    assert set(SHOWS.values()) <= set(far)


def test_the_numbers_hold_what_the_rows_need(golden):
    """Students sure of some pixels and unsure of others, for the XOR at 0.5; mixing from the second step on."""
    for name in ("unet", "vnet"):
        powers = np.exp(golden[f"eval_{name}_logits"])
        surest = (powers / powers.sum(1, keepdims=True)).max(1)
        assert (surest > 0.5).any() and (surest < 0.5).any(), name
    assert "301_mix_seg_fusion" in golden and "300_mix_seg_fusion" not in golden

"""The switch ``published_code``: what it accepts, how it refuses, what it sets, and that its document keeps up."""

import re

import pytest
from compat_lab import ROOT, small_config

from knowsam import build, components
from knowsam.cli.main import run_command
from knowsam.compat.rows import ROWS, select, settings
from knowsam.config import load_config, parse_config, to_yaml
from knowsam.errors import ConfigError

ADAPTER = "sam: {tuning: [{name: adapter}]}"


def parse(text):
    return parse_config(text, "x.yaml")


def test_select():
    assert select(False) == select(None) == select([]) == ()
    assert select(True) == tuple(ROWS)
    assert select(["fusion_xor", "consistency_swapped", "fusion_xor"]) == ("consistency_swapped", "fusion_xor")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (["fusion_xorr"], r"there is no row 'fusion_xorr'; did you mean 'fusion_xor'\?"),
        (["consistency"], "no row 'consistency'"),
        (["zzz"], "no row 'zzz'; there are consistency_last_class, "),
        ("true story", "must be true, false or a list of row names, got 'true story'"),
        (1, "must be true, false or a list"),
        ([1], "must be true, false or a list"),
        ({"fusion_xor": True}, "must be true, false or a list"),
    ],
)
def test_other_values_are_refused(value, says):
    with pytest.raises(ConfigError, match=says) as error:
        select(value)
    assert "docs/fidelity.md" in error.value.hint


def test_unknown_row_in_a_file_says_line_and_neighbour():
    with pytest.raises(ConfigError, match=r"x\.yaml:2 published_code: there is no row 'entropy_log_too'; did you mean"):
        parse(f"{ADAPTER}\npublished_code: [entropy_log_too]")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("published_code: true", r"needs sam\.tuning: {name: adapter} for random_adapters, decoder_adapter_twice; add"),
        (f"{ADAPTER}\npublished_code: true\nmethod: {{name: mean_teacher}}", r"needs method\.name: knowsam for consi"),
        (
            f"{ADAPTER}\npublished_code: true\nmethod: {{name: mean_teacher}}",
            "needs a method that uses SAM for sam_unno",
        ),
        ("published_code: [fusion_xor]\nmethod: {name: supervised}\nfusion: null", "needs fusion: {name: ham} for fus"),
        (
            f"{ADAPTER}\npublished_code: true\nmethod: {{mix: {{pick: most_uncertain}}}}",
            r"method\.mix\.pick: is 'most_uncertain', but row 'mix_least_uncertain' .* makes it 'least_uncertain'",
        ),
        (
            "published_code: [no_dense_prompt]\nsam: {prompt: {dense: true}}",
            r"sam\.prompt\.dense: is True, but row 'no_dense_prompt' of published_code makes it False; leave it out",
        ),
        ("published_code: [random_adapters]\nsam: {tuning: {name: adapter, zero_init: true}}", "makes it False"),
        ("published_code: [distillation_width_two]\nmethod: {skd: {confidence_threshold: 0.5}}", r"is 0\.5, but row"),
        ("published_code: [sam_unnormalised]\nsam: {pixel_mean: [123.0, 116.0, 103.0]}", r"pixel_mean: is \[123\.0"),
        ("sam: {omit: [a]}", r"sam has no parameter 'omit' \(it is set by the experiment itself\)"),
        (
            "method: {formulas: 1}",
            r"method 'knowsam' has no parameter 'formulas' \(it is set by the experiment itself\)",
        ),
    ],
)
def test_what_cannot_be_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse(text)


def test_the_same_value_may_stand_beside_its_row():
    config = parse(f"{ADAPTER}\npublished_code: true\nmethod: {{mix: {{pick: least_uncertain}}, skd: {{rampup: 0}}}}")
    assert config.published_rows == tuple(ROWS)


def test_too_short_a_run_for_the_ramp_is_refused_when_built():
    config = parse(f"{ADAPTER}\npublished_code: [ramp_in_stairs]\ntrain: {{max_steps: 100}}\ndata: {{image_size: 64}}")
    config.sam |= {"encoder": {"name": "vit_tiny"}, "prompt": {"sparse": False}}
    with pytest.raises(ConfigError, match="a ramp of 100 steps has no 200 stairs"):
        build.build_method(config)


def test_other_methods_may_have_the_published_networks():
    rows = ["students_unnormalised", "fusion_rectified", "fusion_xor", "late_learning_rate"]
    pair = "students: {unet: {name: unet}, vnet: {name: vnet}}\nfusion: {name: ham}"
    config = parse(f"published_code: {rows}\nmethod: {{name: supervised}}\n{pair}")
    method = build.build_method(config).method
    assert method.students.normalisation() == {"mean": 0.0, "std": 1.0}
    assert type(method.students.fusion_head).__name__ == "PublishedFusionHead"
    assert type(build.build_optimizers(config, method)["subnets"]).__name__ == "LateOptimizer"


def test_round_trip_and_command_line(tmp_path):
    (tmp_path / "x.yaml").write_text(ADAPTER)
    for word, value in (
        ("true", True),
        ("[fusion_xor,no_dense_prompt]", ["fusion_xor", "no_dense_prompt"]),
        ("[]", []),
    ):
        config = load_config(tmp_path / "x.yaml", [f"published_code={word}"])
        assert config.published_code == value
        assert parse(to_yaml(config)) == config


def test_it_trains_and_is_evaluated(lab, tmp_path):
    """From the command line, with a short ramp and a stop after two of its steps."""
    run = tmp_path / "run"
    more = ("published_code=true", "train.max_steps=200", "method.mix.start=0", "--stop-at", "2")
    assert lab.train(run, *more) == 0
    terms = [record for record in lab.metrics(run) if record["kind"] == "train"]
    assert [record["lr_sam"] for record in terms] == [1e-3, 1e-3]
    assert "mix_seg_fusion" in terms[1] and terms[1]["consistency_unet"] == pytest.approx(terms[1]["consistency_vnet"])
    assert run_command("evaluate", [str(run), "--checkpoint", "last"]) == 0


def test_building_leaves_the_configuration_as_it_is():
    config = small_config(True)
    before = to_yaml(config)
    build.build_method(config)
    assert to_yaml(config) == before


def test_by_default_nothing_of_it_is_built():
    config = small_config(False)
    method = build.build_method(config).method
    modules = {type(module).__module__ for module in method.modules()}
    functions = vars(method.formulas) | dict(enumerate(method.formulas.consistency))
    functions = {f.__module__ for f in functions.values() if callable(f)}
    optimizers = {type(item).__module__ for item in build.build_optimizers(config, method).values()}
    assert not any("compat" in name for name in modules | optimizers)
    rooms = ("losses.consistency", "losses.distillation", "losses.entropy", "schedules")
    assert functions == {f"knowsam.{room}" for room in rooms}


def test_settings_name_real_options():
    for key, value in settings(tuple(ROWS)).items():
        block, *path, name = key.split(".")
        target = {
            ("method",): components.METHODS["knowsam"],
            ("sam",): components.SAM_GUIDE,
            ("sam", "tuning"): components.TUNINGS["adapter"],
            ("sam", "prompt"): components.SAM_PROMPTS["learned"],
            ("method", "skd"): components.signature(components.METHODS["knowsam"])["skd"].options,
            ("method", "mix"): components.signature(components.METHODS["knowsam"])["mix"].options,
        }[block, *path]
        parameter = components.signature(target)[name]
        assert components.type_error(value, parameter.annotation) is None


def test_the_document_lists_every_row():
    text = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8").partition("## What each row changes")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.M) == list(ROWS)

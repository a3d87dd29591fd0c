"""From run folders to numbers: seeds, cases, baselines, and files of other versions."""

import csv
import re

import numpy as np
import pytest
from report_runs import CASES, SUPERVISED, compared, one_set, pair, row, scores, write_run, write_sweep
from scipy import stats

from knowsam.cli.compare import ALLOWED, METRICS
from knowsam.errors import ConfigError, DataError, NotFoundError
from knowsam.metrics import METRIC_NAMES
from knowsam.report.checks import KINDS
from knowsam.report.compare.notes import notes


def test_choices_of_the_command_line_are_those_of_the_report():
    assert METRICS == METRIC_NAMES and ALLOWED == KINDS


# ---------------------------------------------------------------- numbers


def test_mean_and_sd_over_seeds_and_the_test_over_cases(tmp_path):
    runs = []
    for seed in range(3):
        runs += [write_run(tmp_path / f"base_{seed}", scores(seed), seed=seed, config=SUPERVISED)]
        runs += [write_run(tmp_path / f"ours_{seed}", scores(seed, 0.1), seed=seed)]
    tables = one_set(runs)
    assert [row.setting for row in tables.rows] == ["method.name=supervised", "method.name=knowsam"]
    assert tables.baseline == "method.name=supervised" and "first setting" in tables.baseline_origin
    base, ours = (row.cells["mean", "dice"] for row in tables.rows)
    a = np.array([list(scores(seed, 0.1).values()) for seed in range(3)])  # (seeds, cases)
    b = np.array([list(scores(seed).values()) for seed in range(3)])
    assert ours.values.mean == pytest.approx(a.mean()) and ours.values.sd == pytest.approx(a.mean(1).std(ddof=1))
    assert ours.delta.mean == pytest.approx((a - b).mean())
    assert ours.delta.sd == pytest.approx((a.mean(1) - b.mean(1)).std(ddof=1)) and ours.delta.n == 3
    theirs = stats.wilcoxon(a.mean(0), b.mean(0))
    assert ours.test.p == pytest.approx(theirs.pvalue) == ours.test.p_holm
    assert ours.test.statistic == theirs.statistic and ours.test.pairs == 12
    assert base.delta is base.test is None and base.values.n == 3


def test_a_failed_seed_is_missing_on_both_sides(tmp_path):
    """The baseline's seed 1 takes no part in difference and test, but does in the baseline's own mean."""
    folders = write_sweep(
        tmp_path / "s",
        [
            {"setting": "full", "seed": 0},
            {"setting": "full", "seed": 1},
            {"setting": "no SKD", "seed": 0},
            {"setting": "no SKD", "seed": 1, "state": "failed", "exit_code": 79, "message": "at /some/where"},
        ],
        baseline="full",
    )
    for folder, seed, lift in zip(folders[:3], (0, 1, 0), (0.1, 0.3, 0.0), strict=True):
        write_run(folder, scores(seed, lift), seed=seed)
    tables = one_set([tmp_path / "s"])
    full, ours = tables.rows
    assert (full.seeds, ours.seeds) == ([0, 1], [0])
    cell = ours.cells["mean", "dice"]
    a, b = np.array(list(scores(0).values())), np.array(list(scores(0, 0.1).values()))
    assert cell.delta.mean == pytest.approx((a - b).mean()) and cell.delta.sd is None and cell.delta.n == 1
    assert cell.test.p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert full.cells["mean", "dice"].values.n == 2 and cell.values.sd is None
    found = notes(tables)
    assert found[0] == "1 of 2 runs of 'no SKD' failed (seed 1, exit 79: numeric): its means are over 1 seed."
    assert "'no SKD' and the baseline share 1 seed: Δ and its test are over it alone." in found
    assert not any("/some/where" in line for line in found)


def test_ties_and_equal_runs(tmp_path):
    same = scores(0)
    tables = one_set(pair(tmp_path, same, same))
    test = tables.rows[1].cells["mean", "dice"].test
    assert test.p is None and test.zeros == 12 and tables.rows[1].cells["mean", "dice"].delta.mean == 0
    assert "No p for 'ours': all 12 differences are zero." in notes(tables)
    shifted = {case: value + (0.1 if i % 3 else 0.0) for i, (case, value) in enumerate(same.items())}
    tied = one_set(pair(tmp_path / "t", shifted, same)).rows[1].cells["mean", "dice"].test
    # Eight equal differences: every sign pattern but "all one way" is less extreme.
    assert (tied.zeros, tied.pairs, tied.effect) == (4, 12, 1.0) and tied.p == pytest.approx(2 / 2**8)


def test_cases_that_count_on_one_side_only(tmp_path):
    """c00: both say nothing where nothing is. c01: the baseline alone; the setting's false positive has no pair."""
    theirs = scores(0) | {"c00": None, "c01": None}
    ours = scores(0, 0.1) | {"c00": None, "c01": 0.0}
    tables = one_set(pair(tmp_path, ours, theirs))
    cell = tables.rows[1].cells["mean", "dice"]
    assert sorted(cell.differences) == CASES[2:] and cell.one_sided == (1, 0)
    a, b = ([values[case] for case in CASES[2:]] for values in (ours, theirs))
    assert cell.test.p == pytest.approx(stats.wilcoxon(a, b).pvalue)
    assert cell.values.mean == pytest.approx(np.mean([0.0, *a]))  # the mean keeps it
    assert any("1 case scores count for it alone" in line for line in notes(tables))


def test_classes_each_and_together(tmp_path):
    """The run's mean is over classes of class means, the case's over its own classes that count."""
    ours = {"liver": {"a": 0.9, "b": 0.5}, "lesion": {"a": 0.1, "b": None}}
    theirs = {"liver": {"a": 0.5, "b": 0.5}, "lesion": {"a": 0.1, "b": 0.4}}
    tables = one_set(pair(tmp_path, ours, theirs))
    assert tables.classes == ("mean", "liver", "lesion")
    cells = tables.rows[1].cells
    assert cells["mean", "dice"].values.mean == pytest.approx((0.7 + 0.1) / 2)
    assert cells["mean", "dice"].differences == pytest.approx({"a": (0.9 + 0.1) / 2 - 0.3, "b": 0.5 - 0.45})
    assert cells["lesion", "dice"].differences == pytest.approx({"a": 0.0})
    assert cells["lesion", "dice"].one_sided == (0, 1)


def test_holm_is_over_the_settings_of_a_metric(tmp_path):
    runs = [f"base={write_run(tmp_path / 'b', scores(0))}"]
    for i, lift in enumerate((0.02, 0.1, -0.1)):
        other = {
            case: min(1, max(0, value + lift * (1 + 0.1 * j) * (-1) ** (j % (5 - i) == 0)))
            for j, (case, value) in enumerate(scores(0).items())
        }
        runs.append(f"s{i}={write_run(tmp_path / f's{i}', other, config=f'train.threads={i + 1}')}")
    rows = one_set(runs, baseline="base").rows[1:]
    p = [row.cells["mean", "dice"].test.p for row in rows]
    order = np.argsort(p, kind="stable")
    expected = np.minimum(1, np.maximum.accumulate(np.array(p)[order] * [3, 2, 1]))
    assert [rows[i].cells["mean", "dice"].test.p_holm for i in order] == pytest.approx(expected.tolist())


def test_one_setting_has_no_tests(tmp_path):
    tables = one_set([write_run(tmp_path / f"{seed}", scores(seed), seed=seed) for seed in (0, 1)])
    assert tables.baseline is None and [row.setting for row in tables.rows] == ["knowsam"]
    assert tables.rows[0].cells["mean", "dice"].test is None and tables.rows[0].cells["mean", "dice"].values.n == 2


def test_label_efficiency(tmp_path):
    runs = []
    for method in ("knowsam", "supervised"):
        for n, labelled in enumerate(("40pct", "10pct", "20pct")):
            for seed in (0, 1):
                config = f"method.name={method} data.labelled=labelled_{labelled}"
                runs.append(
                    write_run(tmp_path / f"{method}_{labelled}_{seed}", scores(seed, n / 20), seed=seed, config=config)
                )
    tables = one_set(runs)
    assert [curve.name for curve in tables.curves] == ["method.name=knowsam", "method.name=supervised"]
    assert [count for count, _ in tables.curves[0].points] == [16, 32, 64]
    assert all(row.cells["mean", "dice"].values.n == 2 for _, row in tables.curves[1].points)
    # All that differs, also what the names leave out: a supervised method has a single U-Net of its own.
    assert tables.settings == {
        "data.labelled": [f"labelled_{p}pct" for p in (40, 10, 20)] * 2,
        "students.vnet.name": ["vnet"] * 3 + [""] * 3,
        "fusion.name": ["ham"] * 3 + [""] * 3,
        "fusion": [""] * 3 + [None] * 3,
        "method.name": ["knowsam"] * 3 + ["supervised"] * 3,
    }


def test_curves_of_a_sweep_are_called_by_what_the_settings_share(tmp_path):
    trials = [{"setting": f"{name}, {p} %"} for name in ("KnowSAM", "sup") for p in (10, 20)] + [
        {"setting": "other, 40 %"}
    ]
    folders = write_sweep(tmp_path / "s", trials)
    for folder, trial in zip(folders, trials, strict=True):
        name, percent = trial["setting"].removesuffix(" %").split(", ")
        method = {"KnowSAM": "knowsam", "sup": "supervised", "other": "mean_teacher"}[name]
        write_run(folder, scores(0), config=f"method.name={method} data.labelled=labelled_{percent}pct")
    curves = one_set([tmp_path / "s"]).curves
    assert [(curve.name, len(curve.points)) for curve in curves] == [("KnowSAM", 2), ("sup", 2), ("other, 40 %", 1)]


# ---------------------------------------------------------------- which runs


def test_experiments_never_share_a_table(tmp_path):
    trials = [
        {"setting": s, "experiment": e, "seed": n} for e in ("one", "two") for s in ("full", "less") for n in (0, 1)
    ]
    trials += [{"setting": "full", "experiment": "three", "state": "waiting"}]
    folders = write_sweep(tmp_path / "s", trials, baseline="full")
    for folder, trial in zip(folders[:-1], trials, strict=False):
        # The second has other classes and test cases: in one table this would be refused.
        dice = (
            {"x": scores(trial["seed"]), "y": scores(trial["seed"])}
            if trial["experiment"] == "two"
            else scores(trial["seed"])
        )
        write_run(folder, dice, seed=trial["seed"], config="" if trial["setting"] == "full" else SUPERVISED)
    comparison = compared([tmp_path / "s"])
    assert [(item.experiment, len(item.rows)) for item in comparison.sets] == [("one", 2), ("two", 2), ("three", 0)]
    assert notes(comparison.sets[2]) == ["1 of 1 run of 'full' not started (seed 0): it has no row."]
    with pytest.raises(ConfigError, match="there is no setting 'ful' to be the baseline; there are 'full', 'less'"):
        compared([tmp_path / "s"], baseline="ful")


def test_retired_and_unfinished_trials_are_named(tmp_path):
    trials = [
        {"setting": "full", "seed": 0},
        {"setting": "full", "seed": 1, "state": "running"},
        {"setting": "full", "seed": 2, "state": "failed", "exit_code": 1},
        {"setting": "full", "seed": 3, "state": "pruned"},
        {"setting": "old", "seed": 0, "state": "retired"},
    ]
    write_run(write_sweep(tmp_path / "s", trials, baseline="gone")[0], scores(0))
    tables = one_set([tmp_path / "s"])
    assert notes(tables)[:2] == [
        "3 of 4 runs of 'full' are missing, 1 failed (seed 2, exit 1), 1 ended early (seed 3), 1 unfinished (seed 1): "
        "its means are over 1 seed.",
        "1 retired trial of an earlier plan left out: 'old' seed 0.",
    ]


def test_a_baseline_without_a_finished_run(tmp_path):
    trials = [{"setting": "full", "state": "failed", "exit_code": 79}, {"setting": "a"}, {"setting": "b"}]
    for folder in write_sweep(tmp_path / "s", trials, baseline="full")[1:]:
        write_run(folder, scores(0))
    tables = one_set([tmp_path / "s"])
    assert tables.baseline is None and all(cell.test is None for row in tables.rows for cell in row.cells.values())
    assert "No tests: 'full' (named by the sweep) has no finished run here." in notes(tables)


def test_plain_runs_that_are_not_finished(tmp_path):
    done = write_run(tmp_path / "a", scores(0))
    failed = write_run(tmp_path / "b", None, seed=1, state="failed", code=79)
    unscored = write_run(tmp_path / "c", None, seed=2)
    tables = one_set([done, failed])
    assert notes(tables)[0] == "1 of 2 runs of 'knowsam' failed (seed 1, exit 79: numeric): its means are over 1 seed."
    with pytest.raises(NotFoundError, match=r"c has no scores on test") as caught:
        compared([done, unscored])
    assert f"knowsam evaluate {unscored}" in caught.value.hint
    with pytest.raises(NotFoundError, match="none of the runs is finished"):
        compared([failed])
    with pytest.raises(NotFoundError, match="no scores on val") as caught:
        compared([done], split="val")
    assert caught.value.hint.endswith("--split val")


def test_an_unscored_trial(tmp_path):
    folders = write_sweep(tmp_path / "s", [{"setting": "a"}, {"setting": "b"}])
    write_run(folders[0], scores(0))
    write_run(folders[1], None)
    with pytest.raises(NotFoundError, match="1 complete trials have no scores on test"):
        compared([tmp_path / "s"])


def test_names_and_patterns(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"full_{seed}", scores(seed), seed=seed)
        write_run(tmp_path / f"x=y_{seed}", scores(seed), seed=seed, config=SUPERVISED)
    tables = one_set([f"all parts={tmp_path}/full_*", f"plain={tmp_path}/x=y_0", f"plain={tmp_path}/x=y_1"])
    assert [(row.setting, row.seeds) for row in tables.rows] == [("all parts", [0, 1]), ("plain", [0, 1])]
    assert len(one_set([tmp_path / "x=y_0"]).rows) == 1  # a folder whose own name holds "="


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        (["{0}/none"], NotFoundError, "there is no folder"),
        (["{0}"], NotFoundError, "no run in"),
        (["x={0}/nothing_*"], NotFoundError, "there is no folder"),
        (["{0}/a", "{0}/b/../a"], ConfigError, "named twice"),
        (["{0}/a", "{0}/twin"], ConfigError, "setting 'knowsam' has seed 0 twice: .*a and .*twin"),
        (
            ["n={0}/a", "n={0}/b"],
            ConfigError,
            r"'n' holds runs of different settings: .*\(method.name: 'knowsam', 'supervised'\)",
        ),
        (["{0}/a", "{0}/sweep"], ConfigError, "folder of a sweep and stands among other arguments"),
        (["{0}/sweep.yaml"], ConfigError, "sweep.yaml is a file"),
        (["{0}/bad"], DataError, "format 9, known is 1"),
    ],
)
def test_arguments_that_name_no_comparison(tmp_path, paths, error, message):
    write_run(tmp_path / "a", scores(0))
    write_run(tmp_path / "twin", scores(0))
    write_run(tmp_path / "b", scores(0), seed=1, config=SUPERVISED)
    write_sweep(tmp_path / "sweep", [])
    (tmp_path / "sweep.yaml").write_text("base: x.yaml")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "trials.json").write_text('{"format": 9}')
    with pytest.raises(error, match=message) as caught:
        compared([path.format(tmp_path) for path in paths])
    assert caught.value.hint
    if "yaml" in paths[0]:
        assert "runs/sweeps/sweep" in caught.value.hint


# ---------------------------------------------------------------- files of other versions


def rounded(run):
    """The cases file as it was written before it kept every digit."""
    path = run / "evaluation" / "test_cases.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(
            {k: f"{float(v):.4f}" if k in METRIC_NAMES and v else v for k, v in row.items()} for row in rows
        )
    return run


def test_cases_of_four_digits_meet_exact_ones(tmp_path):
    """Unrounded beside rounded, equal scores would differ in the fifth digit and be ranked."""
    same = scores(0)
    runs = [write_run(tmp_path / "a", same), rounded(write_run(tmp_path / "b", same, config=SUPERVISED))]
    tables = one_set(runs)
    assert tables.digits == 4 and tables.rows[1].cells["mean", "dice"].test.zeros == 12
    assert any("4 digits" in line for line in notes(tables))
    exact = one_set([tmp_path / "a", write_run(tmp_path / "c", same, config=SUPERVISED)])
    assert exact.digits is None


def test_files_that_do_not_belong_together(tmp_path):
    run = write_run(tmp_path / "a", scores(0))
    path = run / "evaluation" / "test_cases.csv"
    text = path.read_text()
    other = write_run(tmp_path / "b", scores(1))
    path.write_text((other / "evaluation" / "test_cases.csv").read_text())
    with pytest.raises(DataError, match="do not belong together"):
        compared([run])
    path.write_text(text.replace("ok", "fine"))
    with pytest.raises(DataError, match="status 'fine'"):
        compared([run])
    path.unlink()
    with pytest.raises(NotFoundError, match="its summary is"):
        compared([run])
    (run / "config.yaml").write_text("data: [")
    with pytest.raises(DataError, match=r"config\.yaml cannot be read"):
        compared([run])


def test_names_that_a_spreadsheet_would_run(tmp_path):
    names = {f"={i}": 0.1 * i for i in range(1, 8)}
    cell = (
        one_set(pair(tmp_path, names, {case: value + 0.05 for case, value in names.items()}))
        .rows[1]
        .cells["mean", "dice"]
    )
    assert list(cell.differences) == list(names) and row("=1", None)["status"] == "empty_both"


def test_val_scores_are_said_to_be_too_good(tmp_path):
    run = write_run(tmp_path / "a", scores(0), split="val")
    (tables,) = compared([run], split="val").sets
    assert any("also chose the checkpoints" in line for line in notes(tables))


def test_a_configuration_of_another_version(tmp_path):
    """A key that is newer than a run has its default there; one that is unknown here is a setting like others."""
    for name in ("new", "old", "own"):
        write_run(tmp_path / name, scores(0), seed={"new": 0}.get(name, 1))
    old, own = tmp_path / "old" / "config.yaml", tmp_path / "own" / "config.yaml"
    old.write_text(re.sub(r"(?m)^  threads: 0\n", "", old.read_text()))
    own.write_text(own.read_text().replace("  name: knowsam", "  name: my_lab.code:Mine"))
    tables = one_set([tmp_path / "new", tmp_path / "old", tmp_path / "own"])
    assert [(row.setting, row.seeds) for row in tables.rows] == [
        ("method.name=knowsam", [0, 1]),
        ("method.name=my_lab.code:Mine", [1]),
    ]

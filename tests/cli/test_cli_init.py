"""A user's folder becomes an experiment that trains: init, check, train, evaluate."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from knowsam.cli.main import run_command
from knowsam.config import REPOSITORY, load_config
from knowsam.data.builtin import render
from knowsam.data.splits import load_splits

TOOLS = {"init": "init", "check_data": "check", "make_splits": "splits"}
TINY = [  # the networks of tests/conftest.py's tiny experiment
    "data.image_size=64",
    "data.labelled_batch=2",
    "data.unlabelled_batch=2",
    "students={unet: {name: unet, channels: [4, 8], dropout: [0.1, 0.2]}, vnet: {name: vnet, filters: 2, norm: batch}}",
    "sam={encoder: {name: vit_tiny}, tuning: {name: adapter, ratio: 0.1}, prompt: {name: learned, sparse: false}}",
    "sam.weights=null",
    "sam.train=[tuning,prompt]",
    "train.max_steps=2",
    "train.precision=fp32",
    "train.device=cpu",
    "train.tensorboard=false",
]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def messy(tmp_path):
    """12 patients with 2 images each: several sizes, formats and coding of masks; some masks missing, some broken."""
    images, masks = tmp_path / "user" / "pictures", tmp_path / "user" / "annotations"
    images.mkdir(parents=True)
    masks.mkdir()
    for n in range(24):
        image, mask = render(np.random.default_rng(n), 40 + n, 2)
        mask[:3, :3] = 1
        image, mask = image[: 38 + n], mask[: 38 + n]
        name = f"pat{n // 2:02d}_{n % 2}"
        if n % 4 == 0:
            Image.fromarray(image).save(images / f"{name}.jpg", quality=95)
        elif n % 4 == 1:
            Image.fromarray(image).convert("L").save(images / f"{name}.png")
        elif n % 4 == 2:
            Image.fromarray(np.uint16(image.mean(axis=2) * 257)).save(images / f"{name}.tif")
        else:
            Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE).save(images / f"{name}.png")
        if n in (4, 5, 11, 17):
            continue
        if n % 3 == 0:
            coded = Image.fromarray(mask)
            coded.putpalette([0, 0, 0, 255, 0, 0])
            coded.save(masks / f"{name}_mask.png")
        else:
            Image.fromarray(mask * 255).save(masks / f"{name}_mask.{'bmp' if n % 2 else 'png'}")
    return tmp_path / "user"


def init(out, *words):
    return run_command("init", ["study", "--out", str(out), *map(str, words)])


def test_from_a_folder_to_scores(messy, tmp_path, capsys):
    before = snapshot(messy)
    words = ["--images", messy / "pictures", "--group-regex", r"^(pat\d+)", "--classes", "background,lesion"]
    assert init(tmp_path / "out", *words) == 0
    told = capsys.readouterr().out
    assert "called <case>_mask" in told and "1 and 255 are taken for one class" in told and "knowsam check" in told
    experiment = tmp_path / "out" / "experiments" / "study.yaml"
    lists = tmp_path / "out" / "data_splits" / "study"
    config = load_config(experiment)
    assert config.data.classes == ["background", "lesion"] and config.data.labels == {0: 0, 1: [1, 255]}
    assert config.data.source["mask_suffix"] == "_mask" and config.data.labelled == "labelled_max"
    assert config.data.group_regex == r"^(pat\d+)"
    splits = load_splits(lists, config.data.labelled, group_regex=config.data.group_regex)
    assert "pat02_0" in splits.unlabelled and len(splits.train) + len(splits.val) + len(splits.test) >= 20
    assert "knowsam init study" in (lists / "summary.md").read_text()

    report, picture = tmp_path / "check.json", tmp_path / "preview.png"
    assert run_command("check", [str(experiment), "--json", str(report), "--preview", str(picture)]) == 0
    assert json.loads(report.read_text())["fit"] is True and Image.open(picture).width > 1000
    run = tmp_path / "run"
    assert run_command("train", [str(experiment), *TINY, f"run={run}", "--evaluate"]) == 0
    assert (run / "evaluation" / "test_cases.csv").exists()
    assert snapshot(messy) == before  # nothing of the user's was touched


def test_the_same_again_and_not_over_other_work(messy, tmp_path, capsys):
    words = ["--images", messy / "pictures"]
    assert init(tmp_path / "one", *words) == 0
    assert init(tmp_path / "two", *words) == 0
    lists = [sorted((tmp_path / out / "data_splits" / "study").glob("*.txt")) for out in ("one", "two")]
    assert [path.read_text() for path in lists[0]] == [path.read_text() for path in lists[1]] and len(lists[0]) > 5
    before = snapshot(tmp_path / "one")
    capsys.readouterr()
    assert init(tmp_path / "one", *words, "--seed", 1) == 73
    assert "--force" in capsys.readouterr().err
    (tmp_path / "one" / "experiments" / "study.yaml").unlink()
    assert init(tmp_path / "one", *words, "--seed", 1) == 73  # the lists alone are reason enough
    after = snapshot(tmp_path / "one")
    assert all(after[path] == before[path] for path in after)
    assert init(tmp_path / "one", *words, "--seed", 1, "--force") == 0
    assert snapshot(tmp_path / "one") != before


def test_files_that_cannot_be_used_are_told_and_left_out(messy, tmp_path, capsys):
    images, masks = messy / "pictures", messy / "annotations"
    (images / "pat00_0.jpg").write_bytes((images / "pat00_0.jpg").read_bytes()[:200])
    (masks / "pat01_0_mask.png").write_bytes(b"")
    Image.new("L", (9, 9)).save(masks / "pat03_0_mask.png")
    mask = np.array(Image.open(masks / "pat04_0_mask.png"))
    mask[0, :4] = 77
    Image.fromarray(mask).save(masks / "pat04_0_mask.png")
    Image.open(images / "pat05_0.tif").save(images / "pat10_copy.png")
    assert init(tmp_path, "--images", images) == 0
    told = capsys.readouterr()
    assert "pat00_0.jpg: not a picture that can be read, truncated" in told.err
    for text in ("0 bytes", "9 x 9", "no class has the values 77 (4 pixels)"):
        assert text in told.err
    assert "pat05_0 = pat10_copy" in told.out
    lists = {p.stem: set(p.read_text().split()) for p in (tmp_path / "data_splits" / "study").glob("*.txt")}
    assert "pat00_0" not in set().union(*lists.values())
    assert {"pat01_0", "pat03_0", "pat04_0"} <= lists["train"] - lists["labelled_max"]
    assert run_command("check", [str(tmp_path / "experiments" / "study.yaml")]) == 0


def make(folder, masks):
    for n, mask in enumerate(masks):
        image = render(np.random.default_rng(n), 32, 2)[0]
        for kind, array in (("images", image), ("masks", mask)):
            (folder / kind).mkdir(exist_ok=True, parents=True)
            Image.fromarray(array).save(folder / kind / f"{n:02d}.png")
    return folder


def blobs(values, count=20):
    masks = []
    for n in range(count):
        mask = np.zeros((32, 32), np.uint8)
        for k, value in enumerate(values):
            mask[4 * k : 4 * k + 3, 2 : 12 + n % 5] = value
        masks.append(mask)
    return masks


def test_where_all_have_masks_most_are_set_aside(tmp_path):
    make(tmp_path / "data", blobs([255], 40))
    assert init(tmp_path, "--images", tmp_path / "data", "--labelled", "25", "12") == 0
    config = load_config(tmp_path / "experiments" / "study.yaml")
    assert config.data.labelled == "labelled_12pct" and config.data.classes == ["background", "foreground"]


def test_a_label_list_that_lacks_a_class_is_not_chosen(tmp_path):
    masks = blobs([1], 30)
    for mask in masks[::6]:
        mask[20:, 20:] = 2
    make(tmp_path / "data", masks)
    assert init(tmp_path, "--images", tmp_path / "data", "--labelled", "1cases") == 0
    config = load_config(tmp_path / "experiments" / "study.yaml")
    # only the list of all holds every class; then no image is without a label, and training must be told so
    assert config.data.labelled == "labelled_max" and config.data.unlabelled_includes_labelled
    assert config.data.labels is None and len(config.data.classes) == 3


@pytest.mark.parametrize(
    ("values", "words", "labels", "classes"),
    [
        ([1, 2], ["--classes", "background,a,b"], None, ["background", "a", "b"]),
        ([1, 2], ["--classes", "background,a,b,rare"], None, ["background", "a", "b", "rare"]),
        ([100, 200], [], {0: 0, 1: 100, 2: 200}, ["background", "class_1", "class_2"]),
        ([100, 200], ["--labels", "{0: [0, 100], 1: 200}"], {0: [0, 100], 1: 200}, ["background", "foreground"]),
    ],
)
def test_classes(tmp_path, values, words, labels, classes):
    make(tmp_path / "data", blobs(values))
    assert init(tmp_path, "--images", tmp_path / "data", *words) == 0
    config = load_config(tmp_path / "experiments" / "study.yaml")
    assert config.data.labels == labels and config.data.classes == classes


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--classes", "background"], 78, "2 or more"),
        (["--classes", "background,a,b"], 78, "names 3 classes, but there are 2"),
        (["--labels", "{0: 0"], 78, "no YAML"),
        (["--labels", "255"], 78, "classes and values"),
        (["--labels", "{0: 0, 2: 255}"], 78, "needed are 0..1"),
        (["--labelled", "many"], 78, "labelled amount 'many'"),
        (["--labelled", "100cases"], 65, "needs 100 cases"),
        (["--val", "80", "--test", "20"], 78, "leave some"),
        (["--group-regex", "("], 78, "regular expression"),
        (["--group-regex", "^p"], 65, "20 of 20 images have no group"),
        (["--groups", "none.csv"], 66, "none.csv"),
        (["--masks", "none"], 66, "folder of masks none"),
        (["--mask-suffix", "_x"], 65, "no mask fits an image"),
    ],
)
def test_refusals(tmp_path, capsys, words, code, says):
    make(tmp_path / "data", blobs([255]))
    assert init(tmp_path / "out", "--images", tmp_path / "data", *words) == code
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_names(tmp_path, capsys):
    for name in ("../x", "a b", "", "x.yaml"):
        assert run_command("init", [name, "--images", str(tmp_path)]) == 78
    assert "cannot be a name" in capsys.readouterr().err


def test_data_below_knowsam_data_are_named_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("KNOWSAM_DATA", str(tmp_path))
    make(tmp_path / "polyps", blobs([255]))
    assert init(tmp_path / "out", "--images", tmp_path / "polyps") == 0
    values = yaml.safe_load((tmp_path / "out" / "experiments" / "study.yaml").read_text())
    assert values["data"]["source"] == {"name": "image_folder", "root": "polyps"}
    assert run_command("check", [str(tmp_path / "out" / "experiments" / "study.yaml"), "--quick"]) == 0


def test_inside_the_checkout_all_paths_are_relative(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "experiments" / "base").mkdir(parents=True)
    shutil.copy(REPOSITORY / "experiments" / "base" / "small.yaml", checkout / "experiments" / "base")
    monkeypatch.setattr("knowsam.config.REPOSITORY", checkout)
    make(checkout / "data" / "own", blobs([255]))
    monkeypatch.chdir(checkout)
    assert run_command("init", ["study", "--images", "data/own"]) == 0
    values = yaml.safe_load(Path("experiments/study.yaml").read_text())
    assert values["inherits"] == "base/small.yaml"
    assert (values["data"]["source"]["root"], values["data"]["splits"]) == ("own", "data_splits/study")
    monkeypatch.chdir(tmp_path)
    assert load_config(checkout / "experiments" / "study.yaml").data.image_size == 128


def test_the_commands_of_the_document_work(tmp_path, monkeypatch):
    """docs/own_data.md, as it stands, on a folder like the one it speaks of."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "study", blobs([255], 48))
    rows = ["image,patient"]
    for n in range(48):
        rows.append(f"patient{n // 2}_{n}.png,{n // 2}")
        for kind in ("images", "masks"):
            (tmp_path / "study" / kind / f"{n:02d}.png").rename(tmp_path / "study" / kind / f"patient{n // 2}_{n}.png")
    (tmp_path / "patients.csv").write_text("\n".join(rows) + "\n")
    text = (REPOSITORY / "docs" / "own_data.md").read_text(encoding="utf-8")
    commands = re.findall(r"(?m)^python tools/(\w+)\.py (.*)$", text.replace("\\\n", " "))
    done = []
    for tool, words in commands:
        if tool in TOOLS:
            words = shlex.split(words.replace("/data/study", str(tmp_path / "study")))
            force = ["--force"] if tool == "make_splits" else []
            assert run_command(TOOLS[tool], [*words, *force]) == 0, (tool, words)
            done.append(tool)
    assert done == ["init", "check_data", *["make_splits"] * 6]
    assert (tmp_path / "data_splits" / "my_study" / "labelled_3groups_draw4.txt").exists()
    assert (tmp_path / "data_splits" / "my_folds" / "fold4" / "test.txt").exists()
    assert (tmp_path / "preview.png").exists() and (tmp_path / "data_splits" / "my_study" / "groups.csv").exists()


def test_a_tree_of_classes_beside_unlabelled_images_trains(tmp_path, capsys):
    for kind in ("benign", "malignant"):
        make(tmp_path / "data" / kind, blobs([255], 12))
    (tmp_path / "data" / "unlabelled").mkdir()
    for n in range(6):  # called like labelled ones
        image = render(np.random.default_rng(100 + n), 32, 2)[0]
        Image.fromarray(image).save(tmp_path / "data" / "unlabelled" / f"{n:02d}.png")
    assert init(tmp_path, "--images", tmp_path / "data", "--no-near-duplicates") == 0
    experiment = tmp_path / "experiments" / "study.yaml"
    source = load_config(experiment).data.source
    assert source["image_dir"] == {".": "*/images", "unlabelled": "unlabelled"} and source["mask_dir"] == "*/masks"
    train = (tmp_path / "data_splits" / "study" / "train.txt").read_text().split()
    assert {f"unlabelled/{n:02d}" for n in range(6)} <= set(train) and "play no part" not in capsys.readouterr().err
    assert run_command("train", [str(experiment), *TINY, f"run={tmp_path / 'run'}"]) == 0


def test_several_masks_are_asked_about_and_merged(tmp_path, capsys):
    data = make(tmp_path / "data", blobs([255], 20))
    for n in range(20):
        (data / "masks" / f"{n:02d}.png").rename(data / "masks" / f"{n:02d}_mask.png")
    extra = np.zeros((32, 32), np.uint8)
    extra[20:30, 20:30] = 255
    Image.fromarray(extra).save(data / "masks" / "07_mask_1.png")
    assert init(tmp_path, "--images", data) == 65
    told = capsys.readouterr().err
    assert "1 images have several masks each (07: 07_mask.png, 07_mask_1.png): are they parts of one?" in told
    assert "--several-masks merge" in told and not (tmp_path / "experiments").exists()
    assert init(tmp_path, "--images", data, "--several-masks", "merge") == 0
    experiment = tmp_path / "experiments" / "study.yaml"
    assert load_config(experiment).data.source["merge_masks"] is True
    assert run_command("check", [str(experiment), "data.labelled=labelled_max"]) == 0
    assert init(tmp_path, "--images", data, "--several-masks", "leave", "--force") == 0
    assert "merge_masks" not in load_config(experiment).data.source
    assert "07" not in (tmp_path / "data_splits" / "study" / "labelled_max.txt").read_text().split()
    assert run_command("check", [str(experiment), "data.labelled=labelled_max"]) == 0


def test_what_training_would_refuse_is_refused_here(tmp_path, capsys):
    data = make(tmp_path / "data", blobs([255], 20))
    assert init(tmp_path, "--images", data, "--val", 0) == 65
    assert "no validation case" in capsys.readouterr().err
    for n in range(1, 20):
        (data / "masks" / f"{n:02d}.png").unlink()
    for words in ([], ["--test", 0], ["--test", 0, "--val", 0]):
        assert init(tmp_path, "--images", data, *words) == 65
        told = capsys.readouterr().err
        assert "1 of 20 images have a mask" in told and "one to learn from and one to validate on" in told
    assert not (tmp_path / "experiments").exists() and not (tmp_path / "data_splits").exists()


@pytest.mark.parametrize(
    ("asked", "gpu", "base", "says"),
    [
        ("auto", False, "small.yaml", "no GPU"),
        ("auto", True, "published.yaml", "has a GPU (Made Up 1)"),
        ("full", False, "published.yaml", "as --recipe says"),
        ("small", True, "small.yaml", "as --recipe says"),
    ],
)
def test_recipes(tmp_path, capsys, monkeypatch, asked, gpu, base, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Made Up 1")
    make(tmp_path / "data", blobs([255]))
    assert init(tmp_path, "--images", tmp_path / "data", "--recipe", asked) == 0
    told = capsys.readouterr().out
    assert says in told and ("weights fetch vit_b" in told) == (base == "published.yaml")
    experiment = tmp_path / "experiments" / "study.yaml"
    assert Path(yaml.safe_load(experiment.read_text())["inherits"]).name == base
    config = load_config(experiment)
    assert (config.data.image_size, config.train.max_steps) == (
        (256, 50000) if base == "published.yaml" else (128, 400)
    )


def test_instances_as_one_class_by_choice(tmp_path):
    make(tmp_path / "data", blobs([1, 2, 3, 4, 5]))
    assert init(tmp_path, "--images", tmp_path / "data", "--labels", "binary", "--classes", "background,nucleus") == 0
    config = load_config(tmp_path / "experiments" / "study.yaml")
    assert config.data.label_threshold == 0 and config.data.classes == ["background", "nucleus"]
    assert run_command("check", [str(tmp_path / "experiments" / "study.yaml")]) == 0


def test_palettes_that_disagree_are_refused(tmp_path, capsys):
    data = make(tmp_path / "data", blobs([1]))
    for n, path in enumerate(sorted((data / "masks").iterdir())):
        mask = Image.open(path)
        mask.putpalette([0, 0, 0, 255, 0, 0] if n % 2 else [0, 0, 0, 0, 255, 0])
        mask.save(path)
    assert init(tmp_path, "--images", data) == 65
    assert "index 1 is [0, 255, 0] in 10 (00, 02, 04, ...); [255, 0, 0] in 10 (01" in capsys.readouterr().err


def test_orientation_tags_are_told_with_the_rule(tmp_path, capsys):
    data = make(tmp_path / "data", blobs([255]))
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in (data / "images").iterdir():
        Image.open(path).save(path, exif=exif)
    assert init(tmp_path, "--images", data) == 0
    told = capsys.readouterr().err
    assert "20 of 20 images have an EXIF orientation" in told and "Image and mask are turned" in told
    for path in (data / "masks").iterdir():
        Image.open(path).crop((0, 0, 32, 30)).save(path)
    for path in (data / "images").iterdir():
        Image.open(path).crop((0, 0, 32, 30)).save(path, exif=exif)
    assert init(tmp_path, "--images", data, "--force") == 65
    told = capsys.readouterr().err
    assert "the mask is 30 x 32, the image 32 x 30" in told
    assert "it would fit the image as it is stored, before its EXIF orientation 6 is applied" in told


def test_a_folder_of_each_case_with_a_mask_of_each_object(tmp_path):
    rng = np.random.default_rng(0)
    for n in range(16):
        folder = tmp_path / "data" / f"case{n:02d}"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "images" / f"case{n:02d}.png")
        for k in range(1 + n % 3):
            mask = np.zeros((32, 32), np.uint8)
            mask[10 * k : 10 * k + 6, 4:20] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{rng.integers(10**9):x}.png")
    assert init(tmp_path, "--images", tmp_path / "data") == 65  # asked
    assert init(tmp_path, "--images", tmp_path / "data", "--several-masks", "merge") == 0
    experiment = tmp_path / "experiments" / "study.yaml"
    source = load_config(experiment).data.source
    assert (source["image_dir"], source["mask_dir"], source["mask_suffix"]) == ("*/images", "*/masks", "/*")
    report = tmp_path / "check.json"
    assert run_command("check", [str(experiment), "data.labelled=labelled_max", "--json", str(report)]) == 0
    counts = json.loads(report.read_text())["classes"]
    listed = {n: [*map(int, re.findall(r"case(\d+)/", (tmp_path / "data_splits/study" / f"{n}.txt").read_text()))]
              for n in ("val", "test")}  # fmt: skip
    for name, numbers in listed.items():
        share = sum((1 + n % 3) * 6 * 16 for n in numbers) / (len(numbers) * 32 * 32)
        assert counts[name]["pixel_share"]["foreground"] == pytest.approx(share)

"""A published checkpoint becomes a run: every tensor in its place, evaluated as any run is, and wrong files refused."""

import csv
import math
import pickle
import re

import numpy as np
import pytest
import torch
from compat_lab import EVAL, ROOT, Golden, golden_folder
from PIL import Image
from published_files import published_shapes, published_weights, save_published

from knowsam import build
from knowsam.cli.main import run_command
from knowsam.compat.keys import GUIDE_RULES, our_name, translate
from knowsam.compat.rows import ROWS
from knowsam.compat.sam import sam_blocks
from knowsam.config import parse_config
from knowsam.engine.checkpoint import load_checkpoint
from knowsam.inference.predict import predict_case
from knowsam.metrics.segmentation import case_metrics
from knowsam.models.sam import build_sam_guide

CLASSES = 3
COLOURS = ["background", "lesion", "vessel", "nucleus"]


def experiment(folder, images, masks, num_classes, image_size=256):
    """An experiment over PNG files, in which every image is a test case, and one like it train and val; its path."""
    names = {split: [f"{split}{i}" for i in range(len(images))] for split in ("train", "val", "test")}
    for part in ("images", "masks", "lists"):
        (folder / part).mkdir(parents=True)
    for split, cases in names.items():
        (folder / "lists" / f"{split}.txt").write_text("\n".join(cases))
        for case, image, mask in zip(cases, images, masks, strict=True):
            image = image if split == "test" else image ^ len(split)  # the same image in two splits would be refused
            Image.fromarray(image).save(folder / "images" / f"{case}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{case}.png")
    (folder / "lists" / "labelled_all.txt").write_text(names["train"][0])
    path = folder / "study.yaml"
    path.write_text(
        f"""
name: study
data:
  source: {{name: image_folder, root: {folder}}}
  splits: {folder / "lists"}
  labelled: labelled_all
  classes: [{", ".join(COLOURS[:num_classes])}]
  image_size: {image_size}
train: {{device: cpu}}
"""
    )
    return path


def pictures(num_classes, count=2, side=256, seed=0):
    draws = np.random.RandomState(seed)
    images = draws.randint(0, 256, (count, 8, 8, 3)).repeat(side // 8, 1).repeat(side // 8, 2).astype(np.uint8)
    masks = draws.randint(0, num_classes, (count, 8, 8)).repeat(side // 8, 1).repeat(side // 8, 2).astype(np.uint8)
    return images, masks


@pytest.fixture(scope="module")
def weights():
    return published_weights(CLASSES)


@pytest.fixture(scope="module")
def files(tmp_path_factory, weights):
    return save_published(tmp_path_factory.mktemp("published"), weights)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return experiment(tmp_path_factory.mktemp("study"), *pictures(CLASSES), CLASSES)


def convert(run, subnets, *more):
    return run_command("convert", ["published", "--subnets", str(subnets), "-o", str(run), *map(str, more)])


def load(run):
    """The method of a run as the evaluate command makes it, in eval mode."""
    state = load_checkpoint(run / "best.pt", fall_back=False)
    config = parse_config(state["config"], run)
    method = build.build_method(config).method
    method.load_state_dict(state["method"])
    return method.eval(), config


@pytest.fixture(scope="module")
def run(tmp_path_factory, files, study):
    run = tmp_path_factory.mktemp("runs") / "published"
    assert convert(run, files[0], "--sam", files[1], "--experiment", study) == 0
    return run


def test_names_are_those_of_the_golden_data():
    folder = golden_folder()
    if folder is None:
        pytest.skip("the golden data of the published code are not here")
    golden = Golden(folder)
    expected = published_shapes(golden.num_classes)
    assert {part: {k: tuple(t.shape) for k, t in w.items()} for part, w in golden.weights.items()} == expected


def test_names_and_shapes_of_the_full_size():
    """ViT-B with the published adapters: 115.65 M parameters, 22.0 M of them trained, and each has its place here."""
    shapes = published_shapes(2, width=768, depth=12)["sam"]
    buffers = ("running_mean", "running_var", "num_batches_tracked", "gaussian_matrix")
    sizes = {key: math.prod(shape) for key, shape in shapes.items() if not key.endswith(buffers)}
    trained = sum(size for key, size in sizes.items() if "Adapter" in key or key.startswith("super_prompt"))
    assert (round(sum(sizes.values()) / 1e6, 2), round(trained / 1e6, 1)) == (115.65, 22.0)
    with torch.device("meta"):
        blocks = sam_blocks(ROWS, {"encoder": "vit_b", "tuning": "adapter"})
        guide, _ = build_sam_guide(**blocks, image_size=256)
        own = {f"sam_teacher.guide.{key}": tensor for key, tensor in guide.state_dict().items()}
        found = translate({key: torch.empty(shape) for key, shape in shapes.items()}, own, GUIDE_RULES)
    assert found.complete and set(found.state) == set(own)
    assert found.resized == {"image_encoder.pos_embed": ((1, 64, 64, 768), (1, 16, 16, 768))}
    assert sum(sizes[key] for key in found.dead) == 3_550_464 + 33_088  # never trained, though counted as trainable


def test_every_tensor_is_where_it_belongs(run, weights):
    method, _ = load(run)
    own = method.state_dict()
    expected = {**weights["subnets"], **weights["sam"]}
    used = {our_name(key): key for key in expected if our_name(key) is not None}
    assert set(used) == set(own)
    for name, key in used.items():
        if not key.endswith("pos_embed"):
            assert torch.equal(own[name], expected[key]), key
    dead = {key for key in expected if our_name(key) is None}
    assert len(dead) == 4 * 4 + 4  # a depth adapter in each block, one adapter of the decoder
    resized = torch.nn.functional.interpolate(
        expected["image_encoder.pos_embed"].permute(0, 3, 1, 2), (16, 16), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(own["sam_teacher.guide.sam.image_encoder.pos_embed"], resized.permute(0, 2, 3, 1))


def test_the_report_and_what_is_not_known(run, capsys, files, study, tmp_path):
    assert convert(tmp_path / "run", files[0], "--experiment", study) == 0
    said = capsys.readouterr().out
    assert "SGDL_best_model.pth: students and fusion head, K = 3" in said and "244 loaded as they are" in said
    assert "outputs fusion, unet, vnet; next: knowsam evaluate" in said
    text = (run / "converted.txt").read_text()
    assert "sam_best_model.pth: SAM, adapters and prompt generator, K = 3" in text
    assert "1 resized: image_encoder.pos_embed 1x64x64x96 -> 1x16x16x96" in text
    assert "20 left out" in text and "0 missing" in text and "0 unknown" in text
    for word in ("which images it was trained on", "labelled", "steps", "how this checkpoint was chosen"):
        assert word in text
    assert load_checkpoint(run / "best.pt")["step"] is None


def scores(folder, case, output):
    with open(folder / "evaluation" / "test_cases.csv", newline="") as file:
        return [
            float(row["dice"] or "nan")
            for row in csv.DictReader(file)
            if (row["case"], row["output"]) == (case, output)
        ]


def expected_scores(labels, mask, num_classes):
    records = case_metrics(labels.astype(np.uint8), mask, num_classes=num_classes, distances=False)
    return [float("nan") if record.dice is None else round(record.dice, 4) for record in records]


def test_a_converted_run_is_evaluated_as_any_other(run):
    assert run_command("evaluate", [str(run), "--device", "cpu"]) == 0
    method, config = load(run)
    images, masks = pictures(CLASSES)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        labels = predict_case(method.predict, image, image_size=256, batch_size=1, device="cpu")
        assert list(labels) == ["fusion", "unet", "vnet", "sam"]
        for output in labels:
            np.testing.assert_allclose(
                scores(run, f"test{i}", output), expected_scores(labels[output], mask, CLASSES), atol=1e-4
            )
    assert config.data.classes == COLOURS[:CLASSES] and config.published_code is True


def test_without_sam_the_students_answer_the_same(run, files, study, tmp_path, capsys):
    alone = tmp_path / "alone"
    assert convert(alone, files[0], "--experiment", study) == 0
    method, config = load(alone)
    whole, _ = load(run)
    assert method.outputs() == ("fusion", "unet", "vnet") and not config.uses_sam
    x = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        ours, theirs = method.predict(x), whole.predict(x)
        assert all(torch.equal(ours[name], theirs[name]) for name in method.outputs())
        assert torch.equal(method.inference_model()(x), theirs["fusion"])
    assert run_command("evaluate", [str(alone), "--split", "val", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert run_command("train", [str(alone / "config.yaml"), f"run={tmp_path / 'more'}", "train.device=cpu"]) == 78
    assert "converted from a published checkpoint, to be evaluated and used" in capsys.readouterr().err


def test_without_an_experiment_there_are_no_data(files, tmp_path, capsys):
    assert convert(tmp_path / "run", files[0]) == 0
    assert "to evaluate it, convert it with --experiment" in capsys.readouterr().out
    _, config = load(tmp_path / "run")
    assert config.data.classes == ["background", "class 1", "class 2"]
    assert run_command("evaluate", [str(tmp_path / "run"), "--device", "cpu"]) == 66
    assert "hint: This run was converted from a checkpoint without an experiment" in capsys.readouterr().err


def test_another_side_is_told_and_replaced(files, tmp_path, capsys):
    study = experiment(tmp_path / "study", *pictures(CLASSES), CLASSES, image_size=128)
    assert convert(tmp_path / "run", files[0], "--experiment", study) == 0
    assert re.search(r"128 px; the published\s+code works with 256 px only", capsys.readouterr().err)
    assert load(tmp_path / "run")[1].data.image_size == 256


def test_data_parallel_files_are_read(tmp_path, weights):
    torch.save({f"module.{key}": tensor for key, tensor in weights["subnets"].items()}, tmp_path / "students.pth")
    assert convert(tmp_path / "run", tmp_path / "students.pth") == 0


def changed(weights, part="subnets", **changes):
    """A part's weights with other tensors; None takes one away."""
    state = dict(weights[part])
    for key, tensor in changes.items():
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    return state


WRONG = {
    "another shape": (
        {"UNet.up1.up.weight": torch.zeros(256, 128, 3, 3)},
        r"fit the published networks:\n  1 of another shape: UNet\.up1\.up\.weight 256x128x3x3, expected 256x128x2x2",
    ),
    "missing": (
        {"UNet.up1.up.weight": None, "UNet.up1.up.bias": None},
        r"2 not in the file, by our name: students\.subnets\.unet\.network\.up\.0\.weight, "
        r"students\.subnets\.unet\.network\.up\.0\.bias",
    ),
    "unknown": ({"UNet.attention.weight": torch.zeros(1)}, r"1 unknown: UNet\.attention\.weight"),
    "too deep": ({"UNet.down9.maxpool_conv.1.conv_conv.0.bias": torch.zeros(1)}, r"1 unknown: UNet\.down9"),
    "classes": (
        {"VNet.out_conv.weight": torch.zeros(2, 16, 1, 1)},
        "disagrees with itself about the number of classes",
    ),
    "scalar": ({"UNet.out_conv.weight": torch.tensor(1.0)}, "should be a tensor of weights, found a single number"),
    "no V-Net": ({"VNet.out_conv.weight": None}, r"VNet\.out_conv\.weight should be .* found no such tensor"),
    "NaN": ({"VNet.out_conv.bias": torch.full((3,), float("nan"))}, r"holds NaN or infinity in VNet\.out_conv\.bias"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_do_not_fit(name, weights, tmp_path, capsys):
    changes, says = WRONG[name]
    torch.save(changed(weights, **changes), tmp_path / "students.pth")
    assert convert(tmp_path / "run", tmp_path / "students.pth") == 80
    said = capsys.readouterr().err
    assert re.search(says, said), said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", 80, "empty file"),
        (b"no checkpoint", 80, "cannot be read as a PyTorch checkpoint of tensors: it is no file of plain tensors"),
        (pickle.dumps(print, protocol=2), 80, "it is no file of plain tensors"),
        (None, 66, r"checkpoint SGDL_best_model\.pth not found"),
    ],
)
def test_files_that_are_no_checkpoint(content, code, says, tmp_path, capsys):
    path = tmp_path / "students.pth"
    if content is not None:
        path.write_bytes(content)
    assert convert(tmp_path / "run", path) == code
    said = capsys.readouterr().err
    assert re.search(says, said) and "Traceback" not in said, said


def test_the_wrong_file_is_told_where_it_belongs(files, run, tmp_path, capsys):
    assert convert(tmp_path / "run", files[1]) == 80
    assert "hint: It looks like sam_best_model.pth: give it as --sam." in capsys.readouterr().err
    assert convert(tmp_path / "run", files[0], "--sam", files[0]) == 80
    assert "hint: It looks like SGDL_best_model.pth: give it as --subnets." in capsys.readouterr().err
    torch.save({"image_encoder.pos_embed": torch.zeros(1)}, tmp_path / "official.pth")
    assert convert(tmp_path / "run", tmp_path / "official.pth") == 80
    assert "official SAM file: set sam.weights" in capsys.readouterr().err
    assert convert(tmp_path / "run", run / "best.pt") == 80
    assert "things that are not tensors" in capsys.readouterr().err


def test_a_sam_of_no_known_size(weights, files, tmp_path, capsys):
    blocks = {key: tensor for key, tensor in weights["sam"].items() if not key.startswith("image_encoder.blocks.3")}
    torch.save(blocks, tmp_path / "sam.pth")
    assert convert(tmp_path / "run", files[0], "--sam", tmp_path / "sam.pth") == 80
    assert re.search(r"96 wide and 3 blocks deep, none .* vit_tiny \(96 wide, 4 deep\)", capsys.readouterr().err)


def test_numbers_of_classes_that_disagree(weights, files, tmp_path, capsys):
    two = {key: tensor for key, tensor in weights["sam"].items() if not key.startswith("super_prompt.box_decoder.2")}
    torch.save(two, tmp_path / "sam.pth")
    assert convert(tmp_path / "run", files[0], "--sam", tmp_path / "sam.pth") == 80
    assert re.search(r"K = 3 classes, .*sam\.pth has K = 2: not of one run", capsys.readouterr().err)
    study = experiment(tmp_path / "study", *pictures(2), 2)
    assert convert(tmp_path / "run", files[0], "--experiment", study) == 78
    assert "the checkpoint has K = 3 classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(run, files, capsys):
    before = (run / "best.pt").read_bytes()
    assert convert(run, files[0]) == 73
    assert "holds a run already" in capsys.readouterr().err and (run / "best.pt").read_bytes() == before


def test_the_tool_is_the_command():
    assert 'run_command("convert"' in (ROOT / "tools" / "convert.py").read_text()


def test_round_trip_of_the_golden_checkpoint(tmp_path):
    """Published files -> convert -> evaluate and predict: the logits of the published code, and the scores of these."""
    folder = golden_folder()
    if folder is None:
        pytest.skip("the golden data of the published code are not here")
    golden = Golden(folder)
    pixels, masks = golden.arrays["images"][0, :2], golden.arrays["labels"][0, :2].astype(np.uint8)
    images = pixels.transpose(0, 2, 3, 1)
    study = experiment(tmp_path / "study", images, masks, golden.num_classes)
    students, sam = save_published(tmp_path, golden.weights)
    run = tmp_path / "run"
    assert convert(run, students, "--sam", sam, "--experiment", study) == 0

    method, _ = load(run)
    with torch.no_grad():
        logits = method.predict(torch.from_numpy(pixels).float() / 255)
    for name in ("fusion", "unet", "vnet", "sam"):
        assert np.abs(logits[name].numpy() - golden.arrays[f"eval_{name}_logits"]).max() <= EVAL, name

    assert run_command("evaluate", [str(run), "--device", "cpu"]) == 0
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        published = golden.arrays["eval_fusion_logits"][i].argmax(0)
        labels = predict_case(method.predict, image, image_size=golden.side, batch_size=1, device="cpu")["fusion"]
        assert (labels != published).mean() < 1e-3  # where two classes are equal to 1e-4, either may be called larger
        np.testing.assert_allclose(
            scores(run, f"test{i}", "fusion"), expected_scores(published, mask, golden.num_classes), atol=2e-3
        )

"""Official checkpoints: what is loaded, resized, refused, and how each refusal reads."""

import pytest
import torch
import torch.nn.functional as F
from sam_lab import OneTokenDecoder

from knowsam.errors import CheckpointError, NotFoundError
from knowsam.models.sam import LoadReport, SamMaskDecoder, build_sam, build_sam_guide, load_official


def synthesised(encoder="vit_tiny", seed: int = 0, image_size: int = 1024) -> dict[str, torch.Tensor]:
    """An "official" checkpoint: segment-anything's keys (those of our untuned parts, see below), all values random."""
    with torch.device("meta"):
        sam, _ = build_sam(encoder, image_size=image_size)
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(t.shape, generator=generator) for key, t in sam.state_dict().items()}


@pytest.fixture(scope="module")
def official():
    return synthesised()


@pytest.fixture
def save(tmp_path):
    def write(content, name="sam.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_official_keys_are_segment_anythings():
    from segment_anything.build_sam import build_sam_vit_b

    with torch.device("meta"):
        theirs = build_sam_vit_b().state_dict()
        sam, _ = build_sam("vit_b", image_size=1024)
    ours = sam.state_dict()
    assert len(theirs) == 314
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


@pytest.mark.parametrize(("encoder", "global_blocks"), [("vit_tiny", (1, 3)), ("vit_b", (2, 5, 8, 11))])
def test_every_tensor_is_its_source_or_the_declared_interpolation(encoder, global_blocks, save):
    source = synthesised(encoder)
    path = save(source)
    guide, report = build_sam_guide(encoder, image_size=256, num_classes=3, weights=path, tuning={"name": "adapter"})
    path.unlink()  # vit_b's is 375 MB
    assert report.missing == [] and report.unexpected == []
    assert {*report.loaded, *report.resized} == set(source)
    tables = {f"image_encoder.blocks.{i}.attn.rel_pos_{axis}" for i in global_blocks for axis in "hw"}
    assert set(report.resized) == tables | {"image_encoder.pos_embed"}
    assert all(k.startswith("prompt_generator.") or ".adapters." in k for k in report.declared_new)

    own = {key.removeprefix("sam."): tensor for key, tensor in guide.state_dict().items()}
    assert set(own) == set(source) | set(report.declared_new)
    for key, tensor in source.items():
        if key.endswith("pos_embed"):
            tensor = F.interpolate(
                tensor.permute(0, 3, 1, 2), size=(16, 16), mode="bicubic", align_corners=False
            ).permute(0, 2, 3, 1)
        elif key in tables:
            tensor = F.interpolate(tensor.t()[None], size=31, mode="linear")[0].t()
        assert torch.equal(own[key], tensor), key


def test_resized_relative_positions_are_get_rel_pos_es(official, save):
    from segment_anything.modeling.image_encoder import get_rel_pos

    sam, _ = build_sam("vit_tiny", image_size=128, weights=save(official))
    key = "image_encoder.blocks.1.attn.rel_pos_h"
    ours = get_rel_pos(8, 8, sam.state_dict()[key])
    assert torch.equal(ours, get_rel_pos(8, 8, official[key]))


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_wrapped_state_dict(official, save, wrapper):
    _, report = build_sam("vit_tiny", image_size=64, weights=save({wrapper: official, "epoch": 3}))
    assert len(report.loaded) + len(report.resized) == len(official)


def test_same_size_needs_no_resizing_and_parts_can_be_given(save):
    source = synthesised(image_size=64)
    sam, _ = build_sam("vit_tiny", image_size=64)
    names = ("image_encoder", "prompt_encoder", "mask_decoder")
    report = load_official({name: getattr(sam, name) for name in names}, save(source))
    assert report.resized == {} and report.declared_new == []
    assert all(torch.equal(sam.state_dict()[key], tensor) for key, tensor in source.items())


def test_a_tuned_sam_still_loads(official, save):
    """Hooks declare themselves, so the order of loading and tuning does not matter."""
    sam, _ = build_sam("vit_tiny", tuning="adapter", image_size=64)
    report = load_official(sam, save(official))
    assert report.declared_new and all(".adapters." in key for key in report.declared_new)
    assert {*report.loaded, *report.resized} == set(official)


def test_a_decoder_with_a_token_of_its_own_loads(official, save):
    sam, report = build_sam("vit_tiny", OneTokenDecoder, image_size=64, weights=save(official))
    assert report.declared_new == [
        "mask_decoder.lesion_token",
        "mask_decoder.lesion_head.weight",
        "mask_decoder.lesion_head.bias",
    ]
    assert {*report.loaded, *report.resized} == set(official) and "new here" in str(report)
    assert torch.equal(sam.mask_decoder.mask_tokens.weight, official["mask_decoder.mask_tokens.weight"])


class Undeclared(OneTokenDecoder):
    new_parameters = ("lesion_head",)


class Lean(SamMaskDecoder):
    """Does without scores."""

    unused_official = ("iou_prediction_head",)

    def __init__(self, *, embed_dim):
        super().__init__(embed_dim=embed_dim)
        del self.iou_prediction_head


def test_what_a_decoder_does_not_declare_stops(official, save):
    with pytest.raises(CheckpointError, match=r"1 missing: mask_decoder\.lesion_token"):
        build_sam("vit_tiny", Undeclared, image_size=64, weights=save(official))


def test_a_part_may_do_without_official_tensors(official, save):
    _, report = build_sam("vit_tiny", Lean, image_size=64, weights=save(official))
    assert len(report.omitted) == 6 and all("iou_prediction_head" in key for key in report.omitted)
    assert "left out" in str(report)


def test_report_reads_as_a_table(official, save):
    _, report = build_sam_guide("vit_tiny", image_size=64, weights=save(official), tuning={"name": "adapter"})
    text = str(report)
    assert "sam.pth" in text and "1x64x64x96 -> 1x4x4x96" in text and "127x32 -> 7x32" in text
    assert "image_encoder, mask_decoder, prompt_generator" in text
    assert len(text.splitlines()) == 6
    assert "random" in str(LoadReport())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("mask_decoder.transformer.layers.0.mlp.lin1.weight"), ["1 missing", "layers.0.mlp.lin1"]),
        (lambda s: s.update({"image_encoder.extra.weight": torch.zeros(1)}), ["1 unexpected", "image_encoder.extra"]),
        (
            lambda s: s.update({"mask_decoder.iou_token.weight": torch.zeros(1, 128)}),
            ["1 of another shape", "1x128 -> 1x64"],
        ),
        (
            lambda s: s.update({f"{k}x": s.pop(k) for k in list(s) if ".mlp.lin" in k}),
            ["24 missing", "24 unexpected", "(21 more)"],
        ),
    ],
)
def test_undeclared_differences_stop(official, save, change, words):
    state = dict(official)
    change(state)
    sam, _ = build_sam("vit_tiny", image_size=64)
    before = {key: tensor.clone() for key, tensor in sam.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_official(sam, save(state))
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(before[key], tensor) for key, tensor in sam.state_dict().items())


def test_another_size_is_named(save):
    with torch.device("meta"):
        sam, _ = build_sam("vit_b", image_size=64)
    key = "image_encoder.patch_embed.proj.weight"
    path = save({key: torch.zeros(1024, 3, 16, 16)})
    with pytest.raises(CheckpointError, match=r"looks like vit_l \(width 1024\); the model is vit_b \(width 768\)"):
        load_official(sam, path)
    tiny, _ = build_sam("vit_tiny", image_size=64)
    with pytest.raises(CheckpointError, match=r"looks like vit_l .* width 96, none of the official"):
        load_official(tiny, path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"PK\x03\x04 cut off", "cannot be read"),
        (b"just text", "cannot be read"),
    ],
)
def test_wrong_files(tmp_path, content, word):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=word):
        build_sam("vit_tiny", image_size=64, weights=path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"conv.weight": torch.zeros(1)}, "none of its 1 keys"),
        ({}, "empty state dict"),
        ([torch.zeros(1)], "holds a list"),
        ({"step": 3, "best": 0.5}, "not tensors: step, best"),
    ],
)
def test_wrong_contents(save, content, word):
    with pytest.raises(CheckpointError, match=word):
        build_sam("vit_tiny", image_size=64, weights=save(content))


def test_absent_file_and_folder(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.pth") as error:
        build_sam("vit_tiny", image_size=64, weights=tmp_path / "none.pth")
    assert all(name in error.value.hint for name in ("sam_vit_b_01ec64.pth", "sam_vit_l_0b3195", "sam_vit_h_4b8939"))
    with pytest.raises(CheckpointError, match="folder"):
        build_sam("vit_tiny", image_size=64, weights=tmp_path)

"""Ablations remove what they say, and nothing else."""

import json
import shutil

import pytest
import torch
from PIL import Image

import eval as eval_script
import tiny
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.media import read_image
from pvm.data.sources import load_conversations
from pvm.errors import UserError
from pvm.evaluation.ablations import (
    ABLATIONS,
    INTACT,
    Ablation,
    ChangedImages,
    ablations_of,
    check_ablations,
    generate_in_two_parts,
)
from pvm.evaluation.answering import answer
from pvm.evaluation.questions import Prompts
from training import PVM, run


ENDS = torch.tensor([7])
PREFIX = tiny.text(4)


def batch(seed: int, pixels: float = 1.0) -> dict[str, torch.Tensor]:
    """Two left-padded prompts whose images end 6 tokens before the end."""
    made = tiny.inputs(
        [tiny.image(seed=seed), tiny.text(5)], [PREFIX, tiny.image(4, 8, seed=seed + 1), tiny.text(5, 1)]
    )
    made["mm_token_type_ids"] = made["mm_token_type_ids"].int()
    return made


DISTANCE = 6  # the end of the image and five words


@torch.no_grad()
def split(model, own, other, kind: str, layer: int | None = None) -> torch.Tensor:
    return generate_in_two_parts(model, own, other, DISTANCE, Ablation(kind, layer), 12, ENDS)


def test_without_an_ablation_two_parts_are_generate(model):
    own = batch(0)
    plain = model.generate(**own, max_new_tokens=12, do_sample=False, eos_token_id=7, pad_token_id=7)
    plain = plain[:, own["input_ids"].shape[1] :]
    assert torch.equal(split(model, own, batch(5), "none"), plain)


def test_only_branches_attend_to_another_memory(model):
    own, other = batch(0), batch(5)
    intact = split(model, own, other, "none")
    assert torch.equal(split(model, own, own, "another_memory"), intact), "a row's own memory changes nothing"
    assert not torch.equal(split(model, own, other, "another_memory"), intact)
    tiny.set_gates(model, 0.0)
    assert torch.equal(split(model, own, other, "another_memory"), split(model, own, other, "none"))


def test_a_hidden_image(model):
    """With `blind`, answers do not depend on the image; with `hidden_image` they do, through the branches alone."""
    own, other = batch(0), batch(5)
    assert torch.equal(split(model, own, other, "blind"), split(model, other, own, "blind"))
    assert not torch.equal(split(model, own, other, "hidden_image"), split(model, other, own, "hidden_image"))
    assert not torch.equal(split(model, own, other, "hidden_image"), split(model, own, other, "none"))
    tiny.set_gates(model, 0.0)
    assert torch.equal(split(model, own, other, "hidden_image"), split(model, own, other, "blind"))


def test_an_answer_that_ends_early_is_filled_up(model):
    own = batch(0)
    answers = split(model, own, own, "none")
    (first,) = answers[:1, 2].tolist()
    ended = generate_in_two_parts(model, own, own, DISTANCE, INTACT, 12, torch.tensor([first]))
    row = ended[0].tolist()
    assert set(row[row.index(first) :]) == {first}


def test_which_ablations_apply(base, tmp_path):
    """Those of branches need branches, those of memory branches that read the image."""
    folders = {"stock": str(base)}
    for block in ("pvm", "parallel_mlp"):
        config = tiny.pvm_config(pvm_block=block)
        config.save_pretrained(tmp_path / block)
        folders[block] = str(tmp_path / block)
    of_images = ["blank_image", "another_image", "blind"]
    kinds = {name: {ablation.kind for ablation in ablations_of(path, [*ABLATIONS])} for name, path in folders.items()}
    assert kinds["stock"] == {"none", *of_images}
    assert kinds["parallel_mlp"] == {"none", "branch_off", "branch_alone", *of_images}
    assert kinds["pvm"] == {"none", *ABLATIONS}

    alone = ablations_of(folders["pvm"], ["branch_alone", "blank_image"])
    assert [(a.kind, a.layer, a.suffix) for a in alone] == [
        ("none", None, ""), ("branch_alone", 1, " - branch alone layer 1"), ("branch_alone", 2,
        " - branch alone layer 2"), ("blank_image", None, " - blank image")]  # fmt: skip
    kwargs = [ablation.model_kwargs for ablation in (INTACT, Ablation("branch_off"), alone[1], Ablation("skip"))]
    assert kwargs == [{}, {"use_pvm": False}, {"use_pvm": [1]}, {"image_kv_cache": "skip"}]

    check_ablations(["branch_off", "blind"], [folders["stock"], folders["parallel_mlp"]])
    with pytest.raises(UserError, match="branch_off: none of the models has PVM branches"):
        check_ablations(["branch_off"], [folders["stock"]])
    with pytest.raises(UserError, match="hidden_image: none of the models has PVM branches that read the image"):
        check_ablations(["hidden_image"], [folders["stock"], folders["parallel_mlp"]])


def test_changed_images(conversations):
    rows = load_conversations(str(conversations), "train")
    blank, other = ChangedImages(rows, blank=True), ChangedImages(rows, blank=False)
    for index in range(len(rows)):
        images = rows[index].images
        assert len(blank[index].images) == len(other[index].images) == len(images)
        assert blank[index].messages == other[index].messages == rows[index].messages
        if images:
            assert read_image(blank[index].images[0]).getcolors() == [(32 * 32, (128, 128, 128))]
            shown = read_image(other[index].images[0]).tobytes()
            assert shown == read_image(rows[other.others[index]].images[0]).tobytes()
            assert other.others[index] != index and shown != read_image(images[0]).tobytes()


def test_another_image_is_never_the_same_one(tmp_path):
    for k, name in enumerate("abc"):
        Image.new("RGB", (32, 32), (60 * k, 0, 0)).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "d.png")  # the same image under another name
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    rows = [{"images": [f"{name}.png"], "messages": turns} for name in "aaabbcd"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ChangedImages(load_conversations(str(tmp_path / "rows.jsonl"), "train"), blank=False).others == [
        3, 3, 3, 5, 5, 6, 3]  # fmt: skip


def test_images_that_no_other_row_can_replace(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    rows = [{"images": ["a.png"], "messages": turns}, {"images": [], "messages": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_conversations(str(tmp_path / "rows.jsonl"), "train")
    assert len(ChangedImages(rows, blank=True)) == 2
    with pytest.raises(UserError, match="row 0.*: no other row has 1 images that are all different"):
        ChangedImages(rows, blank=False)


def test_a_report_with_all_ablations(base, conversations, tmp_path):
    checkpoint = run(base, conversations, tmp_path / "run", *PVM, "--gate_learning_rate", "1")
    eval_script.main(
        ["--model", str(checkpoint), "--names", "PVM", "--dataset_name", str(conversations), "--dataset_split",
         "train", "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out"), "--ablations", *ABLATIONS]
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [model["name"] for model in report["models"]]
    assert names[0] == "PVM" and len(names) == 1 + len(ABLATIONS) + 2 and "PVM - branch alone layer 2" in names
    assert report["models"][1]["ablation"] == "branch_off"
    assert {(entry["of"], entry["minus"]) for entry in report["comparisons"]["all"]} == {
        (name, "PVM") for name in names[1:]
    }
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# PVM on ") and "**another memory**: branches attend to the images of another row" in text
    for name in names:
        assert (tmp_path / "out" / "predictions" / f"{name}.jsonl").exists() and name in text
    # With its branches off, the model answers like the base.
    loaded = load_checkpoint(str(base))
    rows = load_conversations(str(conversations), "train")
    texts = [
        given.prediction for given in answer(loaded, Prompts(rows, loaded.processor), [4] * len(rows), 32, "base")
    ]
    lines = (tmp_path / "out" / "predictions" / "PVM - branch off.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == texts

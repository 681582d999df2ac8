"""What is taken from a model while it answers is what is said, and nothing else."""

import json
import shutil

import pytest
import torch
from PIL import Image

import eval as eval_script
import tiny
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import read_image
from pvm.data.sources import load_conversations
from pvm.errors import UserError
from pvm.evaluation.ablations import KNOCK_OUTS, ChangedImages, KnockOut, generate_split, knock_outs
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
    return generate_split(model, own, other, DISTANCE, KnockOut(kind, layer), 12, ENDS)


def test_nothing_taken_is_generate(model):
    own = batch(0)
    plain = model.generate(**own, max_new_tokens=12, do_sample=False, eos_token_id=7, pad_token_id=7)
    plain = plain[:, own["input_ids"].shape[1] :]
    assert torch.equal(split(model, own, batch(5), "nothing"), plain)


def test_another_memory_is_read_by_the_branches_alone(model):
    own, other = batch(0), batch(5)
    intact = split(model, own, other, "nothing")
    assert torch.equal(split(model, own, own, "another_memory"), intact), "its own memory is no other"
    assert not torch.equal(split(model, own, other, "another_memory"), intact)
    tiny.set_gates(model, 0.0)
    assert torch.equal(split(model, own, other, "another_memory"), split(model, own, other, "nothing"))


def test_what_is_hidden_is_not_seen(model):
    """Blind, no answer depends on the image. Hidden, it does, through the branches and through nothing else."""
    own, other = batch(0), batch(5)
    assert torch.equal(split(model, own, other, "blind"), split(model, other, own, "blind"))
    assert not torch.equal(split(model, own, other, "hidden_image"), split(model, other, own, "hidden_image"))
    assert not torch.equal(split(model, own, other, "hidden_image"), split(model, own, other, "nothing"))
    tiny.set_gates(model, 0.0)
    assert torch.equal(split(model, own, other, "hidden_image"), split(model, own, other, "blind"))


def test_an_ended_answer_goes_on_with_its_end(model):
    own = batch(0)
    answers = split(model, own, own, "nothing")
    (first,) = answers[:1, 2].tolist()
    ended = generate_split(model, own, own, DISTANCE, KnockOut(), 12, torch.tensor([first]))
    row = ended[0].tolist()
    assert set(row[row.index(first) :]) == {first}


def test_the_switches():
    assert KnockOut().use_pvm is True and KnockOut("branch_off").use_pvm is False
    assert KnockOut("branch_alone", 3).use_pvm == [3] and KnockOut("branch_alone", 3).name == " - branch alone layer 3"
    chosen = knock_outs(["branch_alone", "blank_image"], [1, 2], reads_images=True)
    assert [(k.kind, k.layer) for k in chosen] == [
        ("nothing", None), ("branch_alone", 1), ("branch_alone", 2), ("blank_image", None)]  # fmt: skip
    # What a checkpoint has not cannot be taken from it: no branches, or branches without a memory.
    assert [k.kind for k in knock_outs([*KNOCK_OUTS], [], reads_images=False)] == [
        "nothing", "blank_image", "another_image", "blind"]  # fmt: skip
    assert [k.kind for k in knock_outs([*KNOCK_OUTS], [1], reads_images=False)] == [
        "nothing", "branch_off", "branch_alone", "blank_image", "another_image", "blind"]  # fmt: skip


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


def test_rows_about_the_same_image_are_not_shown_it_again(tmp_path):
    for k, name in enumerate("abc"):
        Image.new("RGB", (32, 32), (60 * k, 0, 0)).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "d.png")  # the same picture under another name
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    rows = [{"images": [f"{name}.png"], "messages": turns} for name in "aaabbcd"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ChangedImages(load_conversations(str(tmp_path / "rows.jsonl"), "train"), blank=False).others == [
        3, 3, 3, 5, 5, 6, 3]  # fmt: skip


def test_an_image_that_no_other_row_could_replace(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    rows = [{"images": ["a.png"], "messages": turns}, {"images": [], "messages": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = load_conversations(str(tmp_path / "rows.jsonl"), "train")
    assert len(ChangedImages(rows, blank=True)) == 2
    with pytest.raises(UserError, match="row 0: no other row has 1 images, all of them others"):
        ChangedImages(rows, blank=False)


def test_a_report_with_every_knock_out(base, conversations, tmp_path):
    checkpoint = run(base, conversations, tmp_path / "run", *PVM, "--gate_learning_rate", "1")
    eval_script.main(
        ["--model", str(checkpoint), "--names", "PVM", "--dataset_name", str(conversations), "--dataset_split",
         "train", "--max_new_tokens", "4", "--output_dir", str(tmp_path / "out"), "--knock_outs", *KNOCK_OUTS]
    )  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [model["name"] for model in report["models"]]
    assert names[0] == "PVM" and len(names) == 1 + len(KNOCK_OUTS) + 2 and "PVM - branch alone layer 2" in names
    assert report["models"][1]["knock_out"] == "branch_off"
    assert {(entry["of"], entry["minus"]) for entry in report["comparisons"]["all"]} == {
        (name, "PVM") for name in names[1:]
    }
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# PVM on ") and "**another memory**: self-attention sees the row's own images" in text
    for name in names:
        assert (tmp_path / "out" / "predictions" / f"{name}.jsonl").exists() and name in text
    # Off, the branches say what the base says.
    loaded = load_checkpoint(str(base))
    rows = load_conversations(str(conversations), "train")
    texts = [
        given.prediction for given in answer(loaded, Prompts(rows, loaded.processor), [4] * len(rows), 32, "base")
    ]
    lines = (tmp_path / "out" / "predictions" / "PVM - branch off.jsonl").read_text().splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == texts

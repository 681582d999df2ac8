"""pvm filter: which rows of data sets are kept, what is said about the others, and what is written."""

import json
import re
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import DatasetCard
from PIL import Image

import grpo
import published
import train
from pvm import filter as filter_script
from pvm.checkpoints.loading import load_checkpoint
from pvm.data.encoding import ConversationCollator, ConversationDataset
from pvm.data.sources import Source, load_conversations
from pvm.errors import UserError
from pvm.filtering.card import licence_of
from pvm.filtering.gray import answer_log_probabilities
from pvm.filtering.run import file_names
from training import ROOT


BACKBONE = ROOT / "assets" / "digits-backbone"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests do not share a cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def run(output_dir: Path, *flags) -> list[dict]:
    """Filter; what of the rows was removed."""
    model = () if "--model_name_or_path" in flags else ("--model_name_or_path", BACKBONE)
    filter_script.main([*map(str, (*model, "--output_dir", output_dir, *flags))])
    listed = output_dir / "removed_rows.jsonl"
    return [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []


def write_rows(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    for index in range(3):
        (folder / f"{index}.png").write_bytes(published.png(index))
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


def question(answer: str = "3", image: str | None = "0.png", text: str = "How many?", **columns) -> dict:
    return {"question": text, "answer": answer, **({"image": image} if image else {}), **columns}


# Rules


def test_each_rule_counts_and_names_what_it_removes(tmp_path, capsys):
    rows = [
        question(id=1),
        question("", id=2),  # empty
        question(image="none.png", id=3),
        question(image=None, id=4),
        question("The picture shows a dog.", id=5),
        question(text="How many? " * 50, id=6),
        question("4", id=1),
        question("B", id=1),  # the third of its id
        question("0.5", id="1"),
        question("(C)", id=7, colour="ré\nd"),
    ]
    file = write_rows(tmp_path, rows)
    removed = run(
        tmp_path / "out", "--dataset_name", file, "--max_length", "60", "--max_per_id", "2", "--max_skipped", "0.2"
    )
    assert [(row["row"], row["rule"]) for row in removed] == [
        (1, "unusable"),
        (2, "unusable"),
        (3, "no image"),
        (4, "not verifiable"),
        (5, "too long"),
        (7, "same id"),
        (8, "same id"),
    ]
    assert [row["line"] for row in removed] == [row["row"] + 1 for row in removed]
    parts = (
        "`answer` is empty",
        "none.png does not exist",
        "no image",
        "'The picture shows a dog.'",
        "--max_length 60",
        "3 of id 1",
    )
    assert all(part in row["problem"] for part, row in zip(parts, removed))

    lines = file.read_text().splitlines()
    assert (tmp_path / "out/data/rows.jsonl").read_text().splitlines() == [lines[0], lines[6], lines[9]]
    card = DatasetCard.load(tmp_path / "out/README.md")
    table = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|$", card.text, re.MULTILINE))
    assert table == {
        "rows": "10", "unusable": "2", "no image": "1", "not verifiable": "1", "too long": "1", "same id": "2",
        "not visual": "0", "kept": "3",
    }  # fmt: skip
    assert card.data.license == "unknown" and "| unknown |" in card.text and "NON-COMMERCIAL" not in card.text
    printed = capsys.readouterr().out
    assert all(f"│ {rule:<14} │ {count:>4} │" in printed for rule, count in table.items())


def test_rows_without_an_id_are_the_same_by_question_and_images(tmp_path):
    rows = [
        question("1"),
        question("2"),
        question(image="1.png"),
        question(text="Which?"),
        question("4", id="a"),
        question("4", id=None),
    ]
    removed = run(tmp_path / "out", "--dataset_name", write_rows(tmp_path, rows), "--max_per_id", "1")
    assert [(row["row"], row["rule"]) for row in removed] == [(1, "same id"), (5, "same id")]


@pytest.mark.parametrize(
    ("match", "kept"),
    [(["exact"], 5), (["choice"], 1), (["number"], 1), (["math"], 3), ([], 3), (["number", "choice"], 2)],
)
def test_what_can_be_verified_is_chosen(match, kept, tmp_path):
    rows = [question(answer) for answer in ("C", "12", r"\frac{x}{2}", "The picture shows a dog.", "yes")]
    flags = ["--match", *match] if match else []
    assert len(run(tmp_path / "out", "--dataset_name", write_rows(tmp_path, rows), *flags)) == 5 - kept


# Published sets


SETS = {
    "OpenMMReasoner-SFT-874K": (published.openmmreasoner_sft, "llava_cot", "train", "sft_image", [0, 2, 4]),
    "OpenMMReasoner-RL-74K": (published.openmmreasoner_rl, "virl39k", "train", None, [1, 2, 4, 5]),
    "ViRL39K": (published.virl39k, "39Krelease.parquet", "train", "images.zip", [0, 1, 2, 3, 4, 5]),
    "MMK12": (published.mmk12, "", "test", None, [0, 1, 2, 3]),
    "ThinkLite-VL-hard-11k": (published.thinklite, "", "train", None, [0, 1, 2, 3]),
    "We-Math2.0-Pro": (published.wemath_pro, "", "pro", None, [*range(1, 16, 2), 16, 17, 18, 19]),
}


@pytest.mark.parametrize("name", SETS)
def test_rows_of_published_sets_stay_as_they_are(name, tmp_path, capsys):
    build, path, split, root, kept = SETS[name]
    folder = tmp_path / name
    folder.mkdir()
    build(folder)
    before = load_conversations(str(folder / path), split, image_root=root and str(folder / root))
    flags = ["--dataset_name", folder / path, "--dataset_split", split, "--max_per_id", "1", "--max_skipped", "0.4"]
    removed = run(tmp_path / "out", *flags, *(["--image_root", folder / root] if root else []))
    assert sorted({*range(len(before))} - {row["row"] for row in removed}) == kept

    (file,) = (tmp_path / "out/data").iterdir()
    assert pq.read_table(file).equals(before.dataset.with_format("arrow").select(kept)[:].combine_chunks())
    train_flags = capsys.readouterr().out.split("Train on them with\n")[1].split()
    assert train_flags[:2] == ["--dataset_name", str(file)]
    after = load_conversations(
        str(file), "train", image_root=train_flags[3] if "--image_root" in train_flags else None
    )
    assert [after[k] for k in range(len(after))] == [before[index] for index in kept]
    assert ("--image_root" in train_flags) is (root is not None)
    train.main(
        ["--model_name_or_path", str(BACKBONE), "--output_dir", str(tmp_path / "run"), "--dry_run", "true",
         "--use_cpu", "true", "--disable_tqdm", "true", *train_flags]
    )  # fmt: skip

    card = DatasetCard.load(tmp_path / "out/README.md")
    is_free = name not in ("OpenMMReasoner-SFT-874K", "We-Math2.0-Pro")
    assert ("NON-COMMERCIAL" in card.text) is not is_free and (card.data.license == "cc-by-nc-4.0") is not is_free
    loaded = datasets.load_dataset(str(tmp_path / "out"), card.data.configs[0]["config_name"], split="train")
    assert len(loaded) == len(kept)
    assert str(tmp_path) not in card.text


def test_several_sets_are_one_result(tmp_path, capsys):
    """One of them in JSON, one without a row that is left; both stages read what is written."""
    virl = published.virl39k(tmp_path)
    own = write_rows(tmp_path, [question("A"), question("B", image="1.png")], "own.jsonl")
    none = write_rows(tmp_path, [question("A", image=None)], "none.jsonl")
    names = (virl / "39Krelease.parquet", own, none)
    roots = (virl / "images.zip", tmp_path, tmp_path)
    run(tmp_path / "out", "--dataset_name", *names, "--image_root", *roots, "--match", "choice")
    printed = capsys.readouterr().out
    assert re.search(r"│ rows +│ +6 │ +2 │ +1 │ +9 │", printed) and re.search(
        r"│ kept +│ +6 │ +2 │ +0 │ +8 │", printed
    )
    assert sorted(file.name for file in (tmp_path / "out/data").iterdir()) == ["39Krelease.parquet", "own.jsonl"]
    flags = printed.split("Train on them with\n")[1].split()
    common = ["--model_name_or_path", str(BACKBONE), "--output_dir", str(tmp_path / "run"), "--dry_run", "true",
              "--use_cpu", "true", "--disable_tqdm", "true", *flags]  # fmt: skip
    train.main(common)
    grpo.main([*common, "--trains", "lora", "--match", "choice", "--max_completion_length", "5"])
    assert capsys.readouterr().out.count("A training would continue from here.") == 2


# Gray images


def test_log_probabilities_of_answers(conversations):
    """Of a padded batch, as the logits of each row alone say."""
    checkpoint = load_checkpoint(str(BACKBONE))
    rows = ConversationDataset(load_conversations(str(conversations), "train"), checkpoint.processor, train_on="last")
    examples = [rows[0], rows[5], rows[6]]  # the second has no image and is shorter
    tokens, found = answer_log_probabilities(checkpoint.model, ConversationCollator(0)(examples))
    for example, count, total in zip(examples, tokens, found):
        inputs = {key: value[None] if value.ndim == 1 else value for key, value in example.items()}
        labels = inputs.pop("labels")
        with torch.no_grad():
            log_p = checkpoint.model(**inputs).logits[0, :-1].log_softmax(-1)
        of_answer = labels[0, 1:] >= 0
        expected = log_p[of_answer].gather(1, labels[0, 1:][of_answer, None]).sum()
        assert count == of_answer.sum() == 2
        assert total == pytest.approx(float(expected), abs=1e-4)


@pytest.fixture
def colours(tmp_path) -> Path:
    """Three of six pictures are as gray as can be."""
    for index in range(6):
        colour = (128, 128, 128) if index % 2 else (40 * index, 200, 20)
        Image.new("RGB", (32, 32 + 32 * (index // 4)), colour).save(tmp_path / f"{index}.png")
    rows = [question(str(index), f"{index}.png", "Cell first alpha?") for index in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


def test_answers_that_do_not_need_their_images(colours, tmp_path, monkeypatch):
    """An image that is gray already changes nothing; measurements are kept, resumed and reused."""
    out, flags = tmp_path / "out", ("--dataset_name", colours, "--batch_size", "2")
    run(out, *flags, "--min_drop", "-1000")
    (journal,) = (out / "gray_images").iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    measured = {entry["row"]: entry for entry in map(json.loads, lines)}
    drops = [(measured[row]["log_probability"] - measured[row]["gray"]) / measured[row]["tokens"] for row in range(6)]
    assert drops[1] == drops[3] == drops[5] == 0 and all(drops[row] != 0 for row in (0, 2, 4))
    assert (
        "| rows | 0.000" not in (out / "README.md").read_text()
    )  # the least drop is negative, or the first one not 0

    # Another threshold: nothing is measured again.
    monkeypatch.setattr("pvm.filtering.gray.answer_log_probabilities", None)
    threshold = sorted(drops)[3]
    removed = run(out, *flags, "--min_drop", repr(threshold), "--overwrite", "true")
    assert [row["row"] for row in removed] == [row for row in range(6) if drops[row] < threshold]
    assert {row["rule"] for row in removed} == {"not visual"} and "nats per token" in removed[0]["problem"]
    monkeypatch.undo()

    # After an interruption: the lines of whole batches stay, a batch that is cut off is measured again.
    journal.write_text("".join(lines[:3]) + lines[3][:20])
    run(out, *flags, "--min_drop", "0", "--overwrite", "true")
    assert sorted(journal.read_text().splitlines(keepends=True)) == sorted([*lines, lines[2]])
    assert journal.read_text().startswith("".join(lines[:3]))


def test_other_models_and_images_are_measured_anew(colours, base, tmp_path):
    flags = ("--dataset_name", colours, "--min_drop", "-1000", "--overwrite", "true")
    run(tmp_path / "out", *flags)
    run(tmp_path / "out", *flags, "--model_name_or_path", base)
    published_png = published.png(3)
    (tmp_path / "1.png").write_bytes(published_png)
    run(tmp_path / "out", *flags, "--overwrite_cache", "true")
    assert len(list((tmp_path / "out/gray_images").iterdir())) == 3


# What is refused, and what stays


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([question(), question(image="a/b.png")], (), r"1 of 2 .* lists them; .*\n.*row 1 \(line 2\): the image"),
        ([question(image=None), question("yes")], (), "No row is left .1: it has no image; 1: its answer is none"),
        ([{"q": "How many?", "a": "3"}], (), "has the columns q, a, which match no supported form"),
        ([question()], ("--dtype", "float32"), "--dtype does nothing without --min_drop"),
        ([question()], ("--streaming", "true"), "--streaming is for `pvm train`"),
        ([question()], ("--image_root", "nowhere"), "--image_root nowhere: no such folder"),
        ([question()], ("--model_name_or_path", "./nowhere"), "nowhere"),
        ([question()], ("--dataset_split", "test"), "split `test`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(rows, flags, message, tmp_path):
    file = write_rows(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", "--dataset_name", file, *flags)
    assert not (tmp_path / "out/README.md").exists() and not (tmp_path / "out/data").exists()


def test_invalid_numbers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--dataset_name", "rows.jsonl", "--max_per_id", "0")
    assert "--max_per_id 0: it must be at least 1." in capsys.readouterr().err


def test_results_are_not_overwritten(tmp_path):
    file, out = write_rows(tmp_path, [question()]), tmp_path / "out"
    run(out, "--dataset_name", file)
    before = (out / "README.md").read_text()
    with pytest.raises(UserError, match="README.md exists already"):
        run(out, "--dataset_name", file)
    other = write_rows(tmp_path, [question()], "other.jsonl")
    with pytest.raises(UserError, match="rows.jsonl is not of these data sets"):
        run(out, "--dataset_name", other, "--overwrite", "true")
    listed = (out / "removed_rows.jsonl").read_text()
    dry_run = ("--dataset_name", file, "--image_root", tmp_path, "--match", "choice", "--dry_run", "true")
    with pytest.raises(UserError, match="No row is left"):
        run(out, *dry_run)
    assert (out / "README.md").read_text() == before and (out / "removed_rows.jsonl").read_text() == listed
    write_rows(tmp_path, [question()], "README.md")
    with pytest.raises(UserError, match="README.md is not a result of `pvm filter`"):
        run(tmp_path, "--dataset_name", file, "--overwrite", "true")
    run(out, "--dataset_name", file, "--overwrite", "true", "--match", "exact", "--max_samples", "9")
    assert "`--max_samples 9`, `--match exact`" in (out / "README.md").read_text()


def test_an_interrupted_result_is_finished_by_the_same_command(tmp_path, monkeypatch):
    file, out = write_rows(tmp_path, [question()]), tmp_path / "out"
    run(out, "--dataset_name", file)
    before = (out / "README.md").read_text()

    def interrupt(*args):
        (out / "data/.rows.jsonl.tmp").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("pvm.filtering.run.has_image_files", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--dataset_name", file, "--overwrite", "true")
    assert not (out / "README.md").exists() and (out / "data/rows.jsonl").exists()
    monkeypatch.undo()
    run(out, "--dataset_name", file)
    assert (out / "README.md").read_text() == before


def test_a_dry_run_lists_what_it_would_remove(tmp_path, capsys):
    file = write_rows(tmp_path, [question(), question(image=None)])
    flags = ("--dataset_name", file, "--dry_run", "true", "--min_drop", "0.1")
    assert run(tmp_path / "out", *flags) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dry_run.jsonl"]
    assert json.loads((tmp_path / "out/dry_run.jsonl").read_text())["rule"] == "no image"
    assert "--min_drop was not applied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "config", "licence"),
    [
        ("OpenMMReasoner/OpenMMReasoner-SFT-874K", "llava_cot", "cc-by-nc-4.0"),
        ("OpenMMReasoner/OpenMMReasoner-RL-74K", "wemath_pro", "cc-by-nc-4.0"),
        ("OpenMMReasoner/OpenMMReasoner-RL-74K", "virl39k", "apache-2.0 or mit"),
        ("copies/OpenMMReasoner-RL-74K/wemath_standard", None, "cc-by-nc-4.0"),
        ("TIGER-Lab/ViRL39K", None, "mit"),
        ("data/ViRL39K/39Krelease.parquet", None, "mit"),
        ("data/MMK12.parquet", None, "apache-2.0 or mit"),
        ("my_rows.jsonl", None, "unknown"),
    ],
)
def test_licences(name, config, licence):
    assert licence_of(name, config) == licence


def test_files_have_different_names():
    sources = [
        Source("", name, config, split, None, None)
        for name, config, split in [
            ("FanqingM/MMK12", None, "train"),
            ("FanqingM/MMK12", None, "test"),
            ("FanqingM/MMK12", "all", "train[:10%]"),
            ("others/MMK12", None, "train"),
            ("a/..", None, "train"),
        ]
    ]
    names = file_names(sources)
    assert names[:4] == ["MMK12", "MMK12-test", "MMK12-all-train-10", "MMK12+2"] and len(set(names)) == 5

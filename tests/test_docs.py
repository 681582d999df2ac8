"""What the documentation shows is run as it stands there."""

import re
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor

from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from modeling_qwen3vl_pvm import Qwen3VLPVMForConditionalGeneration
from tiny import set_gates
from training import PVM, run


ROOT = Path(__file__).parent.parent
BACKBONE = ROOT / "assets" / "digits-backbone"


def code(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_a_chat_on_one_cache():
    processor = AutoProcessor.from_pretrained(BACKBONE)
    config = Qwen3VLPVMConfig.from_pretrained(BACKBONE)
    config.text_config.pvm_hidden_size = 32
    model = Qwen3VLPVMForConditionalGeneration.from_pretrained(BACKBONE, config=config).eval()
    set_gates(model, 0.5)
    images = [Image.effect_noise(size, 80).convert("RGB") for size in [(32, 32), (48, 32)]]
    evict, chat = code("docs/generation.md")
    exec(evict, {"model": model, "inputs": {"input_ids": torch.tensor([[5, 6]]), "max_new_tokens": 2}})
    names = {"model": model, "processor": processor, "first_image": images[0], "second_image": images[1]}
    exec(chat, names)

    tokens = names["tokens"]
    text = processor.decode(tokens[0])
    assert text.count("<|im_start|>") == 6 and text.endswith("<|im_end|>\n"), "three questions, three answers"
    text = text.removesuffix("\n")
    tokens = tokens[:, :-1]
    visual = tokens == config.image_token_id
    inputs = processor.image_processor(images=images, return_tensors="pt")
    assert int(visual.sum()) == int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    with torch.no_grad():
        plain = model(input_ids=tokens, mm_token_type_ids=visual.int(), **inputs).logits
    answer = text.rpartition("<|im_start|>assistant\n")[2]
    length = len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
    assert plain[0, -length - 1 : -1].argmax(-1).tolist() == tokens[0, -length:].tolist()


def test_the_readme(conversations, tmp_path, capsys, monkeypatch):
    """Its Python, on a checkpoint like the one that it trains."""
    monkeypatch.chdir(tmp_path)
    run(BACKBONE, conversations, tmp_path / "runs" / "qwen3-vl-8b-pvm", *PVM)
    Image.effect_noise((32, 32), 80).convert("RGB").save("cat.png")
    (example,) = code("README.md")
    exec(example, {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["True", "False"]

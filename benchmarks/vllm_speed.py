"""
Speed in vLLM with branches, as a ratio to stock vLLM with the same shape in the same run. On two CPU cores, small:

    VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind .venv-vllm/bin/python -m benchmarks.vllm_speed \\
        --batch_sizes 1 8 --visual_tokens 64 --new_tokens 32 --runs 3

and on a GPU, with CUDA graphs, which vLLM makes by itself:

    python -m benchmarks.vllm_speed --shape 8B --device cuda --dtype bfloat16 --visual_tokens 1024 --new_tokens 512

Two engines, each in a process of its own, answer the same prompts in turn: an image of `--visual_tokens`, 64 tokens of
text, `--new_tokens` to write. Time to first token is a run that writes one token (processing of the image included);
the time of a token is the difference of the two runs by the number of steps. Weights are random, which does not matter
for the time; the vision tower is a small one. Prints medians, and quartiles of the ratios of neighbouring runs.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import vllm
from PIL import Image
from tqdm import tqdm
from transformers import AutoProcessor, Qwen3VLConfig

from benchmarks.common import ROPE, SHAPES, interleaved, milliseconds, parser, print_table, row_of_ratios
from configuration_qwen3vl_pvm import Qwen3VLPVMConfig
from pvm.vllm.plugin import ARCHITECTURE


PROCESSOR = Path(__file__).parent.parent / "assets" / "digits-backbone"
TOKEN_PIXELS = 8  # height and width of what its processor makes one visual token
PROMPT_TOKENS = 64  # after the image


def save_configs(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Folders with configs and the demo's processor, of the stock model and of one with branches."""
    shape, processor = SHAPES[args.shape], AutoProcessor.from_pretrained(PROCESSOR)
    most_pixels = TOKEN_PIXELS**2 * args.visual_tokens
    processor.image_processor.size = {"shortest_edge": TOKEN_PIXELS**2, "longest_edge": most_pixels}
    tokens = Qwen3VLConfig.from_pretrained(PROCESSOR)
    stock = Qwen3VLConfig(
        text_config={**shape["text_config"], "rope_parameters": ROPE, "dtype": args.dtype},
        vision_config={
            **{"depth": 2, "hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "patch_size": 4},
            **{"out_hidden_size": shape["text_config"]["hidden_size"], "deepstack_visual_indexes": [0, 1]},
        },
        tie_word_embeddings=shape["tie_word_embeddings"],
        architectures=["Qwen3VLForConditionalGeneration"],
        **{name: getattr(tokens, name) for name in vars(tokens) if name.endswith("_token_id")},
    )
    branched = Qwen3VLPVMConfig.from_stock(stock, pvm_hidden_size=shape.get("pvm_hidden_size", 512))
    branched.architectures = [ARCHITECTURE]
    folders = {"stock": folder / "stock", "branched": folder / "branched"}
    for config, place in zip((stock, branched), folders.values()):
        config.save_pretrained(place)
        processor.save_pretrained(place)
    return folders


def generate(engine: "vllm.LLM", images: list[Image.Image], new_tokens: int) -> None:
    prompt = f"<|vision_start|><|image_pad|><|vision_end|>{'apple ' * PROMPT_TOKENS}"
    requests = [{"prompt": prompt, "multi_modal_data": {"image": image}} for image in images]
    settings = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    engine.generate(requests, settings, use_tqdm=False)


def main() -> None:
    command_line = parser(__doc__)
    command_line.add_argument("--visual_tokens", type=int, default=256, help="of each image, a square number")
    command_line.add_argument("--new_tokens", type=int, default=64)
    command_line.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    command_line.add_argument("--runs", type=int, default=6, help="of each model, for each batch size")
    args = command_line.parse_args()
    side = TOKEN_PIXELS * round(args.visual_tokens**0.5)
    rng = np.random.default_rng(0)
    rows = []
    with TemporaryDirectory() as folder:
        engines = {
            name: vllm.LLM(
                str(place),
                load_format="dummy",
                dtype=args.dtype,
                max_model_len=args.visual_tokens + 2 * PROMPT_TOKENS + args.new_tokens,
                max_num_seqs=max(args.batch_sizes),
                limit_mm_per_prompt={"image": 1, "video": 0},
                enable_prefix_caching=False,
                gpu_memory_utilization=0.45,
            )
            for name, place in save_configs(args, Path(folder)).items()
        }
        for batch_size in tqdm(args.batch_sizes, unit="batch size"):

            def run(name: str, new_tokens: int, batch_size: int = batch_size) -> float:
                # New images in every run, because vLLM keeps the embeddings of those that it has seen.
                pixels = rng.integers(256, size=(batch_size, side, side, 3), dtype=np.uint8)
                images = [Image.fromarray(image) for image in pixels]
                return milliseconds(lambda: generate(engines[name], images, new_tokens), "cpu")

            first = interleaved(lambda name, run=run: run(name, 1), 1, args.runs)
            whole = interleaved(lambda name, run=run: run(name, args.new_tokens), 1, args.runs)
            steps = args.new_tokens - 1
            each = [tuple((b - a) / steps for a, b in zip(*pair)) for pair in zip(first, whole)]
            rows.append(row_of_ratios([str(batch_size), "first token"], first))
            rows.append(row_of_ratios([str(batch_size), "each token"], each))
    print(f"vLLM {vllm.__version__}, shape {args.shape}, {args.dtype}, {args.visual_tokens} visual tokens\n")
    headings = ["requests", "", "stock, ms", "PVM, ms", "ratio", "quartiles"]
    print_table("vLLM", headings, rows)


if __name__ == "__main__":
    main()

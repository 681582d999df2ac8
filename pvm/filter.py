"""
Choose, from published data sets, the rows whose answers can be verified and need their images.

    pvm filter --model_name_or_path Qwen/Qwen3-VL-8B-Instruct --dataset_name OpenMMReasoner/OpenMMReasoner-SFT-874K \\
        --dataset_config llava_cot --image_root sft_image --output_dir data/visual --max_length 8192 --max_per_id 2

A row must be usable, have an image and an answer that one of `--match` can verify, be no longer than `--max_length`,
and be among the first `--max_per_id` of its id. `--min_drop 0.1` also asks the model: with gray images, the answer
must lose that much of its log-probability. What is measured is kept: the same command resumes, and with another
`--min_drop` and `--overwrite true` nothing is measured again.

The rows are written as they were published, for `pvm train` and `pvm grpo` to read, with a data card: what was removed
and why, and the licences. removed_rows.jsonl lists every removed row. `--dry_run true` writes only such a list.
"""

from pathlib import Path

from pvm.arguments import parse_arguments
from pvm.data.sources import DataArguments
from pvm.files import locked
from pvm.filtering.rules import FilterArguments, check_arguments
from pvm.filtering.run import filter_rows
from pvm.terminal import Terminal


def main(arguments: list[str] | None = None) -> None:
    filter_args, data_args = parse_arguments((FilterArguments, DataArguments), __doc__, arguments, "pvm filter")
    check_arguments(filter_args, data_args)
    with locked(Path(filter_args.output_dir)):
        filter_rows(filter_args, data_args, Terminal())

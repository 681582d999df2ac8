"""Which rows are kept, and why the others are not, as far as no model is needed to tell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from datasets import Dataset
from tqdm import tqdm

from pvm.arguments import refuse_flags
from pvm.data.encoding import content_digest
from pvm.data.forms import message_text, to_prompt
from pvm.data.sources import Conversations, DataArguments
from pvm.errors import UserError
from pvm.evaluation.matching import MATCHES, check_reference


# In the order in which they are applied: a removed row counts for the first that removes it.
RULES = {
    "unusable": "a training would skip it",
    "no image": "it has no image",
    "not verifiable": "its answer is none of --match",
    "too long": "it has more tokens than --max_length",
    "same id": "--max_per_id other rows of its id come before it",
    "not visual": "with a gray image its answer is almost as likely (--min_drop)",
}
ID_COLUMNS = ("id", "qid", "question_id")  # the first that a data set has counts
OF_MODEL = ("batch_size", "dtype")


@dataclass(kw_only=True)
class FilterArguments:
    """Which rows are kept. Without a flag here or below, its rule is not applied."""

    model_name_or_path: str = field(
        metadata={
            "help": "Checkpoint, a folder or a Hub name. Its processor counts tokens, --min_drop loads its model."
        }
    )
    output_dir: str = field(metadata={"help": "Where the rows and their data card are written."})
    match: list[str] = field(
        default_factory=lambda: ["choice", "number", "math"],
        metadata={
            "help": "Keep answers that can be verified by one of these rules of `pvm eval`: an option, one number, a "
            "mathematical object; `exact` keeps any text. For `pvm grpo`, give the one it will use.",
            "choices": tuple(MATCHES),
        },
    )
    max_per_id: int | None = field(
        default=None,
        metadata={
            "help": f"Keep the first rows of each id, this many. The id is in the first of the columns "
            f"{', '.join(ID_COLUMNS)}; rows without have the same if their questions and images are the same."
        },
    )
    min_drop: float | None = field(
        default=None,
        metadata={
            "help": "Keep answers (last turns, thoughts included) whose log-probability drops by at least this much, "
            "in nats per token, when all images are gray. Start with 0, look at the quantiles, and choose: "
            "measurements are kept."
        },
    )
    batch_size: int = field(default=8, metadata={"help": "Rows that the model reads together."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the model; `auto` is the checkpoint's.",
            "choices": ("auto", "float32", "bfloat16", "float16"),
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an earlier result in output_dir."})

    def __post_init__(self):
        """
        Raises:
            UserError: for values that are invalid or would have no effect.
        """
        for flag, value in (("max_per_id", self.max_per_id), ("batch_size", self.batch_size)):
            if value is not None and value < 1:
                raise UserError(f"--{flag} {value}: it must be at least 1.")


def check_arguments(arguments: FilterArguments, data_args: DataArguments) -> None:
    """
    Raises:
        UserError: for flags that would have no effect, or if math-verify is needed and not installed.
    """
    mixing = ("dataset_weights", "stopping_strategy", "streaming", "shuffle_buffer_size")
    used = [flag.name for flag in fields(data_args) if flag.name not in mixing]
    refuse_flags(data_args, used, "is for `pvm train`")
    if arguments.min_drop is None:
        used = [flag.name for flag in fields(arguments) if flag.name not in OF_MODEL]
        refuse_flags(arguments, used, "does nothing without --min_drop")
    if "math" in arguments.match:
        check_reference("math", "1")


class Removal(NamedTuple):
    """`rule` is a key of `RULES`; `problem` is what of the row breaks it."""

    rule: str
    problem: str


def verified_by(answer: str, kinds: Sequence[str]) -> str | None:
    """The first of the kinds, see [`check_reference`], by which other answers can be compared with this one."""
    for kind in kinds:
        try:
            check_reference(kind, answer)
        except UserError:
            continue
        return kind
    return None


def find_removals(
    conversations: Conversations, checks: Dataset, arguments: FilterArguments, max_length: int | None
) -> dict[int, Removal]:
    """
    The rows to remove, by their index, for all rules but the last.

    Args:
        checks (`datasets.Dataset`): [`pvm.data.validation.check_rows`] of these rows.
        max_length (`int`, *optional*): most tokens of a row.
    """
    column = next((name for name in ID_COLUMNS if name in conversations.columns), None)
    ids = [None] * len(conversations)
    if arguments.max_per_id is not None and column is not None:
        ids = conversations.column(column)
    removals: dict[int, Removal] = {}
    seen: Counter[str] = Counter()
    rows = zip(checks["problem"][:], checks["length"][:], ids)
    for index, (problem, length, row_id) in enumerate(tqdm(rows, f"filtering {conversations.name}", len(ids))):
        if problem is not None:
            removals[index] = Removal("unusable", problem)
            continue
        conversation = conversations[index]
        answer = message_text(conversation.messages[-1])
        if not conversation.images:
            removals[index] = Removal("no image", f"it has no image{' but a video' * bool(conversation.videos)}.")
        elif verified_by(answer, arguments.match) is None:
            kinds = " or ".join(arguments.match)
            removals[index] = Removal("not verifiable", f"its answer cannot be verified by {kinds}: {answer[-80:]!r}.")
        elif max_length is not None and length > max_length:
            removals[index] = Removal("too long", f"it has {length:,} tokens, more than --max_length {max_length}.")
        elif arguments.max_per_id is not None:
            key = f"question {content_digest(to_prompt(conversation)[0])}" if row_id is None else f"id {row_id}"
            seen[key] += 1
            if seen[key] > arguments.max_per_id:
                removals[index] = Removal("same id", f"it is number {seen[key]} of {key[:80]}.")
    return removals

"""trl's GRPOTrainer for PVM and its controls."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers.generation.logits_process import SuppressTokensLogitsProcessor

from pvm.errors import UserError
from pvm.evaluation.matching import MATCHES
from pvm.rl.rollouts import SampledLogProbs
from pvm.training.trainer import CheckpointingTrainer, PVMTrainingArguments
from pvm.vllm.placeholders import collapsed


try:
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import unwrap_model_for_generation
except ModuleNotFoundError as error:
    raise UserError(f"GRPO needs trl ({error}): pip install 'qwen3vl-pvm[rl]', or trl==1.16.*.") from error


# Fields of GRPOConfig that must keep their default, by the reason.
FIXED = {
    "completions are sampled from the distribution that is trained": (
        *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "vllm_structured_outputs_regex"),
    ),
    "every step samples its own completions": ("num_iterations", "steps_per_generation", "generation_batch_size"),
    "there is no reference model, as in the paper": (
        *("beta", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_bias_correction_kl"),
    ),
    "grpo.py loads the model itself": ("model_init_kwargs", "trust_remote_code", "vllm_model_impl"),
    "its cache has no place for the branches' memory": (
        *("use_transformers_continuous_batching", "use_transformers_paged", "transformers_continuous_batching_config"),
        "cache_implementation",
    ),
    "self-attention must see the image while completions are sampled": ("image_dropout",),
    "grpo.py only trains; eval.py evaluates the checkpoints": ("num_generations_eval",),
    "there are no tools, and no experts": ("max_tool_calling_iterations", "router_aux_loss_coef"),
    "what trains is float32 anyway": ("cast_lm_head_to_fp32",),
    "use vllm_importance_sampling_clip_max": ("vllm_importance_sampling_cap",),
}
# vLLM's limit for one image, which trl sets (`max_num_batched_tokens`).
VLLM_IMAGE_TOKENS = 4096
# The paper's, and trl's default where that agrees.
REWARDS, REWARD_WEIGHTS = ("accuracy_reward", "format_reward"), (0.9, 0.1)


@dataclass
class GRPOArguments(PVMTrainingArguments, GRPOConfig):
    """trl's GRPOConfig with the paper's defaults."""

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(default=0, metadata={"help": "Warm-up steps; below 1, a share of all steps."})
    max_completion_length: int = field(default=16_384, metadata={"help": "Maximum tokens of a completion."})
    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Leave completions out of the loss that were cut off at that length."}
    )
    loss_type: str = field(
        default="grpo", metadata={"help": "How losses of tokens are averaged; trl's own default is `dapo`."}
    )
    reward_functions: list[str] = field(
        default_factory=lambda: list(REWARDS),
        metadata={"help": "`accuracy_reward`, `format_reward` or FILE.py:FUNCTION (pvm/rl/rewards.py shows one)."},
    )
    reward_weights: list[float] = field(
        default_factory=lambda: list(REWARD_WEIGHTS), metadata={"help": "The weight of each reward function."}
    )
    match: str = field(
        default="exact",
        metadata={
            "help": "When accuracy_reward counts an answer as correct, as in eval.py.",
            "choices": list(MATCHES),
        },
    )
    max_sampling_difference: float | None = field(
        default=None,
        metadata={
            "help": "Stop if the trainer's log-probabilities of sampled tokens differ by more than this, on average, "
            "from those they were sampled with: by default 1e-3, with --bf16 or bfloat16 weights 0.1."
        },
    )

    def __post_init__(self):
        """
        Raises:
            UserError: for a value that would do nothing, something other than it says, or what cannot work.
        """
        reasons = {name: reason for reason, names in FIXED.items() for name in names}
        for known in fields(self):
            if known.name in reasons and getattr(self, known.name) != known.default:
                value = getattr(self, known.name)
                raise UserError(f"--{known.name} {str(value).lower()}: {reasons[known.name]}. Leave it out.")
        if len(self.reward_weights) != len(self.reward_functions):
            raise UserError(
                f"--reward_functions {' '.join(self.reward_functions)} are {len(self.reward_functions)}, and "
                f"--reward_weights {' '.join(map(str, self.reward_weights))}: give one for each."
            )
        if self.max_completion_length < 1 or self.temperature <= 0:
            raise UserError("--max_completion_length must be at least 1, and --temperature above 0.")
        super().__post_init__()


class PVMGRPOTrainer(CheckpointingTrainer, GRPOTrainer):
    """
    trl's GRPO, with checkpoints like those of the first stage.

    - Rollouts compute in the trainer's precision, and keep the log-probabilities with which tokens were sampled. The
      mean difference from the trainer's own is logged as `sampling/sampling_logp_difference/mean`, as trl does it for
      vLLM only, and stops the run if it is large.
    - The model never writes placeholders of images or videos.
    - vLLM gets prompts as it wants them, with one placeholder per image. trl gives it one per visual token, and vLLM
      expands them once more.

    - Prompts with and without images may be in one batch.

    Private methods of trl's trainer that are overridden, because there is no public way: `_tokenize_prompts`,
    `_generate_single_turn`, `_get_per_token_logps_and_entropies`.

    Args:
        settings (`dict[str, Any]`): [`grpo_settings`].
    """

    def __init__(self, model, *args, **kwargs):
        config = model.config
        self.placeholders = [config.image_token_id, config.video_token_id]
        super().__init__(model, *args, **kwargs)
        self.model.register_forward_pre_hook(without_empty_images, with_kwargs=True)
        if self.use_vllm:
            self.vllm_generation.generation_kwargs["logit_bias"] = dict.fromkeys(self.placeholders, -100.0)
        else:
            # Suppressed in `_sample` instead, after the log-probabilities are kept.
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = None
        self.log_probs: torch.Tensor | None = None

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: every checkpoint has a card of its own."""

    def _tokenize_prompts(self, prompts: list) -> tuple[list[list[int]], list[list] | None, dict[str, Any]]:
        prompt_ids, images, multimodal_fields = super()._tokenize_prompts(prompts)
        # The processor, which reads them once more, does not take trl's `None` for a prompt without images.
        return prompt_ids, images and [own or [] for own in images], multimodal_fields

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images, multimodal_fields: dict[str, Any], num_generations: int, **kwargs
    ) -> tuple[list[list[int]], list[list[float]]]:
        if self.use_vllm:
            if self.vllm_mode == "colocate":
                prompt_ids = [collapsed(ids, self.placeholders[0]) for ids in prompt_ids]
            images = images and [own or None for own in images]
            completions, log_probs = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, **kwargs
            )
        else:
            completions, log_probs = self._sample(prompt_ids, multimodal_fields)
        if any(not ids.isdisjoint(self.placeholders) for ids in map(set, completions)):
            raise RuntimeError(
                "The model wrote a placeholder of an image, which is never sampled. Please report this."
            )
        return completions, log_probs

    def _sample(
        self, prompt_ids: list[list[int]], multimodal_fields: dict[str, Any]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Completions up to their first end token, and the log-probabilities of their tokens."""
        inputs = dict(self._tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt"))
        length = inputs["input_ids"].shape[1]
        for name, value in multimodal_fields.items():
            if name == "mm_token_type_ids":
                value = [[0] * (length - len(row)) + list(row) for row in value]
            inputs[name] = torch.as_tensor(value)
        inputs = {name: value.to(self.accelerator.device) for name, value in inputs.items()}
        sampled = SampledLogProbs(self.temperature)
        suppressed = SuppressTokensLogitsProcessor(self.placeholders, self.accelerator.device)
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            sequences = model.generate(
                **inputs, generation_config=self.generation_config, logits_processor=[sampled, suppressed]
            )
        log_probs = sampled.finish(sequences)
        new = sequences[:, length:]
        is_end = torch.isin(new, torch.tensor(self.eos_token_ids, device=new.device))
        lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, new.shape[1]).tolist()
        return (
            [ids[:length] for ids, length in zip(new.tolist(), lengths)],
            [values[:length] for values, length in zip(log_probs.tolist(), lengths)],
        )

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        log_probs, *others = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.log_probs = log_probs.detach()
        return log_probs, *others

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._compare_log_probs(inputs["sampling_per_token_logps"], inputs["completion_mask"].bool())
        return loss

    def _compare_log_probs(self, sampled: torch.Tensor, mask: torch.Tensor) -> None:
        """Of the tokens in `mask` `[batch, completion]`. vLLM gives NaN for a token that it could not score."""
        difference = (self.log_probs - sampled)[mask & ~sampled.isnan()].abs()
        total, count = self.accelerator.reduce(
            torch.stack([difference.sum(), difference.new_tensor(len(difference))])
        ).tolist()
        if count == 0:
            return
        mean, limit = total / count, self.args.max_sampling_difference
        if limit is None:
            is_float32 = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
            limit = 1e-3 if is_float32 else 0.1
        self._metrics["train"]["sampling/sampling_logp_difference/mean"].append(mean)
        if not mean <= limit:  # not ">": NaN must fail, too
            raise UserError(
                f"Rollouts and trainer do not compute the same: the log-probabilities of sampled tokens differ by "
                f"{mean:.2g} on average, more than --max_sampling_difference {limit:g}. Nothing that this run learns "
                "could be trusted. With --use_vllm, check that vLLM has the plugin and the same weights "
                "(docs/recipe.md); otherwise please report this."
            )


def without_empty_images(model, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """trl passes zero images for a micro-batch that has none, and the vision tower does not take them."""
    if "image_grid_thw" in kwargs and len(kwargs["image_grid_thw"]) == 0:
        kwargs = {key: value for key, value in kwargs.items() if key not in ("pixel_values", "image_grid_thw")}
    return args, kwargs


def grpo_settings(arguments: GRPOArguments) -> dict[str, Any]:
    """What [`pvm.training.resume.run_settings`] does not know of a second stage."""
    names = ("num_generations", "max_completion_length", "temperature", "loss_type", "mask_truncated_completions")
    names += ("reward_weights", "match", "scale_rewards", "epsilon", "use_vllm")
    functions = [Path(name).name for name in arguments.reward_functions]
    return {"stage": "grpo", "reward_functions": functions, **{name: getattr(arguments, name) for name in names}}


def check_ends(generation_ends: int | Sequence[int] | None, tokenizer) -> None:
    """
    Raises:
        UserError: if completions would not end where a turn of the chat does.
    """
    ends = [generation_ends] if isinstance(generation_ends, int) else list(generation_ends or [])
    if tokenizer.convert_tokens_to_ids("<|im_end|>") not in [*ends, tokenizer.eos_token_id]:
        raise UserError(
            "Neither generation_config.json nor the tokenizer of the model names <|im_end|> as an end token, so no "
            "completion would end. Add its id to eos_token_id in generation_config.json."
        )

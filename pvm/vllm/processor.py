"""A prompt whose image placeholders are already expanded is left as it is."""

from itertools import groupby

from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor

from pvm.vllm.placeholders import collapsed


class Qwen3VLPVMMultiModalProcessor(Qwen3VLMultiModalProcessor):
    """
    vLLM expands the placeholder of each image to as many as it has visual tokens, in prompts of token ids, too. trl's
    GRPO trainer passes prompts in which that is done, and the stock processor would expand them again.
    """

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        image_token = self.info.get_hf_config().image_token_id
        lengths = [len(list(run)) for token, run in groupby(token_ids) if token == image_token]
        if lengths == [len(updates[0].content.full) for updates in mm_prompt_updates.get("image", [])]:
            token_ids = collapsed(token_ids, image_token)
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)
